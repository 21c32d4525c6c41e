"""Read and check all inputs before any process group or weight: cheap checks before expensive loads."""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from scale_sft.adapters.base_files import require_mergeable
from scale_sft.adapters.start import Start
from scale_sft.config.loading import to_yaml
from scale_sft.config.options import Config
from scale_sft.data.batches import BatchOrder, batches_of_rank
from scale_sft.data.cache import cache_folder, load_examples, with_writable_cache
from scale_sft.data.chat import use_template
from scale_sft.data.examples import Examples
from scale_sft.data.fit import refuse_misfit
from scale_sft.data.packing import refuse_unpackable
from scale_sft.data.preferences import kind_of
from scale_sft.distributed.cluster import Cluster
from scale_sft.distributed.tracking import refuse_unknown_tracker
from scale_sft.distributed.world import World
from scale_sft.errors import UserError
from scale_sft.model.attention import Attention, choose_attention
from scale_sft.model.compiled_blocks import refuse_uncompilable
from scale_sft.model.coverage import Coverage, coverage
from scale_sft.model.determinism import refuse_unrepeatable
from scale_sft.model.loading import (
    enable_checkpointing,
    load_model_config,
    load_tokenizer,
    max_length,
    resolve_dtype,
)
from scale_sft.model.quantization import Quantization, refuse_corrupting_storage, resolve_quantization
from scale_sft.model.reach import refuse_randomness
from scale_sft.model.router_loss import router_loss_of
from scale_sft.model.sparse_settings import rule_of
from scale_sft.model.targets import budget_of, choice_of, transposed_names
from scale_sft.planning.footprint import empty_model, entries_of, unpacked_experts
from scale_sft.planning.placement import Placement, choose_placement

from .reference_adapter import ReferenceAdapter, reference_of
from .starting import start_of


@dataclass(frozen=True)
class Inputs:
    """The inputs of a run before any process group or weight: tokenizer, examples, model configuration, lengths."""

    config: Config
    tokenizer: Any
    model_config: Any
    dtype: torch.dtype
    quantization: Quantization | None
    train: Examples
    eval: Examples | None
    order: BatchOrder
    steps: int
    placement: Placement
    attention: Attention
    coverage: Coverage  # what the targets reach of the blocks
    row_tokens: int | None  # length of packed rows; None: one sequence per row
    start: Start | None = None  # the adapter that the run starts from
    reference: ReferenceAdapter | None = None  # the adapter that is part of the reference
    cache: Path | None = None  # folder of tokenised data and of log-probabilities of the reference
    notes: tuple[str, ...] = ()  # for the user: deviations from the request

    def digests(self) -> dict[str, str]:
        """Digest the configuration and the tokenised data (SHA-256): ranks that differ must not train together."""
        settings = hashlib.sha256(to_yaml(self.config).encode()).hexdigest()
        placement = hashlib.sha256(self.placement.name.encode()).hexdigest()
        digests = {"the configuration": settings, "base_placement": placement, "train_data": self.train.digest()}
        digests |= {"start_from": self.start.digest} if self.start else {}
        digests |= {"reference_adapter": self.reference.digest} if self.reference else {}
        return digests | ({"eval_data": self.eval.digest()} if self.eval else {})

    def micro_batches(
        self, batch: Sequence[int], cluster: Cluster, *, proposing: bool = False
    ) -> Iterator[dict[str, Tensor]]:
        """Cut a rank's micro-batches from a global batch; `proposing` if the first of them proposes candidates."""
        return batches_of_rank(
            self.train,
            batch,
            rank=cluster.rank,
            world_size=cluster.size,
            micro_batch_size=self.config.run.micro_batch_size,
            first=self.config.sparse.proposal_batch_size if proposing else None,
            keep_order=proposing,
            row_tokens=self.row_tokens,
            flat=flat_rows(self.config),
            pad_id=self.tokenizer.pad_token_id,
            device=cluster.device,
        )


def read_inputs(config: Config) -> Inputs:
    """Read and check everything except the weights.

    Raises:
        UserError: see `load_model_config`, `choose_targets`, `budget_of`, `start_of`, `Start.refuse_misfit`,
            `load_examples`, `refuse_misfit`; or the batch does not divide over the ranks.
    """
    refuse_unknown_tracker(config.run.tracker)
    rule_of(config.sparse, config.run.seed)
    model_config = load_model_config(config.model)
    quantization = resolve_quantization(config.model, model_config)
    data, run = config.data, config.run
    tokenizer = use_template(load_tokenizer(config.model), data.chat_template)
    world = World.from_environment()
    refuse_unrepeatable(config, world.device())
    _check_batch(config, world.size)
    tokens = max_length(data.max_length, model_config)
    data = replace(data, max_length=tokens)
    dtype = resolve_dtype(config.model, model_config)
    base = _checked_base(config, model_config, world.size)
    shapes = base.shapes
    if quantization is None:  # a base that is quantised is merged from what was loaded
        require_mergeable(config.model, base.model, shapes, loaded=False)
    start = start_of(config)
    if start:
        start.refuse_misfit(config.sparse, shapes, dtype, quantization, base.transposed)
    else:
        budget_of(config.sparse, shapes, base.transposed)
    counts = start.counts if start else None
    placement = choose_placement(config, model_config, dtype, world, quantization, counts)
    if config.model.compile == "blocks":
        refuse_uncompilable(world.device(), sharded=placement.sharded, attention=config.model.attention)
    if quantization and placement.sharded:
        refuse_corrupting_storage(quantization, dtype)
    reference = reference_of(config, shapes, dtype, quantization)
    data, notes = with_writable_cache(data, Path(run.output_dir) / "cache")
    kind = kind_of(config.objective.objective)
    train = load_examples(data.train_data, "train", tokenizer, data, data.max_train_examples, kind=kind)
    held_out = None
    if data.eval_data:
        held_out = load_examples(data.eval_data, "eval", tokenizer, data, data.max_eval_examples, kind=kind)
    refuse_misfit(tokenizer, model_config, train, held_out)
    attention = choose_attention(config.model.attention, base.model, dtype, tokens, world.device().type)
    unpacked = unpacked_experts(entries_of(base.model), dtype, quantization)
    notes = (*notes, *filter(None, (attention.note, base.note, unpacked)))
    notes = (*notes, *dict.fromkeys((*train.notes, *(held_out.notes if held_out else ()))))
    total = None if run.steps else math.ceil((run.epochs or 1) * len(train))
    order = BatchOrder(len(train), run.global_batch_size, run.seed, total)
    return Inputs(
        config=config,
        tokenizer=tokenizer,
        model_config=model_config,
        dtype=dtype,
        quantization=quantization,
        train=train,
        eval=held_out,
        order=order,
        steps=run.steps or order.steps(),
        placement=placement,
        attention=attention,
        coverage=base.coverage,
        row_tokens=_row_tokens(config, tokens),
        start=start,
        reference=reference,
        cache=cache_folder(data),
        notes=notes,
    )


def _row_tokens(config: Config, max_length: int) -> int | None:
    """Choose the length of packed rows: a pair of the longest answers fits into one. None: no packing."""
    if not config.data.packing:
        return None
    return 2 * max_length if config.objective.pairs else max_length


@dataclass(frozen=True)
class _Base:
    """What is known of the base without its weights."""

    model: Any  # on the meta device
    shapes: dict[str, tuple[int, int]]  # (O, I) of the targets
    transposed: frozenset[str]  # targets that are stored as [in, out]
    coverage: Coverage
    note: str | None


def _checked_base(config: Config, model_config: Any, ranks: int) -> _Base:
    """Refuse targets that the base cannot have, and what it cannot do, before any weight is loaded."""
    model: Any = empty_model(config, model_config)
    choice = choice_of(model, config.sparse)
    if ranks > 1:
        refuse_experts([target.name for target in choice.targets])
    note = refuse_randomness(model, allowed=config.model.allow_randomness)
    if config.model.gradient_checkpointing:
        enable_checkpointing(model)
    if config.data.packing:
        refuse_unpackable(model)
    router_loss_of(model, config.objective.router_aux_loss)
    shapes = {target.name: target.shape for target in choice.targets}
    return _Base(model, shapes, transposed_names(choice.targets), coverage(model, choice), note)


def refuse_experts(names: Sequence[str]) -> None:
    """Refuse layers that only some ranks' tokens may reach.

    Ranks would wait for each other, or exchange the gradients of different experts.

    Raises:
        UserError: names the first of them.
    """
    expert = next((name for name in names if re.search(r"\.experts\.\d+\.", name)), None)
    if expert:
        raise UserError(
            f"target_modules: '{expert}' is one of several experts, which not every rank's tokens reach in every step. "
            "Fix: leave the experts out (target_modules), or train in one process"
        )


def flat_rows(config: Config) -> bool:
    """Return True if packed rows go into a single one: flash attention separates sequences only there."""
    return config.model.attention.startswith("flash")


def _check_batch(config: Config, ranks: int) -> None:
    size, micro = config.run.global_batch_size, config.run.micro_batch_size
    unit = ranks * (micro or 1)
    if size % unit:
        nearest = max(unit, round(size / unit) * unit)
        cut = f"{ranks} ranks" + (f" of micro-batches of {micro}" if micro else "")
        raise UserError(f"global_batch_size: {size} does not divide over {cut}; nearest that does: {nearest}")
    proposal = config.sparse.proposal_batch_size
    if proposal and micro and proposal > unit:
        raise UserError(
            f"proposal_batch_size: got {proposal}, but one micro-step of all ranks holds {unit} sequences; candidates "
            "are proposed by one micro-step. Fix: lower it, or raise micro_batch_size"
        )
