"""From a configuration to the pieces that the main loop turns. Cheap checks come before expensive loads."""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from .base_weight import ResidentDeltas, combine_fingerprints
from .config import Config, to_yaml
from .data import BatchOrder, Examples
from .data_cache import load_examples
from .data_chat import use_template
from .data_pack import batches_of_rank, refuse_leaks
from .distributed import Cluster, World
from .errors import UserError
from .evaluate import Answer, Evaluation, exact_match, greedy_answers, held_out_loss
from .export import Adapter
from .kernels.choice import GradientPath
from .memory import PeakMemory
from .model import (
    Target,
    attach_taps,
    find_targets,
    load_base,
    load_model_config,
    load_tokenizer,
    resolve_dtype,
)
from .moments import moments_of, resolve_moments
from .plan import Placement, choose_placement, empty_model
from .quantized import (
    PlainWeight,
    Quantization,
    packed_weights,
    refuse_corrupting_storage,
    resolve_quantization,
    staging_device,
)
from .spiel.algorithm import SparseFineTuning
from .spiel.delta import DeltaStore, budget
from .spiel.schedule import LearningRateSchedule, ReallocationSchedule
from .transient import TransientDeltas, attach_transient_taps

DEFAULT_MAX_LENGTH = 2048


@dataclass(frozen=True)
class Inputs:
    """What is known before any process group or weight: tokenizer, examples, model configuration, lengths."""

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
    row_tokens: int | None  # length of packed rows; None: one sequence per row

    def digests(self) -> dict[str, str]:
        """SHA-256 of the configuration and of the tokenised data: ranks that differ in them must not train together."""
        settings = hashlib.sha256(to_yaml(self.config).encode()).hexdigest()
        placement = hashlib.sha256(self.placement.name.encode()).hexdigest()
        digests = {"the configuration": settings, "base_placement": placement, "train_data": self.train.digest()}
        return digests | ({"eval_data": self.eval.digest()} if self.eval else {})

    def micro_batches(
        self, batch: Sequence[int], cluster: Cluster, *, proposing: bool = False
    ) -> Iterator[dict[str, Tensor]]:
        """A rank's micro-batches of a global batch; `proposing` where the first of them proposes candidates."""
        return batches_of_rank(
            self.train,
            batch,
            rank=cluster.rank,
            world_size=cluster.size,
            micro_batch_size=self.config.run.micro_batch_size,
            first=self.config.sparse.proposal_batch_size if proposing else None,
            keep_order=proposing,
            row_tokens=self.row_tokens,
            flat=_flat(self.config),
            pad_id=self.tokenizer.pad_token_id,
            device=cluster.device,
        )


def read_inputs(config: Config) -> Inputs:
    """Read and check everything but the weights.

    Raises:
        UserError: see `load_model_config`, `find_targets`, `budget_of`, `load_examples`; or the batch does not divide
            over the ranks.
    """
    model_config = load_model_config(config.model)
    quantization = resolve_quantization(config.model, model_config)
    data, run = config.data, config.run
    tokenizer = use_template(load_tokenizer(config.model), data.chat_template)
    world = World.from_environment()
    _check_batch(config, world.size)
    _check_targets(config, model_config, world.size)
    data = replace(data, max_length=max_length(data.max_length, model_config))
    dtype = resolve_dtype(config.model, model_config)
    placement = choose_placement(config, model_config, dtype, world, quantization)
    if quantization and placement.sharded:
        refuse_corrupting_storage(quantization, dtype)
    train = load_examples(data.train_data, "train", tokenizer, data, data.max_train_examples)
    held_out = data.eval_data and load_examples(data.eval_data, "eval", tokenizer, data, data.max_eval_examples)
    total = None if run.steps else math.ceil((run.epochs or 1) * len(train))
    order = BatchOrder(len(train), run.global_batch_size, run.seed, total)
    return Inputs(
        config=config,
        tokenizer=tokenizer,
        model_config=model_config,
        dtype=dtype,
        quantization=quantization,
        train=train,
        eval=held_out or None,
        order=order,
        steps=run.steps or order.steps(),
        placement=placement,
        row_tokens=data.max_length if data.packing else None,
    )


def max_length(wanted: int | None, model_config: Any) -> int:
    """The longest example in tokens: as asked for, or 2,048 (section 4.3) where the base has as many positions."""
    positions = getattr(model_config, "max_position_embeddings", None)
    if wanted and positions and wanted > positions:
        raise UserError(f"max_length: got {wanted}, but the base has positions for {positions} tokens only")
    return wanted or min(DEFAULT_MAX_LENGTH, positions or DEFAULT_MAX_LENGTH)


def _check_targets(config: Config, model_config: Any, ranks: int) -> None:
    """Raises UserError for targets or a budget that the base cannot have, before any weight is loaded."""
    targets = find_targets(empty_model(config, model_config), config.sparse.target_modules)
    budget_of(config, {target.name: target.shape for target in targets})
    if ranks > 1:
        refuse_experts([target.name for target in targets])


def refuse_experts(names: Sequence[str]) -> None:
    """Raises UserError for layers that some ranks' tokens may pass and others' not: ranks would wait for each other, or
    exchange the gradients of different experts."""
    expert = next((name for name in names if re.search(r"\.experts\.\d+\.", name)), None)
    if expert:
        raise UserError(
            f"target_modules: '{expert}' is one of several experts, which not every rank's tokens reach in every step; "
            "leave the experts out (target_modules), or train in one process"
        )


def _flat(config: Config) -> bool:
    """Whether packed rows go into a single one: flash attention cuts sequences only there."""
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
            "are proposed by one micro-step. Lower it, or raise micro_batch_size"
        )


@dataclass
class Session:
    """A run, ready to go: the model with its taps, the deltas, and what moves them."""

    inputs: Inputs
    cluster: Cluster
    model: nn.Module
    targets: list[Target]
    tuning: SparseFineTuning
    resident: ResidentDeltas | TransientDeltas
    learning_rate: LearningRateSchedule
    base_fingerprints: dict[str, str]  # by weight name; they let adapters with different targets be compared
    base_hash: str
    load_peak_bytes: int  # of this rank, above what it had before
    loaded_on: torch.device | None = None  # where a quantised base was quantised
    gradient_path: GradientPath | None = None  # None: every weight gradient is formed whole
    fused: bool = False  # deltas are updated and written in one pass
    step: int = 0  # optimizer steps done
    evaluations: dict[int, Evaluation] = field(default_factory=dict)  # by step
    skipped_steps: list[int] = field(default_factory=list)  # without an update: loss or gradient was no finite number
    samples: list[Answer] = field(default_factory=list)  # of the last evaluation

    def evaluate(self, *, answers: bool = False) -> Evaluation:
        """Held-out loss and, with `answers`, exact match of generated answers; there must be held-out data."""
        inputs, config = self.inputs, self.inputs.config
        size, pad = config.run.eval_batch_size, inputs.tokenizer.pad_token_id
        result = held_out_loss(self.model, inputs.eval, self.cluster, size, pad)
        matching = config.data.exact_match_examples if answers else 0
        wanted = max(matching, config.data.generation_samples)
        if not wanted:
            return result
        given = greedy_answers(
            self.model,
            inputs.tokenizer,
            inputs.eval,
            self.cluster,
            count=wanted,
            batch_size=size,
            max_new_tokens=config.data.max_new_tokens,
        )
        matched = exact_match(given[:matching], config.data.answer_pattern) if matching else None
        self.samples = given[: config.data.generation_samples]
        return Evaluation(result.loss, result.target_tokens, matched)

    def micro_batches(self, batch: Sequence[int], *, proposing: bool) -> Iterator[dict[str, Tensor]]:
        """This rank's micro-batches of a global batch; `proposing` where the first of them proposes candidates."""
        return self.inputs.micro_batches(batch, self.cluster, proposing=proposing)

    def update(self, learning_rate: float) -> None:
        """One optimizer step on all deltas; where it is fused, the weights have the new values after it."""
        if not self.fused:
            self.tuning.update(learning_rate)
            return
        from .kernels.step import update_and_write

        update_and_write(self.tuning, self.resident, learning_rate)

    def measure_kernels(self) -> list[str]:
        """Find the fastest way to each weight's gradient before the first step; says what was found."""
        path, config = self.gradient_path, self.inputs.config
        if path is None:
            return []
        rows = config.run.micro_batch_size or config.run.global_batch_size // self.cluster.size
        length = max_length(config.data.max_length, self.inputs.model_config)
        candidates = {} if config.sparse.method == "ma" else self.tuning.recorder.counts
        path.measure_store(self.tuning.store, candidates, rows * length, self.inputs.dtype)
        step = "updated and written in one pass" if self.fused else "updated, then written"
        return [f"kernels: weight gradients {path.summary()}; deltas {step}"]

    def check_packed_base(self) -> None:
        """Prove that a quantised base has still the bytes that it was loaded with.

        Raises:
            UserError: it has not; what was trained belongs to no base.
        """
        if self.inputs.quantization is None:
            return
        prints = prints_of_base(self.targets, self.cluster, self.resident)
        found = combine_fingerprints(prints, {target.name: target.shape for target in self.targets})
        if found != self.base_hash:
            raise UserError(
                f"base: its packed weights have changed during the run: their hash is {found[:16]}..., at the start it "
                f"was {self.base_hash[:16]}...; something wrote into them, and the deltas belong to no base any more"
            )

    def adapter(self) -> Adapter:
        """The present deltas, with all that is needed to use them."""
        config, store = self.inputs.config, self.tuning.store
        info = {
            "base": config.model.base,
            "revision": config.model.revision,
            "dtype": str(self.inputs.dtype).removeprefix("torch."),
            "base_hash": self.base_hash,
            "base_fingerprints": self.base_fingerprints,
            "method": config.sparse.method,
        }
        if self.inputs.quantization:
            info |= self.inputs.quantization.description(self.loaded_on)
        if config.data.chat_template:  # the base does not have it: the merged model needs it
            info["chat_template"] = self.inputs.tokenizer.chat_template
        return Adapter(
            indices={delta.name: delta.indices for delta in store},
            deltas={delta.name: delta.deltas for delta in store},
            shapes={delta.name: delta.shape for delta in store},
            info=info,
        )


def assemble(inputs: Inputs, cluster: Cluster) -> Session:
    """Load the base, choose its targets, and set up the method.

    Raises:
        UserError: the base does not load, targets match nothing, or ranks loaded different weights.
    """
    config = inputs.config
    cluster.check_identical(inputs.digests, "their inputs")
    quantization, device = inputs.quantization, cluster.load_device
    if quantization:
        device = device or staging_device(cluster.device, inputs.placement.base_bytes)
    with PeakMemory(cluster.device) as loading, cluster.loading_whole() if quantization else nullcontext():
        model = load_base(config.model, inputs.model_config, device, quantization)
    targets = find_targets(model, config.sparse.target_modules)
    shapes = {target.name: target.shape for target in targets}
    active = budget_of(config, shapes)
    path = GradientPath(cluster.device) if config.run.kernels == "auto" else None
    tuning = build_tuning(inputs, shapes, active, cluster, path)
    transient = None
    if quantization:  # before the packed weights are cut into shards
        packed = packed_weights(model, inputs.dtype, cluster.device)
        plain = {t.name: PlainWeight(t.module, t.transposed) for t in targets if t.name not in packed}
        transient = TransientDeltas(tuning.store, packed | plain, cluster.materialize)
        attach_transient_taps(transient, tuning.store.names, tuning.recorder.record_product)
    else:
        attach_taps(targets, tuning.recorder.record_product, cluster.materialize)
    model = cluster.prepare(model)
    prints = prints_of_base(targets, cluster, transient)
    base_hash = combine_fingerprints(prints, shapes)
    cluster.check_identical(lambda: {"base": base_hash}, "the base model")
    parts = {target.name: cluster.part_of(target.module.weight) for target in targets}
    if inputs.row_tokens:
        refuse_leaks(model, inputs.model_config.vocab_size, cluster.device, flat=_flat(config))
    resident = transient or ResidentDeltas(tuning.store, parts, cluster.settle, cluster.written)
    return Session(
        inputs=inputs,
        cluster=cluster,
        model=model,
        targets=targets,
        tuning=tuning,
        resident=resident,
        gradient_path=path,
        fused=path is not None and path.has_kernels and _fusible(tuning, resident),
        learning_rate=LearningRateSchedule(
            peak=config.optimizer.learning_rate,
            total_steps=inputs.steps,
            warmup_fraction=config.optimizer.warmup_fraction,
            decay=config.optimizer.lr_schedule,
        ),
        base_fingerprints={name: f"{first:016x}{second:016x}" for name, (first, second) in prints.items()},
        base_hash=base_hash,
        load_peak_bytes=loading.added,
        loaded_on=device,
    )


def _fusible(tuning: SparseFineTuning, resident: ResidentDeltas | TransientDeltas) -> bool:
    from .kernels.step import why_not

    return why_not(tuning, resident) is None


def prints_of_base(
    targets: list[Target], cluster: Cluster, transient: TransientDeltas | None
) -> dict[str, tuple[int, int]]:
    """Fingerprint of each target weight as it is now, wherever it lies; of quantised ones, of packed bytes and scales."""
    prints = cluster.fingerprints({target.name: cluster.part_of(target.module.weight) for target in targets})
    return transient.with_states(prints) if transient else prints


def budget_of(config: Config, shapes: dict[str, tuple[int, int]]) -> dict[str, int]:
    """K of each weight; a total beyond what the targets hold, or below one entry for each, is an error."""
    sparse = config.sparse
    everything, total = sum(o * i for o, i in shapes.values()), sparse.tunable_weights
    if total and not len(shapes) <= total <= everything:
        raise UserError(
            f"tunable_weights: got {total:,}, expected {len(shapes):,} to {everything:,}: the targets are {len(shapes):,} "
            f"weights of {everything:,} entries, and each gets at least one"
        )
    return budget(
        shapes,
        density=sparse.density,
        tunable_weights=sparse.tunable_weights,
        rank_equivalent=sparse.rank_equivalent,
    )


def build_tuning(
    inputs: Inputs,
    shapes: dict[str, tuple[int, int]],
    active: dict[str, int],
    cluster: Cluster,
    path: GradientPath | None = None,
) -> SparseFineTuning:
    """The method of the configuration over fresh deltas of the given budget; `path` where kernels may be used."""
    config = inputs.config
    sparse, optimizer = config.sparse, config.optimizer
    schedule = ReallocationSchedule(
        total_steps=inputs.steps,
        update_interval_steps=sparse.update_interval_steps,
        estimation_steps=sparse.estimation_steps,
        initial_replacement_fraction=sparse.initial_replacement_fraction,
        replacement_schedule=sparse.replacement_schedule,
        only_first=sparse.method == "static",
        estimates=sparse.method != "ma",
    )
    store = DeltaStore(
        shapes,
        active,
        seed=config.run.seed,
        device=cluster.device,
        cohorts=len(schedule.reallocations()),
        keep_reference=sparse.drop_criterion == "change",
        dtype=getattr(torch, sparse.delta_dtype),
    )
    return SparseFineTuning(
        store,
        method=sparse.method,
        schedule=schedule,
        betas=optimizer.betas,
        eps=optimizer.eps,
        weight_decay=optimizer.weight_decay,
        candidate_ratio=sparse.candidate_ratio,
        drop_criterion=sparse.drop_criterion,
        max_grad_norm=optimizer.max_grad_norm,
        select=cluster.select_candidates,
        moments=moments_of(resolve_moments(optimizer.moments, inputs.dtype)),
        gradient_dtype=getattr(torch, optimizer.gradient_dtype),
        products=path.products if path and path.has_kernels else None,
        keep_room=inputs.quantization is None,  # beside a dequantised copy there shall be no more than one gradient
    )
