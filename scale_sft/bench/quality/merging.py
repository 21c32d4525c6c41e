"""Add the updates of two tasks: what the sum still knows of each, for sparse deltas and for their alternatives.

Both adapters start from the same base and are trained apart, each at its best rate. Their sum is the base plus both
updates, as `scale-sft add` and a merge make it for ours, and as merging both makes it for LoRA.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from scale_sft.bench.page import Part, Table
from scale_sft.bench.rows import Row, newest
from scale_sft.errors import UserError

from .contestants import BASE
from .intervals import Figure
from .summary import short_name
from .table import LOSS, MISSING
from .worker import Job, loss_on, split, train_one

BENCHMARK = "merging"
SAMENESS = ("shared", "tasks")
"""Settings that the rows of one table have in common."""


@dataclass(frozen=True)
class MergeJob:
    """One contestant on two tasks; without training (the base) only the losses are measured."""

    first: Job
    second: Job


def run_merge(job: MergeJob) -> dict[str, Any]:
    """Train on each task, add both updates to the base, and measure the held-out losses of both tasks.

    Returns:
        alone: the loss on each task of the model trained on it; merged: of the sum. Of the base both are its losses.
    """
    import torch

    from scale_sft.distributed.cluster import Cluster
    from scale_sft.model.loading import load_base
    from scale_sft.training.inputs import read_inputs

    total: dict[str, torch.Tensor] = {}
    alone = []
    inputs = [split(read_inputs(one.config()), one.validation_examples)[0] for one in (job.first, job.second)]
    with Cluster.start(sharded=False, dtype=inputs[0].dtype) as cluster:
        try:
            for one, own in zip((job.first, job.second), inputs, strict=True):
                trained, _ = train_one(one.contestant, replace(own, eval=None), cluster)
                alone.append(loss_on(trained.model, own.eval, own, cluster))
                for update in trained.updates() if trained.updates else ():
                    change = update.change.cpu()
                    total[update.name] = total[update.name] + change if update.name in total else change
                del trained
        except UserError as error:
            return {"failed": str(error).split(";")[0]}
        config = inputs[0].config.model
        model = load_base(config, inputs[0].model_config, cluster.device, inputs[0].quantization)
        add_updates(model, total)
        merged = [loss_on(model, own.eval, own, cluster) for own in inputs]
    if not all(map(math.isfinite, [*alone, *merged])):
        return {"failed": f"the losses are {alone} alone and {merged} in the sum"}
    return {"alone": alone, "merged": merged}


def add_updates(model: Any, updates: dict[str, Any]) -> None:
    """Add updates (fp32, by weight name) to the weights of a model, rounding once.

    Raises:
        UserError: a weight is quantised.
    """
    import torch

    from scale_sft.model.experts import weight_named

    with torch.no_grad():
        for name, change in updates.items():
            weight = weight_named(model, name)
            if not weight.is_floating_point():
                raise UserError(f"merging: got '{name}' in 4 or 8 bits, expected a base that is not quantised")
            weight.copy_(weight.float() + change.reshape(weight.shape).to(weight.device))


def part(rows: Sequence[Row]) -> Part:
    """Show a table for each base and pair of tasks, of the newest row of each run."""
    tables = []
    for group in grouped(newest(rows)):
        settings = group[-1]["settings"]
        first, second = settings["tasks"]
        columns = [
            "method",
            "seeds",
            f"{first} alone",
            f"{first} in sum",
            f"{second} alone",
            f"{second} in sum",
            "lost",
        ]
        lines = [_line(name, group) for name in dict.fromkeys(row["settings"]["method"] for row in group)]
        title = f"{first} + {second} on {short_name(settings['shared'][0]['base'])}"
        tables.append(Table(columns, lines, sources=group, title=title))
    text = (
        "Two adapters of one base, each trained on one task at its best rate, and their sum. Held-out losses: mean "
        "over the seeds and its 95 % confidence interval. Lost is what the sum loses compared with each adapter alone, "
        "mean of both tasks; the smaller, the less the two disturb each other."
    )
    return Part(title="Merging: two adapters added", text=text, tables=tables)


def grouped(rows: Sequence[Row]) -> list[list[Row]]:
    """Group rows that differ in method, rates and seed alone."""
    groups: dict[str, list[Row]] = {}
    for row in rows:
        groups.setdefault(repr([row["settings"].get(key) for key in SAMENESS]), []).append(row)
    return list(groups.values())


def _line(name: str, group: Sequence[Row]) -> list[str]:
    found = [row["result"] for row in group if row["settings"]["method"] == name and "merged" in row["result"]]
    cells = []
    for place in (0, 1):
        for key in ("alone", "merged"):
            cells.append(LOSS.cell(Figure.of([result[key][place] for result in found])))
    lost = [sum(result["merged"]) / 2 - sum(result["alone"]) / 2 for result in found]
    return [name, str(len(found)), *cells, MISSING if name == BASE.name else LOSS.cell(Figure.of(lost))]
