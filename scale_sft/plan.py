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
from .moments import bytes_of_moments, resolve_moments
from .quantized import Quantization
from .spiel.delta import budget
from .spiel.entries import bytes_of_entries

GIB = 1 << 30
ACTIVATION_RESERVE_FRACTION = 0.25
"""Part of the device kept free for activations, logits and communication buffers when placing the base."""


@dataclass(frozen=True)
class Footprint:
    """What a replicated run keeps on each device, in bytes."""

    base: int
    deltas: int  # indices, deltas, gradients, cohorts, base values, optimizer state
    candidates: int  # during an estimation phase
    weight_gradient: int  # the largest dense gradient of one weight; of a quantised base, or its dequantised copy

    @property
    def total(self) -> int:
        return self.base + self.deltas + self.candidates + self.weight_gradient


@dataclass(frozen=True)
class Placement:
    """Where the base lies, and why."""

    sharded: bool
    reason: str
    base_bytes: int | None = None  # whole, of a quantised base: what loading it takes on every rank

    @property
    def name(self) -> str:
        return "shard" if self.sharded else "replicate"


def empty_model(config: Config, model_config: Any) -> nn.Module:
    """The base on the meta device: its layers and shapes, no weights."""
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(model_config, trust_remote_code=config.model.trust_remote_code)


@dataclass(frozen=True)
class Facts:
    """What a plan needs to know of a base: its shapes, from the meta device."""

    entries: int
    packed: int  # entries that quantisation packs: linear layers but the output layer
    largest: int  # of one weight of any kind
    shapes: dict[str, tuple[int, int]]  # of the targets


def facts_of(config: Config, model_config: Any) -> Facts:
    """Build the base on the meta device and find its targets.

    Raises:
        UserError: targets match nothing.
    """
    model = empty_model(config, model_config)
    output = model.get_output_embeddings()
    linear = [m for m in model.modules() if type(m).__name__ in ("Linear", "Conv1D") and m is not output]
    return Facts(
        entries=sum(weight.numel() for weight in model.parameters()),
        packed=sum(module.weight.numel() for module in linear),
        largest=max(weight.numel() for weight in model.parameters()),
        shapes={target.name: target.shape for target in find_targets(model, config.sparse.target_modules)},
    )


def stored_base(facts: Facts, size: int, quantization: Quantization | None) -> int:
    """The whole base as it is stored: in its dtype, or packed with its scales."""
    if quantization is None:
        return facts.entries * size
    return int(facts.packed * quantization.bytes_per_entry) + (facts.entries - facts.packed) * size


def footprint(
    config: Config, model_config: Any, dtype: torch.dtype, quantization: Quantization | None = None
) -> Footprint:
    """Arithmetic over the shapes of the model: nothing is loaded."""
    facts, sparse = facts_of(config, model_config), config.sparse
    shapes = facts.shapes
    counts = budget(
        shapes,
        density=sparse.density,
        tunable_weights=sparse.tunable_weights,
        rank_equivalent=sparse.rank_equivalent,
    )
    return Footprint(
        base=stored_base(facts, dtype.itemsize, quantization),
        deltas=sum(state_bytes(config, shapes, counts, dtype, 0 if quantization else 1).values()),
        candidates=candidate_bytes(config, sum(counts.values())),
        weight_gradient=max(o * i for o, i in shapes.values()) * dtype.itemsize,
    )


def state_bytes(
    config: Config, shapes: dict[str, tuple[int, int]], counts: dict[str, int], dtype: torch.dtype, part: float
) -> dict[str, int]:
    """Deltas and what belongs to them, between estimation phases, by what for.

    `part`: of all base values of the entries that this rank puts aside; 0 for a quantised base, which has none.
    """
    sparse, optimizer = config.sparse, config.optimizer
    active, delta = sum(counts.values()), getattr(torch, sparse.delta_dtype).itemsize
    reference = delta * active if sparse.drop_criterion == "change" else 0
    if sparse.method == "ma":
        state = sum(4 * (o + i) for o, i in shapes.values())
    else:
        state = int(bytes_of_moments(resolve_moments(optimizer.moments, dtype)) * active)
    return {
        "indices": bytes_of_entries(active),
        "deltas and their gradients": (delta + _gradient(config) + 1) * active + reference,
        "optimizer state": state,
        "base values put aside": int(active * part * dtype.itemsize),
    }


def candidate_bytes(config: Config, active: int) -> int:
    """Candidates in an estimation phase: at most 4 bytes of index, two estimates, the gradient."""
    return 0 if config.sparse.method == "ma" else int((12 + _gradient(config)) * config.sparse.candidate_ratio * active)


def _gradient(config: Config) -> int:
    return getattr(torch, config.optimizer.gradient_dtype).itemsize


def choose_placement(
    config: Config, model_config: Any, dtype: torch.dtype, world: World, quantization: Quantization | None = None
) -> Placement:
    """Replicate the base where it and its training state fit a device, otherwise shard it.

    A quantised base that fits is replicated too: a step then moves only the gradients of the deltas, and gathering even
    4 bits per weight moves far more. A base that transformers quantises is loaded whole by every rank before DeepSpeed
    cuts it into shards, which the reason says.
    """
    asked = config.model.base_placement
    if asked != "auto" and quantization is None:
        return Placement(asked == "shard", "as asked for by base_placement")
    needs = footprint(config, model_config, dtype, quantization)
    if quantization:
        return _place_quantized(asked, needs, world)
    need = needs.total
    room = int(world.device_memory_bytes() * (1 - ACTIVATION_RESERVE_FRACTION))
    figures = f"base and training state need {need / GIB:.2f} GiB, a device has room for {room / GIB:.2f} GiB"
    if need <= room:
        return Placement(False, f"auto: {figures}")
    if world.size == 1:
        return Placement(False, f"auto: {figures}, but one process cannot shard; it may not fit")
    return Placement(True, f"auto: {figures}")


def _place_quantized(asked: str, needs: Footprint, world: World) -> Placement:
    whole = f"each rank loads the whole quantised base, {needs.base / GIB:.2f} GiB, before it is cut into shards"
    if asked != "auto":
        sharded = asked == "shard"
        return Placement(sharded, "as asked for by base_placement" + (f"; {whole}" if sharded else ""), needs.base)
    room = int(world.device_memory_bytes() * (1 - ACTIVATION_RESERVE_FRACTION))
    figures = (
        f"the quantised base ({needs.base / GIB:.2f} GiB) and its training state need {needs.total / GIB:.2f} GiB, a "
        f"device has room for {room / GIB:.2f} GiB"
    )
    if needs.total <= room:
        return Placement(False, f"auto: {figures}; whole everywhere it moves no weights, sharded it would", needs.base)
    if world.size == 1:
        return Placement(False, f"auto: {figures}, but one process cannot shard; it may not fit", needs.base)
    return Placement(True, f"auto: {figures}; {whole}", needs.base)
