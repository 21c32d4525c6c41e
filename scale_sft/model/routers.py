"""Routers: the layers that choose each token's experts. They stay frozen unless an option names them."""

from __future__ import annotations

from typing import Any

from torch import nn

from scale_sft.spiel.taps import shape_of

from .experts import fused_in
from .linear_kinds import is_conv1d
from .packed_weights import is_quantized_layer

_NAMES = ("gate", "router", "layer", "wg", "classifier")
"""Last names of routers' paths: a layer with as many rows as there are experts might be something else."""


def routers(model: nn.Module) -> set[str]:
    """Find the paths of routers: layers next to experts, with a weight [E, H] for E experts."""
    blocks: dict[str, int] = {}  # by path of the block around them: E
    for path, module in model.named_modules():
        count = None
        if path.endswith(".experts"):
            count = len(module) if isinstance(module, nn.ModuleList) else getattr(module, "num_experts", None)
        for fused in fused_in(path, module):
            count = fused.experts
        if count:
            blocks[path.rpartition(".")[0]] = count
    found = set()
    for path, module in model.named_modules():
        leaf = path.rpartition(".")[2]
        weight = module._parameters.get("weight")
        if weight is None or leaf not in _NAMES or len(shape_of(weight)) != 2:
            continue
        if any(path.startswith(f"{block}.") and shape_of(weight)[0] == count for block, count in blocks.items()):
            found.add(path)
    return found


def is_free_router(module: Any) -> bool:
    """Return True for a router that is no linear layer: its forward pass does more with its weight than multiply."""
    return not (isinstance(module, nn.Linear) or is_conv1d(module) or is_quantized_layer(module))
