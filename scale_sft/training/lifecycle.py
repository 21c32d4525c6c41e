"""The start and the end of a run: its description; its adapter, report, merged model and summary."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from scale_sft.adapters.merge import merge
from scale_sft.adapters.model_card import write_card
from scale_sft.data.examples import Examples
from scale_sft.data.preferences import Preferences
from scale_sft.evaluation.held_out import Evaluation
from scale_sft.model.experts import layer_kind
from scale_sft.model.visibility import visible_fraction
from scale_sft.reporting.metrics import Metrics, NullMetrics
from scale_sft.reporting.run_report import write_report
from scale_sft.spiel.budgets import equivalent_rank
from scale_sft.spiel.selection.spread import FRACTIONS, batches, profiles_together

from .best import best_step
from .inputs import Inputs
from .run_folder import RunFolder
from .session import Session


def open_metrics(session: Session, run: RunFolder) -> Metrics | NullMetrics:
    """Open the record of the run on the main rank; elsewhere return one that does nothing."""
    if not session.cluster.is_main:
        return NullMetrics()
    import dataclasses

    config = session.inputs.config
    settings = {key: value for section in dataclasses.asdict(config).values() for key, value in section.items()}
    return Metrics(
        run.path,
        total_steps=session.inputs.steps,
        first_step=session.step,
        log_every_steps=config.run.log_every_steps,
        track=session.cluster.tracking("tracker", settings),
        held_out=[session.evaluations[step].loss for step in sorted(session.evaluations)],
    )


def describe(session: Session, metrics: Metrics | NullMetrics) -> None:
    """Print what will be trained, on which data, with how much memory."""
    inputs, config, store = session.inputs, session.inputs.config, session.tuning.store
    entries = sum(target.numel for target in session.targets)
    load_peaks = session.cluster.gather_objects(session.load_peak_bytes)
    for line in [*session.cluster.introduce(inputs.placement.name), *inputs.notes]:
        metrics.note(line)
    state_bytes = sum(session.tuning.state_bytes().values()) + session.resident.bytes
    held_out = f", {len(inputs.eval):,} held out" if inputs.eval else ""
    unit, units = ("pairs", "pairs") if config.objective.pairs else ("examples", "sequences")
    rows = {
        "base": f"{config.model.base} ({str(inputs.dtype).removeprefix('torch.')}{_kept(inputs)})",
        **(
            {"start": f"{inputs.start.folder} (its deltas are in the model, optimizer state is fresh)"}
            if inputs.start
            else {}
        ),
        "placement": f"{inputs.placement.name} ({inputs.placement.reason})",
        "loading": f"{max(load_peaks) / 2**20:,.0f} MiB at the peak, on the rank with most",
        "method": config.sparse.method,
        **({"granularity": f"whole {kind}s"} if (kind := config.sparse.trains_whole) != "entry" else {}),
        "active entries": f"{store.active:,} of {entries:,} in {len(store)} weights ({store.active / entries:.2%})",
        "block weights": inputs.coverage.line(),
        "attention": inputs.attention.name,
        "delta state": f"{state_bytes / 2**20:.1f} MiB ({state_bytes / store.active:.1f} bytes per active entry)",
        "learning rate": _rates(session),
        **_objective(session),
        "data": f"{len(inputs.train):,} {unit} from {inputs.train.source}{held_out}{_cut(inputs.train)}",
        "steps": f"{inputs.steps} of {config.run.global_batch_size} {units}, reallocation at "
        f"{len(session.tuning.schedule.reallocations())} of them",
    }
    metrics.describe("sparse fine-tuning", rows, _kinds(session))


def _kept(inputs: Inputs) -> str:
    """Say how a quantised base is kept, and what was not done to it."""
    if inputs.quantization is None:
        return ""
    return f"; linear layers in {inputs.quantization}, nothing raised to float32"


def _rates(session: Session) -> str:
    """Describe the learning rates, and what the peak follows if none is given."""
    sparse, given = session.sparse, session.inputs.config.optimizer.learning_rate
    rank = equivalent_rank(session.tuning.store.active, sparse.shapes.values())
    why = f" (for as many entries as LoRA of rank {rank:.3g} has parameters)" if given is None else ""
    rates = sparse.learning_rates
    rising = f"{rates.warmup_steps} step{'s' * (rates.warmup_steps != 1)} of warm-up"
    return f"{rates.peak:g} at its peak{why}; {rising}, then {rates.decay}{' decay' * (rates.decay != 'constant')}"


def _objective(session: Session) -> dict[str, str]:
    """Describe a preference objective and its reference."""
    given, inputs = session.inputs.config.objective, session.inputs
    if not given.is_preference:
        return {}
    of_what = f"base + {inputs.reference.folder}" if inputs.reference else "the base"
    kinds = {"none": "no reference", "swapped": f"reference: {of_what}, swapped in each step"}
    kinds["precomputed"] = f"reference: {of_what}, measured once"
    smoothed = f", label_smoothing {given.label_smoothing:g}" if given.label_smoothing else ""
    sft = f", sft_weight {given.weight_of_sft:g}" if given.weight_of_sft else ""
    return {"objective": f"{given.objective}, beta {given.beta:g}{smoothed}{sft}; {kinds[given.reference_kind]}"}


def _rewards(before: Evaluation, after: Evaluation) -> dict[str, str]:
    """Compare held-out accuracy and margin before and after."""
    if before.rewards is None or after.rewards is None:
        return {}
    shown = {"reward_accuracy": ("held-out accuracy", "{:.1%}"), "reward_margin": ("held-out margin", "{:.3f}")}
    return {
        label: f"{form.format(before.rewards[name])} before, {form.format(after.rewards[name])} after"
        for name, (label, form) in shown.items()
        if name in before.rewards
    }


def _cut(examples: Examples) -> str:
    """Count the training examples that max_length cut, and those that were dropped."""
    if isinstance(examples, Preferences):
        reasons = "".join(f"; {count:,} dropped: {reason}" for reason, count in examples.drops.items())
        return (f"; {examples.truncated:,} answers cut to max_length" if examples.truncated else "") + reasons
    if not examples.truncated + examples.dropped:
        return ""
    return f"; {examples.truncated:,} cut to max_length, {examples.dropped:,} dropped (no target token left)"


def _kinds(session: Session) -> list[dict[str, str]]:
    """Make one row per kind of layer and shape."""
    kinds: dict[tuple[str, tuple[int, int]], list[str]] = {}
    for target in session.targets:
        kinds.setdefault((layer_kind(target.name), target.shape), []).append(target.name)
    rows = []
    for (leaf, shape), names in kinds.items():
        active = sum(session.tuning.store[name].active for name in names)
        size = len(names) * shape[0] * shape[1]
        rows.append(
            {
                "layer": leaf,
                "count": str(len(names)),
                "shape": f"{shape[0]} x {shape[1]}",
                "active": f"{active:,}",
                "density": f"{active / size:.2%}",
            }
        )
    return rows


def finish(session: Session, metrics: Metrics | NullMetrics, run: RunFolder) -> None:
    """Save the adapter, the report and, if asked for, the merged model; print a summary."""
    cluster, config = session.cluster, session.inputs.config
    cluster.check_identical(session.tuning.digests, "the deltas at the end")
    session.check_packed_base()
    session.visible_fraction = visible_fraction(session.sparse)
    if warning := _vanishing(session):
        metrics.note(warning)
    cluster.on_main(lambda: run.save_adapter(session.adapter()))
    metrics.summary(**_totals(session))
    written: dict[str, Path] = {"adapter": run.adapter}

    def write_the_rest() -> None:
        if config.run.save_merged:
            written["merged model"] = merge(run.adapter, run.merged)
        write_card(run.adapter)
        written["report"] = write_report(run.path)

    with cluster.loading_whole():  # merging loads a quantised base once more
        cluster.on_main(write_the_rest)
    start = session.inputs.start
    rows: dict[str, Any] = {"started from": start.folder} if start else {}
    of_what = " (base + that adapter)" if start else ""
    before, after = session.evaluations.get(0), session.evaluations.get(session.step)
    if before and after:
        rows["held-out loss"] = f"{before.loss:.4f} before{of_what}, {after.loss:.4f} after"
        if after.exact_match is not None:
            rows["exact match"] = f"{before.exact_match:.1%} before{of_what}, {after.exact_match:.1%} after"
        rows |= _rewards(before, after)
        best_by = config.objective.best_by
        best = best_step(session.evaluations, best_by)
        if best != session.step:
            kept = f": {run.best}" if run.best.exists() else ""
            found = session.evaluations[best]
            value = found.loss if best_by == "loss" else (found.rewards or {})["reward_accuracy"]
            rows[f"best held-out {best_by}"] = f"{value:.4f} after step {best}{kept}"
    rows |= {name: str(path) for name, path in written.items()}
    metrics.describe("done", rows)


_MOST_VISIBLE = 0.9


def _vanishing(session: Session) -> str | None:
    """Warn of deltas that vanish in the merged model, if it rounds to bfloat16."""
    visible = session.visible_fraction
    rounds = session.inputs.dtype is torch.bfloat16 or session.inputs.quantization is not None
    if visible is None or visible >= _MOST_VISIBLE or not rounds:
        return None
    return (
        f"warning: {1 - visible:.0%} of the deltas are smaller than half a bfloat16 step of their weight and vanish in "
        "the merged model. Fix: raise learning_rate or train longer"
    )


def _totals(session: Session) -> dict[str, Any]:
    """Count entries by cohort and measure the deltas of each weight, for the report."""
    store, cohorts = session.tuning.store, len(session.tuning.cohort_steps)
    spread: dict[str, tuple[list[float], list[float]]] = {}
    for names in batches({one.name: one.shape for one in store}, {one.name: one.active for one in store}):
        found = profiles_together([store[name].indices for name in names], store[names[0]].shape)
        spread |= dict(zip(names, found, strict=True))
    per_weight = {
        delta.name: {
            "active": delta.active,
            "numel": delta.numel,
            "cohort_counts": torch.bincount(delta.cohort.int(), minlength=cohorts).tolist(),
            "l2_delta": float(torch.linalg.vector_norm(delta.deltas)),
            "max_abs_delta": float(delta.deltas.abs().max()),
            **dict(zip(("spread_rows", "spread_columns"), spread[delta.name], strict=True)),
        }
        for delta in store
    }
    return {
        "learning_rate": session.sparse.learning_rates.peak,
        "load_peak_bytes": session.load_peak_bytes,
        "active": store.active,
        "visible_in_bfloat16": f"{session.visible_fraction:.1%} of the deltas",
        "spread_fractions": list(FRACTIONS),
        "cohort_steps": session.tuning.cohort_steps,
        "cohort_counts": store.cohort_counts(cohorts),
        "per_weight": per_weight,
    }
