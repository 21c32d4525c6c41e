"""Merge and unmerge an adapter again and again in bfloat16: how far the base moves.

Ways to unmerge:
    subtract  take the update off again, as PEFT's `unmerge_adapter` does: weights and updates are rounded
    restore   write the stored base values back, as `LiveAdapter` and `scale-sft unmerge` do
Shapes: O rows, I columns of a weight; K active entries.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from scale_sft.bench.page import Part, Table
from scale_sft.bench.rows import Row, newest
from scale_sft.errors import UserError
from scale_sft.model.experts import weight_named
from scale_sft.model.resident import effective_values, read_entries, write_entries

from .merging import grouped
from .summary import short_name
from .worker import Job, loss_on, split, train_one

BENCHMARK = "drift"
CYCLES = 1000


@dataclass(frozen=True)
class DriftJob:
    """One contestant, trained and then merged and unmerged `cycles` times."""

    job: Job
    cycles: int = CYCLES


def run_drift(job: DriftJob) -> dict[str, Any]:
    """Train, then merge and unmerge the update on the base in bfloat16.

    Returns:
        base_loss: held-out loss of the base in bfloat16; ways: for each way to unmerge, see `_result`.
    """
    from scale_sft.distributed.cluster import Cluster
    from scale_sft.model.loading import load_base
    from scale_sft.training.inputs import read_inputs

    inputs, _ = split(read_inputs(job.job.config()), job.job.validation_examples)
    with Cluster.start(sharded=False, dtype=inputs.dtype) as cluster:
        try:
            trained, _ = train_one(job.job.contestant, replace(inputs, eval=None), cluster)
        except UserError as error:
            return {"failed": str(error).split(";")[0]}
        assert trained.updates is not None, job
        changes = {update.name: update.change.cpu() for update in trained.updates()}
        del trained
        ways = {"subtract": subtracted}
        if job.job.contestant.kind == "ours":
            ways["restore"] = restored
        model = load_base(inputs.config.model, inputs.model_config, cluster.device, None).to(torch.bfloat16)
        found: dict[str, Any] = {"base_loss": loss_on(model, inputs.eval, inputs, cluster), "ways": {}}
        weights = {name: weight_named(model, name) for name in changes}
        bases = {name: weight.clone() for name, weight in weights.items()}
        for way, cycle in ways.items():
            settled = 0
            for name, weight in weights.items():
                after, cycles = cycle(bases[name], changes[name].to(weight.device), job.cycles)
                weight.copy_(after)
                settled = max(settled, cycles)
            found["ways"][way] = _result(weights, bases, changes) | {
                "cycles_that_changed": settled,
                "loss": loss_on(model, inputs.eval, inputs, cluster),
            }
    return found


def subtracted(base: Tensor, change: Tensor, cycles: int) -> tuple[Tensor, int]:
    """Add a change [O, I] to a weight [O, I], rounding the sum, and subtract the rounded change, as PEFT's LoRA does.

    A cycle that changes nothing ends the loop: each one that follows would change nothing either.

    Returns:
        The weight after `cycles` cycles, and how many of them changed it.
    """
    weight, change = base.clone(), change.reshape(base.shape)
    rounded = change.to(base.dtype)
    for cycle in range(cycles):
        before = weight.clone()
        weight += change
        weight -= rounded
        if torch.equal(weight, before):
            return weight, cycle
    return weight, cycles


def restored(base: Tensor, change: Tensor, cycles: int) -> tuple[Tensor, int]:
    """Write effective values at the entries of a change [O, I], and the stored base values back.

    As in `subtracted`, a cycle that changes nothing ends the loop.

    Returns:
        The weight after `cycles` cycles, and how many of them changed it.
    """
    weight = base.clone()
    entries, flat = weight.view(-1), change.reshape(-1)
    indices = flat.nonzero().view(-1)
    stored, deltas = read_entries(entries, indices), flat[indices]
    for cycle in range(cycles):
        before = weight.clone()
        write_entries(entries, indices, effective_values(stored, deltas))
        write_entries(entries, indices, stored)
        if torch.equal(weight, before):
            return weight, cycle
    return weight, cycles


def _result(
    weights: Mapping[str, Tensor], bases: Mapping[str, Tensor], changes: Mapping[str, Tensor]
) -> dict[str, float]:
    """Measure how far weights are from where they were: over all weights, in shares and relative to the update."""
    moved = entries = distance = size = 0.0
    for name, weight in weights.items():
        difference = weight.float() - bases[name].float()
        moved += int((difference != 0).sum())
        entries += int((changes[name] != 0).sum())
        distance += float(difference.double().square().sum())
        size += float(changes[name].double().square().sum())
    return {"moved_fraction": moved / max(1.0, entries), "relative_distance": (distance / max(size, 1e-300)) ** 0.5}


def part(rows: Sequence[Row]) -> Part:
    """Show a table for each base and task, of the newest row of each run."""
    columns = ("method", "unmerged by", "entries moved", "distance / update", "cycles that changed", "change of loss")
    tables = []
    for group in grouped(newest(rows)):
        settings = group[-1]["settings"]
        lines = [
            [
                row["settings"]["method"],
                {"subtract": "subtraction", "restore": "stored values"}[way],
                f"{100 * result['moved_fraction']:.2f} %",
                f"{result['relative_distance']:.2g}",
                f"{result['cycles_that_changed']:,}",
                f"{result['loss'] - row['result']['base_loss']:+.6f}",
            ]
            for row in group
            for way, result in row["result"].get("ways", {}).items()
        ]
        (task,), base = settings["tasks"], short_name(settings["shared"][0]["base"])
        title = f"{task or 'the task'} on {base}, {settings['cycles']:,} cycles"
        tables.append(Table(columns, lines, sources=group, title=title))
    text = (
        "Each adapter is trained at its best rate, then merged into the base in bfloat16 and unmerged, again and "
        "again. Subtraction adds the update and takes the rounded one off, as PEFT's LoRA does; "
        "it settles once rounding has nothing left to lose. Stored values are what this package keeps: the base value "
        "of each active entry, written back. Entries moved are those that differ from the base afterwards, of those "
        "that the update changes; the distance is the norm of the difference, relative to that of the update. The "
        "change of loss is that of the unmerged model, compared with the base."
    )
    return Part(title="Drift: merged and unmerged in bfloat16", text=text, tables=tables)
