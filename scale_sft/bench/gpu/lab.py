"""What a section of the campaign works with: device, sizes, a scratch folder, and a way to report."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from scale_sft.bench.workload import Case
from scale_sft.files import ASSETS

Say = Callable[[str, dict[str, Any]], None]
"""Receives a row: what was measured, and its figures."""

_TINY = {
    "hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4, "num_key_value_heads": 4, "vocab_size": 300,
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """The sizes of all sections: layers of Llama 7B, and steps as long as those of a real run."""

    layers: int = 4
    length: int = 2048  # tokens of a sequence
    micro_batch: int = 4  # sequences of a step
    density: float = 0.02
    low_density: float = 0.006  # as many entries as LoRA of rank 16 has parameters
    rounds: int = 15
    cycles: int = 3  # of reallocation
    vocabulary: int = 128_256
    vocabulary_tokens: int = 8192
    weight: int = 4096 * 11008  # entries of the weight that is reallocated alone
    demo_steps: int = 30
    tiny: bool = False  # a dry run: its figures mean nothing


DRY = Sizes(
    layers=1, length=8, micro_batch=2, density=0.2, low_density=0.1, rounds=2, cycles=1, vocabulary=500,
    vocabulary_tokens=32, weight=1 << 12, demo_steps=6, tiny=True,
)  # fmt: skip


class Skipped(Exception):
    """The reason that a section, or a part of it, has nothing to measure here."""


@dataclass(frozen=True)
class Lab:
    """The place of one section: its device, sizes, scratch folder (shared by all sections), and `say`."""

    device: torch.device
    sizes: Sizes
    scratch: Path
    say: Say

    @property
    def on_gpu(self) -> bool:
        return self.device.type == "cuda"

    def few(self, rounds: int) -> int:
        """Return `rounds`, or fewer in a dry run."""
        return min(rounds, self.sizes.rounds)

    def case(self, **changes: Any) -> Case:
        """Make the settings of a step at full size, in bf16 with kernels, at the usual density."""
        sizes = self.sizes
        settings = {
            "base": str(self.base_folder()),
            "rank": None,
            "density": sizes.density,
            "length": sizes.length,
            "micro_batch": sizes.micro_batch,
        }
        return Case(**{**settings, **changes})

    def base_folder(self, **changes: Any) -> Path:
        """Make the folder of a Llama as wide as one of 7B, with fewer layers and without weights."""
        config = json.loads((ASSETS / "shapes" / "7b" / "config.json").read_text(encoding="utf-8"))
        config |= {"num_hidden_layers": self.sizes.layers} | (_TINY if self.sizes.tiny else {}) | changes
        folder = self.scratch / f"llama-7b-{self.sizes.layers}-layers{''.join(f'-{v}' for v in changes.values())}"
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
        return folder
