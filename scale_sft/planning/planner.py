"""Plan the memory and traffic of a run on each device, without its weights: `scale-sft plan`.

All sizes are in bytes per rank. The base is built on the meta device, one micro-step is traced there (`meta_trace`),
and the rest is arithmetic over shapes.
Shapes: W ranks, N entries of a weight, K active entries, C candidates.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from scale_sft.config.options import Config
from scale_sft.distributed.candidates import ProposalCost, proposal_cost
from scale_sft.distributed.sharding import read_ds_config
from scale_sft.errors import UserError
from scale_sft.model.experts import parse_slice
from scale_sft.model.fingerprints import CHUNK_ENTRIES
from scale_sft.model.loading import max_length, resolve_dtype
from scale_sft.model.quantization import Quantization, resolve_quantization
from scale_sft.model.sparse_settings import peak_rate
from scale_sft.model.targets import budget_of
from scale_sft.spiel.indices import DEVICE_PIECE_ENTRIES

from .footprint import (
    GIB,
    Facts,
    candidate_bytes,
    choice_bytes,
    estimated,
    facts_of,
    largest_gradient,
    state_bytes,
    stored_base,
    unpacked_experts,
)
from .meta_trace import StepMemory, step_memory

DEVICE_RESERVE_BYTES = 1 * GIB
"""GPU memory for its context, libraries' workspaces and communication buffers."""
FRAGMENTATION_FRACTION = 0.05
"""The fraction of a GPU's memory that the allocator cannot use."""
_FINGERPRINT_BYTES = 44  # temporaries per entry of a chunk while the base is fingerprinted


@dataclass(frozen=True)
class Plan:
    """The memory of one rank at its peaks, the traffic of one step, and whether it fits."""

    entries: int  # of all weights
    active: int
    placement: str  # replicate or shard
    rows: dict[str, int]  # memory at the peak of a step, by purpose; the sum is `step_peak`
    load_peak: int
    host_peak: int  # main memory of the node per rank while a base for a GPU is loaded
    traffic: dict[str, int]  # bytes per optimizer step that a rank sends, by purpose
    room: int | None  # None: no limit given
    learning_rate: float  # at its peak

    @property
    def step_peak(self) -> int:
        return sum(self.rows.values())

    @property
    def peak(self) -> int:
        return max(self.step_peak, self.load_peak)

    @property
    def fits(self) -> bool:
        return self.room is None or self.peak <= self.room


class Planner:
    """A planner for one base under varied options; it caches facts and traces.

    Args:
        model_config: of transformers, as from `load_model_config`.
        counts: K by target weight, where an adapter decides it; None: the budget does.
    """

    def __init__(self, model_config: Any, counts: Mapping[str, int] | None = None):
        self.model_config, self.counts = model_config, counts
        self._facts: dict[Any, Facts] = {}
        self._steps: dict[Any, StepMemory] = {}

    def plan(self, config: Config, *, gpus: int = 1, gpu_memory_gb: float | None = None) -> Plan:
        """Plan a run on `gpus` devices of `gpu_memory_gb` (as vendors count: 2**30 bytes).

        Raises:
            UserError: the batch does not divide, targets match nothing, or the architecture cannot be traced.
        """
        if config.run.global_batch_size % gpus:
            raise UserError(f"plan: global_batch_size {config.run.global_batch_size} does not divide over {gpus} ranks")
        room = None
        if gpu_memory_gb is not None:
            room = int(gpu_memory_gb * GIB * (1 - FRAGMENTATION_FRACTION)) - DEVICE_RESERVE_BYTES
        asked = config.model.base_placement
        if asked == "shard" or (asked == "auto" and gpus > 1):
            whole = self._plan(config, gpus, False, room)
            if asked == "shard" or not whole.fits:
                return self._plan(config, gpus, True, room)
            return whole
        return self._plan(config, gpus, False, room)

    def note(self, config: Config) -> str | None:
        """Say what of a base in 4 or 8 bits is not packed; None: nothing to say."""
        facts, quantization = self.facts(config), resolve_quantization(config.model, self.model_config)
        dtype = resolve_dtype(config.model, self.model_config)
        return unpacked_experts((facts.entries, facts.packed, facts.experts), dtype, quantization)

    def facts(self, config: Config) -> Facts:
        """Read the facts of the base that a run's options decide on."""
        sparse = config.sparse
        key = (sparse.target_modules, sparse.exclude_modules, sparse.train_embeddings, config.model.attention)
        if key not in self._facts:
            self._facts[key] = facts_of(config, self.model_config)
        return self._facts[key]

    def _plan(self, config: Config, gpus: int, sharded: bool, room: int | None) -> Plan:
        facts, sparse = self.facts(config), config.sparse
        dtype = resolve_dtype(config.model, self.model_config)
        size, quantization = dtype.itemsize, resolve_quantization(config.model, self.model_config)
        counts = self.counts or budget_of(sparse, facts.shapes, facts.transposed)
        active, largest_k = sum(counts.values()), max(counts.values())
        numbers = estimated(sparse, facts, counts)
        gradient = largest_gradient(sparse, facts, counts) * size
        largest_target = max(o * i for o, i in facts.shapes.values())

        stored, scales = stored_base(facts, size, quantization), _scales(facts, quantization)
        step = self._step(config, counts, gpus, dtype)
        gathered = _gathered(config, facts, size, stored) if sharded else 0
        proposal = max((cost.temporaries for cost in proposal_costs(config, facts, counts, gpus)), default=0)
        dequantised = max(2 * facts.largest_gradient, _largest_fused(facts)) * size if quantization else 0
        held = 0 if quantization else 1 / gpus if sharded else 1
        state = state_bytes(config, facts.shapes, counts, dtype, held)
        after = _after_step_bytes(active, largest_k)
        rows = {
            "base": _on_each(stored, facts, quantization, gpus) if sharded else stored,
            "base, gathered": gathered,
            **state,
            "candidates": candidate_bytes(config, numbers),
            "sums of the first choice": choice_bytes(sparse, facts.shapes, counts, gpus),
            "activations": step.activations,
            "logits": step.logits,
            "largest weight gradient": gradient,
            "other working memory": max(step.working - gradient, 0) + dequantised + proposal,
        }
        idle = sum(rows[name] for name in ("activations", "logits", "largest weight gradient", "other working memory"))
        rows["other working memory"] += max(0, after - idle)
        return Plan(
            entries=facts.entries,
            active=active,
            placement="shard" if sharded else "replicate",
            rows=rows,
            load_peak=rows["base"]
            + max(
                facts.largest * size * (2 if sharded else 1),
                sum(state.values()) + _FINGERPRINT_BYTES * min(largest_target, CHUNK_ENTRIES),
            ),
            host_peak=facts.largest * size * 2 if sharded and not quantization else stored,
            traffic=_traffic(config, facts, counts, gpus, stored - scales if sharded else 0),
            room=room,
            learning_rate=peak_rate(sparse, config.optimizer, active, facts.shapes),
        )

    def _step(self, config: Config, counts: Mapping[str, int], gpus: int, dtype: torch.dtype) -> StepMemory:
        model, sequences = config.model, config.run.micro_batch_size or config.run.global_batch_size // gpus
        sequences *= 2 if config.objective.pairs else 1  # both sides; packed rows are twice as long
        tokens = max_length(config.data.max_length, self.model_config)
        attention = self.facts(config).attention if model.attention == "auto" else model.attention
        alone = gpus == 1 or config.sparse.trains_whole != "entry"  # ranks search together: see `proposal_costs`
        key = (sequences, tokens, config.sparse, model.gradient_checkpointing, attention, dtype, alone)
        if key not in self._steps:
            self._steps[key] = step_memory(
                self.model_config,
                dtype,
                sequences=sequences,
                tokens=tokens,
                sparse=config.sparse,
                active=counts,
                proposes=alone and config.sparse.proposes,
                checkpointing=model.gradient_checkpointing,
                attention=attention,
                trust_remote_code=model.trust_remote_code,
                faults=self.facts(config).faults,
            )
        return self._steps[key]


def _largest_fused(facts: Facts) -> int:
    """Count the entries of the fused parameter that has most of them in targets: a base in few bits copies it whole."""
    fused: Counter[str] = Counter()
    for name, (rows, columns) in facts.shapes.items():
        if found := parse_slice(name):
            fused[found[0]] += rows * columns
    return max(fused.values(), default=0)


def _scales(facts: Facts, quantization: Quantization | None) -> int:
    """Count the bytes of a packed base's scales, which are whole on every rank."""
    return int(facts.packed * quantization.state_bytes_per_entry) if quantization else 0


def _on_each(stored: int, facts: Facts, quantization: Quantization | None, gpus: int) -> int:
    """Count the bytes of one rank's part of a sharded base; scales of packed weights are not sharded."""
    scales = _scales(facts, quantization)
    return (stored - scales) // gpus + scales


def _gathered(config: Config, facts: Facts, size: int, stored: int) -> int:
    """Count the bytes that ZeRO-3 gathers in addition to the shards: its limit of live parameters, and its prefetch."""
    zero = read_ds_config(config.model.ds_config)["zero_optimization"]
    number = lambda key, default: zero[key] if isinstance(zero.get(key), (int, float)) else default
    entries = number("stage3_max_live_parameters", 10**9) + number("stage3_prefetch_bucket_size", 5 * 10**7)
    return int(min(stored, max(entries, facts.largest) * size))


def _after_step_bytes(active: int, largest_k: int) -> int:
    """Count temporaries of the update and of drop and grow on a device, in many weights at once, or in the largest."""
    together = max(32 * min(active, DEVICE_PIECE_ENTRIES), 110 * min(active, DEVICE_PIECE_ENTRIES // 4))
    return max(together, 110 * largest_k)


def proposal_costs(config: Config, facts: Facts, counts: Mapping[str, int], gpus: int) -> list[ProposalCost]:
    """Compute what one proposal of candidates costs each rank, for each target weight; nothing where there is one rank.

    Empty where nothing proposes, and where whole columns or rows move: sketches are summed with the gradients.

    Args:
        config: of the run.
        facts: shapes of the targets.
        counts: K of each target weight.
        gpus: W.
    """
    if not config.sparse.proposes or config.sparse.trains_whole != "entry":
        return []
    shapes = facts.shapes.items()
    chosen = {name: max(1, min(int(config.sparse.candidate_ratio * counts[name]), o * i)) for name, (o, i) in shapes}
    return [proposal_cost(o * i, chosen[name], gpus) for name, (o, i) in shapes]


def _traffic(config: Config, facts: Facts, counts: Mapping[str, int], gpus: int, gathered_bytes: int) -> dict[str, int]:
    """Count the bytes that a rank sends per optimizer step with ring algorithms, on average over the run."""
    if gpus == 1:
        return {}
    ring, sparse, active = (gpus - 1) / gpus, config.sparse, sum(counts.values())
    numbers = estimated(sparse, facts, counts)
    phase = min(1.0, sparse.estimation_steps / sparse.update_interval_steps)
    each = getattr(torch, config.optimizer.gradient_dtype).itemsize
    found = {"gradients of deltas": int(2 * ring * each * active)}
    if numbers:
        found["gradients of candidates"] = int(2 * ring * each * numbers * phase)
    if costs := proposal_costs(config, facts, counts, gpus):
        sent = sum(cost.sent(gpus) for cost in costs)
        found["proposal of candidates"] = int(sent / sparse.update_interval_steps)
    if gathered_bytes:
        micro = config.run.micro_batch_size or config.run.global_batch_size // gpus
        steps = math.ceil(config.run.global_batch_size / (gpus * micro))
        found["gathering of the base"] = int(2 * steps * ring * gathered_bytes)
    return found
