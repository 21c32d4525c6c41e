"""The same run on two ranks, its base in ZeRO-3 shards: one pair of processes walks through all types.

Starting ranks takes longer than a run of two steps, so a pair is started once, and again only after something failed.
"""

from __future__ import annotations

import json
import math
import os
import traceback
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from scale_sft.distributed.world import environments_of

from .findings import FAILED, REFUSED
from .processes import Child

RANKS = 2
LOSS_TOLERANCE, DELTA_TOLERANCE, SAME_ENTRIES = 1e-4, 1e-2, 0.99
"""Relative difference of losses; norm of the difference of deltas over their norm, in the entries of both runs; share
of entries in both. Ranks sum in another order: a candidate may be as good as another, and AdamW's first steps have the
size of the learning rate even where a gradient is rounding alone."""


class Pair:
    """Two ranks that train one model after the other."""

    def __init__(self) -> None:
        self._children: list[Child] = []

    def check(self, folder: Path, options: dict[str, Any], seconds: float) -> tuple[str, str]:
        """Train the model in a folder on two ranks, and compare the run with the one that is there.

        Args:
            folder: of a `Checker` that has trained.
            options: of that run, where they differ from `options_of`.
            seconds: time for it.

        Returns:
            The cell of the table, and a remark.
        """
        from .checks import options_of

        shards = {"base_placement": "shard", "ds_config": "ds_configs/zero3_cpu.json"}
        given = options_of(folder, **options, **shards, output_dir=str(folder / "ranks"))
        answers = self._train(given, seconds)
        if any(answers):
            self.stop()
            trouble = next(filter(None, answers))
            return (REFUSED, trouble.partition(" ")[2]) if trouble.startswith(REFUSED) else (trouble, "")
        if options.get("allow_randomness"):  # its runs differ anyway
            return "trains", ""
        return _compare(folder / "run", folder / "ranks"), ""

    def _train(self, options: dict[str, Any], seconds: float) -> list[str]:
        """Run the options on both ranks; returns what went wrong on each, if anything."""
        if not self._children:
            self._children = [Child(_serve, environment) for environment in environments_of(RANKS)]
        for child in self._children:
            child.send(options)
        answers: list[str] = []
        for child in self._children:
            answers.append(child.answer(seconds, late="") if not any(answers) else child.answer(5, late=""))
        if not any(answers) and not all(child.answered for child in self._children):
            return [f"{FAILED}: took more than {seconds} s"]
        return answers

    def stop(self) -> None:
        """End both ranks."""
        for child in self._children:
            child.stop()
        self._children = []


def _serve(pipe: Any, environment: dict[str, str]) -> None:
    """Join the other rank, and train what the pipe asks for: answers "" or what went wrong."""
    os.environ.update(environment)
    import torch

    from scale_sft.config.loading import load
    from scale_sft.distributed.cluster import Cluster, forget_parents_ranks
    from scale_sft.errors import UserError, first_line
    from scale_sft.train import run_on
    from scale_sft.training import lifecycle
    from scale_sft.training.inputs import read_inputs
    from scale_sft.training.run_folder import RunFolder

    forget_parents_ranks()
    lifecycle.write_report = lambda output_dir: output_dir / "report.html"
    cluster: Cluster | None = None
    while True:
        config = load(None, pipe.recv())
        try:
            with cluster.loading_whole() if cluster else nullcontext():  # inputs are read before a run has ranks
                inputs = read_inputs(config)
            if cluster is None:
                cluster = Cluster.start(
                    sharded=True, dtype=torch.float32, ds_config=config.model.ds_config, timeout_seconds=600
                )
            run_on(cluster, inputs, RunFolder(config.run.output_dir))
            pipe.send("")
        except UserError as error:
            pipe.send(f"{REFUSED} {error}")
        except Exception as error:
            traceback.print_exc()
            pipe.send(f"{FAILED}: {type(error).__name__}: {first_line(error)}")


def _compare(alone: Path, together: Path) -> str:
    """Compare the losses and adapters of two runs: "yes", the share of entries that both have, or what is wrong."""
    from scale_sft.adapters.format import Adapter

    for a, b in zip(_losses(alone), _losses(together), strict=True):
        if abs(a - b) > LOSS_TOLERANCE * abs(a):
            return f"{FAILED}: loss {b:.6g} instead of {a:.6g}"
    one, other = Adapter.load(alone / "adapter"), Adapter.load(together / "adapter")
    if one.shapes != other.shapes:
        return f"{FAILED}: the adapter has other weights"
    shared, apart, size = 0, 0.0, 0.0
    for name in one.shapes:
        first, second = (_entries(adapter, name) for adapter in (one, other))
        both = first.keys() & second.keys()
        shared += len(both)
        apart += sum((first[index] - second[index]) ** 2 for index in both)
        size += sum(first[index] ** 2 for index in both)
    share, difference = shared / max(1, one.active()), math.sqrt(apart / size) if size else 0.0
    if share < SAME_ENTRIES or difference > DELTA_TOLERANCE:
        return f"{FAILED}: {share:.1%} of the entries are the same, their deltas differ by {difference:.1e}"
    return "yes" if share == 1 else f"yes ({share:.1%})"


def _losses(run: Path) -> list[float]:
    records = map(json.loads, (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines())
    return [record["loss"] for record in records if record["event"] == "step"]


def _entries(adapter: Any, name: str) -> dict[int, float]:
    """Return the deltas of a weight by place."""
    return dict(zip(adapter.indices[name].tolist(), adapter.deltas[name].float().tolist(), strict=True))
