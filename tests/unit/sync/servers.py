"""A model laid out as inference servers do it: q, k and v fused, gate and up fused, cut for tensor parallelism."""

from __future__ import annotations

import torch
from torch import nn

FUSED = {
    "q_proj": "qkv_proj",
    "k_proj": "qkv_proj",
    "v_proj": "qkv_proj",
    "gate_proj": "gate_up_proj",
    "up_proj": "gate_up_proj",
}
CUT_BY_COLUMNS = ("o_proj", "down_proj")


class FusedServer(nn.Module):
    """One of `size` processes that hold a llama; `load_weights` takes the checkpoint's names, as those of vLLM do."""

    def __init__(self, model: nn.Module, rank: int = 0, size: int = 1):
        super().__init__()
        self.rank, self.size = rank, size
        self.rows: dict[str, tuple[str, int, int]] = {}  # parameter, first row, rows of it, by checkpoint name
        heights: dict[str, int] = {}
        shapes: dict[str, tuple[int, ...]] = {}
        loaded = [(name, weight) for name, weight in model.named_parameters() if name.endswith("weight")]
        for name, weight in loaded:
            leaf = name.split(".")[-2]
            fused = name.replace(leaf, FUSED.get(leaf, leaf))
            shape = list(weight.shape)
            if leaf in CUT_BY_COLUMNS:
                shape[1] //= size
            elif leaf in FUSED:
                shape[0] //= size
            first = heights.get(fused, 0)
            self.rows[name] = fused, first, shape[0]
            heights[fused] = first + shape[0]
            shapes[fused] = (heights[fused], *shape[1:])
            self.dtype = weight.dtype
        self.held = nn.ParameterDict(
            {self.key(name): torch.empty(shape, dtype=self.dtype) for name, shape in shapes.items()}
        )
        with torch.no_grad():
            self.load_weights(loaded)

    @staticmethod
    def key(name: str) -> str:
        return name.replace(".", "/")

    def load_weights(self, weights) -> None:
        for name, loaded in weights:
            fused, first, rows = self.rows[name]
            weight, leaf = self.held[self.key(fused)].data, name.split(".")[-2]
            if leaf in CUT_BY_COLUMNS:
                loaded = loaded.narrow(1, self.rank * weight.shape[1], weight.shape[1])
            elif leaf in FUSED:
                loaded = loaded.narrow(0, self.rank * rows, rows)
            part = weight.narrow(0, first, rows)
            assert part.shape == loaded.shape
            part.copy_(loaded)
