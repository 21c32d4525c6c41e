"""Memory of a run before it is started, from the shapes alone; and from it where the base should lie.

All sizes in bytes, per rank.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from .config import Config
from .distributed import World
from .model import find_targets
from .spiel.delta import budget

GIB = 1 << 30
ACTIVATION_RESERVE_FRACTION = 0.25
"""Part of the device kept free for activations, logits and communication buffers when placing the base."""


@dataclass(frozen=True)
class Footprint:
    """What a replicated run keeps on each device, in bytes."""

    base: int
    deltas: int  # indices, deltas, gradients, cohorts, base values, optimizer state
    candidates: int  # during an estimation phase
    weight_gradient: int  # the largest dense gradient of one weight

    @property
    def total(self) -> int:
        return self.base + self.deltas + self.candidates + self.weight_gradient


@dataclass(frozen=True)
class Placement:
    """Where the base lies, and why."""

    sharded: bool
    reason: str

    @property
    def name(self) -> str:
        return "shard" if self.sharded else "replicate"


def empty_model(config: Config, model_config: Any) -> nn.Module:
    """The base on the meta device: its layers and shapes, no weights."""
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(model_config, trust_remote_code=config.model.trust_remote_code)


def footprint(config: Config, model_config: Any, dtype: torch.dtype) -> Footprint:
    """Arithmetic over the shapes of the model: nothing is loaded."""
    model = empty_model(config, model_config)
    targets = find_targets(model, config.sparse.target_modules)
    shapes = {target.name: target.shape for target in targets}
    sparse = config.sparse
    active = sum(
        budget(
            shapes,
            density=sparse.density,
            tunable_weights=sparse.tunable_weights,
            rank_equivalent=sparse.rank_equivalent,
        ).values()
    )
    per_entry = 4 + 4 + 4 + 1 + dtype.itemsize + (0 if sparse.method == "ma" else 8)
    accumulators = sum(4 * (o + i) for o, i in shapes.values()) if sparse.method == "ma" else 0
    candidates = 0 if sparse.method == "ma" else int(16 * sparse.candidate_ratio * active)
    return Footprint(
        base=sum(weight.numel() for weight in model.parameters()) * dtype.itemsize,
        deltas=per_entry * active + accumulators,
        candidates=candidates,
        weight_gradient=max(o * i for o, i in shapes.values()) * dtype.itemsize,
    )


def choose_placement(config: Config, model_config: Any, dtype: torch.dtype, world: World) -> Placement:
    """Replicate the base where it and its training state fit a device, otherwise shard it."""
    asked = config.model.base_placement
    if asked != "auto":
        return Placement(asked == "shard", "as asked for by base_placement")
    need = footprint(config, model_config, dtype).total
    room = int(world.device_memory_bytes() * (1 - ACTIVATION_RESERVE_FRACTION))
    figures = f"base and training state need {need / GIB:.2f} GiB, a device has room for {room / GIB:.2f} GiB"
    if need <= room:
        return Placement(False, f"auto: {figures}")
    if world.size == 1:
        return Placement(False, f"auto: {figures}, but one process cannot shard; it may not fit")
    return Placement(True, f"auto: {figures}")
