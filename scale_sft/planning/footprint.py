"""Compute the memory of a run from shapes alone, before it starts.

All sizes in bytes, per rank.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import ceil, prod
from typing import Any

import torch
from torch import nn

from scale_sft.config.options import Config, SparseConfig
from scale_sft.kernels.moments import bytes_of_moments, resolve_moments
from scale_sft.model import empty
from scale_sft.model.coverage import Coverage, coverage
from scale_sft.model.experts import fused_weights
from scale_sft.model.first_choice import pool_sizes
from scale_sft.model.quantization import Quantization
from scale_sft.model.reach import reach_of
from scale_sft.model.sparse_settings import rule_of
from scale_sft.model.targets import budget_of, choice_of, transposed_names
from scale_sft.model.tilings import tilings_of
from scale_sft.spiel.indices import bytes_of_entries
from scale_sft.spiel.tile_recorder import sketched

GIB = 1 << 30
ACTIVATION_RESERVE_FRACTION = 0.25
"""Part of the device kept free for activations, logits and communication buffers when placing the base."""


@dataclass(frozen=True)
class Footprint:
    """The bytes that a replicated run keeps on each device."""

    base: int
    deltas: int  # indices, deltas, gradients, cohorts, base values, optimizer state
    candidates: int  # during an estimation phase
    weight_gradient: int  # the largest dense gradient of one weight, or its dequantised copy if the base is quantised

    @property
    def total(self) -> int:
        return self.base + self.deltas + self.candidates + self.weight_gradient


def empty_model(config: Config, model_config: Any) -> nn.Module:
    """Build the base of a run on the meta device: its layers and shapes, without weights."""
    model = config.model
    return empty.empty_model(model_config, attention=model.attention, trust_remote_code=model.trust_remote_code)


@dataclass(frozen=True)
class Facts:
    """The shapes of a base that a plan needs, from the meta device."""

    entries: int
    packed: int  # entries that quantisation packs: linear layers except the output layer
    experts: int  # entries of experts in fused parameters, which it does not
    largest: int  # of one weight of any kind
    shapes: dict[str, tuple[int, int]]  # of the targets
    coverage: Coverage  # what they reach of the blocks
    largest_gradient: int  # entries of the largest dense gradient of a target; an input embedding has none
    faults: Mapping[str, str]  # why layers cannot be trained, as `reach_of` found
    transposed: frozenset[str] = frozenset()  # targets that are stored as [in, out]
    attention: str = "sdpa"  # what `attention: auto` is for this base


def facts_of(config: Config, model_config: Any) -> Facts:
    """Build the base on the meta device and find its targets.

    Raises:
        UserError: targets match nothing.
    """
    model: Any = empty_model(config, model_config)
    choice = choice_of(model, config.sparse)
    entries, packed, experts = entries_of(model)
    return Facts(
        entries=entries,
        packed=packed,
        experts=experts,
        largest=max(weight.numel() for weight in model.parameters()),
        shapes={target.name: target.shape for target in choice.targets},
        coverage=coverage(model, choice),
        largest_gradient=max((target.numel for target in choice.targets if not target.by_rows), default=0),
        faults=reach_of(model).faults,
        transposed=transposed_names(choice.targets),
        attention=getattr(model.config, "_attn_implementation", None) or "eager",
    )


def entries_of(model: Any) -> tuple[int, int, int]:
    """Count the entries of all weights, of those that quantisation packs, and of experts in fused parameters."""
    output = model.get_output_embeddings()
    linear = [m for m in model.modules() if type(m).__name__ in ("Linear", "Conv1D") and m is not output]
    return (
        sum(weight.numel() for weight in model.parameters()),
        sum(module.weight.numel() for module in linear),
        sum(fused.weight.numel() for fused in fused_weights(model)),
    )


def unpacked_experts(
    entries: tuple[int, int, int], dtype: torch.dtype, quantization: Quantization | None
) -> str | None:
    """Say how much of a base in 4 or 8 bits stays in its dtype, as its experts are not packed; None: nothing to say.

    Args:
        entries: see `entries_of`.
        dtype: of what is not packed.
        quantization: of the base.
    """
    whole, packed, experts = entries
    if quantization is None or not experts:
        return None
    stored = packed * quantization.bytes_per_entry + (whole - packed) * dtype.itemsize
    unit, name = (GIB, "GiB") if stored >= GIB else (GIB >> 10, "MiB")
    return (
        f"{quantization.kind}: {experts * dtype.itemsize / unit:.2f} of {stored / unit:.2f} {name} of the base stay in "
        f"{str(dtype).removeprefix('torch.')}, as bitsandbytes packs linear layers and not experts in fused parameters"
    )


def stored_base(facts: Facts, size: int, quantization: Quantization | None) -> int:
    """Count the bytes of the whole base as stored: in its dtype, or packed with its scales."""
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
    """Compute the footprint from the shapes of the model, without loading it.

    Args:
        counts: K by target weight, where an adapter decides it; None: the budget does.
    """
    facts = facts_of(config, model_config)
    shapes = facts.shapes
    counts = counts or budget_of(config.sparse, shapes, facts.transposed)
    return Footprint(
        base=stored_base(facts, dtype.itemsize, quantization),
        deltas=sum(state_bytes(config, shapes, counts, dtype, 0 if quantization else 1).values()),
        candidates=candidate_bytes(config, estimated(config.sparse, facts, counts)),
        weight_gradient=largest_gradient(config.sparse, facts, counts) * dtype.itemsize,
    )


def largest_gradient(sparse: SparseConfig, facts: Facts, counts: Mapping[str, int]) -> int:
    """Count the entries of the largest gradient that is formed at once: of a weight, or of its trained tiles alone.

    Where tiles move, a phase forms sketches, which may be larger. A first choice by selection_batches forms whole
    gradients, whatever is trained later.
    """
    if sparse.trains_whole != "entry" and not sparse.selection_batches:
        tilings = tilings_of(sparse, facts.shapes, facts.transposed) if sparse.proposes else {}
        return max([*counts.values(), *(prod(sketched(tiling)) for tiling in tilings.values())])
    return facts.largest_gradient


def state_bytes(
    config: Config, shapes: dict[str, tuple[int, int]], counts: Mapping[str, int], dtype: torch.dtype, part: float
) -> dict[str, int]:
    """Count the bytes of the deltas and their state, between estimation phases, by purpose.

    `part`: the fraction of the entries' base values that this rank saves; 0 for a quantised base, which saves none.
    """
    sparse, optimizer = config.sparse, config.optimizer
    active, delta = sum(counts.values()), getattr(torch, sparse.delta_dtype).itemsize
    reference = delta * active if sparse.drop_criterion == "change" else 0
    if sparse.method == "ma":
        state = sum(4 * (o + i) for o, i in shapes.values())
    else:
        state = int(bytes_of_moments(resolve_moments(optimizer.moments, dtype)) * active)
    return {
        "indices": bytes_of_entries(active, sum(rows + 1 for rows, _ in shapes.values())),
        "deltas and their gradients": (delta + _gradient(config) + 1) * active + reference,
        "optimizer state": state,
        "base values put aside": int(active * part * dtype.itemsize),
    }


def estimated(sparse: SparseConfig, facts: Facts, counts: Mapping[str, int]) -> int:
    """Count the numbers that an estimation phase estimates: gradients of candidates, or sketches of columns or rows.

    Args:
        counts: K by target weight.
    """
    if not sparse.proposes:
        return 0
    tilings = tilings_of(sparse, facts.shapes, facts.transposed)
    if tilings:
        return sum(prod(sketched(tiling)) for tiling in tilings.values())
    return int(sparse.candidate_ratio * sum(counts.values()))


def candidate_bytes(config: Config, numbers: int) -> int:
    """Count the bytes of an estimation phase's `numbers` (see `estimated`): at most 4 per index, estimates, gradient.

    A sketch has no indices, and one estimate instead of two.
    """
    kept = 12 if config.sparse.trains_whole == "entry" else 4
    return (kept + _gradient(config)) * numbers


def choice_bytes(sparse: SparseConfig, shapes: dict[str, tuple[int, int]], counts: Mapping[str, int], gpus: int) -> int:
    """Count the bytes of the gradient sums that a rank keeps for a first choice by selection_batches, until it is made.

    Args:
        sparse: the options.
        shapes: (O, I) by target weight.
        counts: K by target weight.
        gpus: W, the ranks that share them.
    """
    score = rule_of(sparse, seed=0).of(batches=2)
    if not sparse.selection_batches or sparse.start_from or not score.reads_gradients:
        return 0
    pools = pool_sizes(sparse, counts)
    entries = sum(min(pools.get(name, rows * columns), rows * columns) for name, (rows, columns) in shapes.items())
    return (12 if "squares" in score.reads else 4) * ceil(entries / gpus)


def _gradient(config: Config) -> int:
    return getattr(torch, config.optimizer.gradient_dtype).itemsize
