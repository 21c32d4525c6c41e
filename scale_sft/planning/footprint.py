"""Memory of a run before it is started, from the shapes alone; and from it where the base should lie.

All sizes in bytes, per rank.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from scale_sft.config.options import Config, SparseConfig
from scale_sft.kernels.moments import bytes_of_moments, resolve_moments
from scale_sft.model.quantization import Quantization
from scale_sft.model.targets import budget_of, find_targets
from scale_sft.spiel.indices import bytes_of_entries

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
    model: Any = empty_model(config, model_config)
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
    config: Config,
    model_config: Any,
    dtype: torch.dtype,
    quantization: Quantization | None = None,
    counts: Mapping[str, int] | None = None,
) -> Footprint:
    """Compute what a run needs from the shapes of the model: nothing is loaded.

    Args:
        counts: K by target weight, where an adapter decides it; None: the budget does.
    """
    facts = facts_of(config, model_config)
    shapes = facts.shapes
    counts = counts or budget_of(config.sparse, shapes)
    return Footprint(
        base=stored_base(facts, dtype.itemsize, quantization),
        deltas=sum(state_bytes(config, shapes, counts, dtype, 0 if quantization else 1).values()),
        candidates=candidate_bytes(config, sum(counts.values())),
        weight_gradient=max(o * i for o, i in shapes.values()) * dtype.itemsize,
    )


def state_bytes(
    config: Config, shapes: dict[str, tuple[int, int]], counts: Mapping[str, int], dtype: torch.dtype, part: float
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


def proposes(sparse: SparseConfig) -> bool:
    """Tell whether gradients propose candidates at any time."""
    return sparse.method == "ag" or (sparse.method == "static" and sparse.start_from is None)


def candidate_bytes(config: Config, active: int) -> int:
    """Candidates in an estimation phase: at most 4 bytes of index, two estimates, the gradient."""
    if not proposes(config.sparse):
        return 0
    return int((12 + _gradient(config)) * config.sparse.candidate_ratio * active)


def _gradient(config: Config) -> int:
    return getattr(torch, config.optimizer.gradient_dtype).itemsize
