"""From inputs to a session: the base is loaded, its targets are tapped, the method is set up."""

from __future__ import annotations

from contextlib import nullcontext

import torch

from scale_sft.data.packing import refuse_leaks
from scale_sft.distributed.cluster import Cluster
from scale_sft.kernels.autotune import GradientPath
from scale_sft.kernels.cpu import compile as native
from scale_sft.kernels.cpu import drop_grow as exchange
from scale_sft.kernels.cpu.sampled_columns import SampledColumns
from scale_sft.kernels.moments import moments_of, resolve_moments
from scale_sft.model import fused_step as step
from scale_sft.model.fingerprints import combine_fingerprints
from scale_sft.model.loading import load_base
from scale_sft.model.memory import PeakMemory
from scale_sft.model.packed_weights import PlainWeight, packed_weights
from scale_sft.model.quantization import staging_device
from scale_sft.model.resident import ResidentDeltas
from scale_sft.model.targets import attach_taps, find_targets
from scale_sft.model.transient import TransientDeltas, attach_transient_taps
from scale_sft.spiel import drop_grow as reallocate
from scale_sft.spiel.algorithm import SparseFineTuning
from scale_sft.spiel.deltas import DeltaStore
from scale_sft.spiel.recorder import Products
from scale_sft.spiel.schedules import LearningRateSchedule, ReallocationSchedule
from scale_sft.spiel.settings import Backends, Exchanges, MethodSettings

from .inputs import Inputs, budget_of, flat_rows
from .session import Session, prints_of_base


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
        refuse_leaks(model, inputs.model_config.vocab_size, cluster.device, flat=flat_rows(config))
    resident = transient or ResidentDeltas(tuning.store, parts, cluster.settle, cluster.written)
    return Session(
        inputs=inputs,
        cluster=cluster,
        model=model,
        targets=targets,
        tuning=tuning,
        resident=resident,
        gradient_path=path,
        fused=all(cluster.gather_objects(fuses(config.run.kernels, path, tuning, resident))),  # or bits would differ
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


def fuses(
    kernels: str, path: GradientPath | None, tuning: SparseFineTuning, resident: ResidentDeltas | TransientDeltas
) -> bool:
    """Whether deltas are updated and written in one pass."""
    wanted = native.asked_for(tuning.store.device, kernels) or (path is not None and path.has_kernels)
    return wanted and step.why_not(tuning, resident) is None


def _products_of(path: GradientPath | None, device: torch.device, kernels: str) -> Products | None:
    """How the entries of a weight's gradient are had; None: from the whole."""
    if path and path.has_kernels:
        return path.products
    return SampledColumns() if native.used(device, kernels) else None


def exchanges_of(device: torch.device, kernels: str) -> Exchanges:
    """Who drops and grows entries."""
    return exchange if native.used(device, kernels) else reallocate


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
    settings = MethodSettings(
        method=sparse.method,
        betas=optimizer.betas,
        eps=optimizer.eps,
        weight_decay=optimizer.weight_decay,
        candidate_ratio=sparse.candidate_ratio,
        drop_criterion=sparse.drop_criterion,
        max_grad_norm=optimizer.max_grad_norm,
    )
    backends = Backends(
        select=cluster.select_candidates,
        products=_products_of(path, cluster.device, config.run.kernels),
        exchanges=exchanges_of(cluster.device, config.run.kernels),
        moments=moments_of(resolve_moments(optimizer.moments, inputs.dtype)),
        gradient_dtype=getattr(torch, optimizer.gradient_dtype),
        reuse_buffer=inputs.quantization is None,  # next to a dequantised copy there is memory for one gradient only
    )
    return SparseFineTuning(store, settings, schedule, backends)
