"""Compare the quality of ways of fine-tuning, with the same base, data, batches and number of trained weights.

On each task every contestant tries its grid of learning rates with the first seed. The best rate is the one with the
lowest loss on examples kept out of the training data; where it is the first or the last of the grid, the grid grows.
Then the contestant runs at that rate with the other seeds. The reported figures are on the held-out data, which are not
used for any choice. Each finished run is a row, and is not repeated.
"""

from __future__ import annotations

import dataclasses
import json
import os
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from scale_sft.bench.pool import Pool
from scale_sft.bench.rows import Results, read_rows
from scale_sft.config.options import MAY_CHANGE, ConfigError
from scale_sft.errors import UserError

from .contestants import BASE, Contestant
from .page import part
from .search import MORE_RUNGS, Search
from .summary import Row, groups_of, present, reason_of, result_of, settings_key, summaries
from .table import Table, csv_of, tables_of
from .tasks import Retained, Task, retained_by, retained_examples
from .worker import Job, run_job, split

__all__ = ["Settings", "measure", "part", "report", "write_csv"]

BENCHMARK = "quality"
DEFAULTS = {"dtype": "float32", "steps": 150, "global_batch_size": 16, "rank_equivalent": 2}
"""Options without a recipe; float32 keeps rounding out of the comparison."""
DEMO_DEFAULTS = {"eval_data": "demo", "exact_match_examples": 256, "eval_batch_size": 64}
"""Further options if no other training data are given either."""

_OF_ONE_RUN = {"method", "learning_rate", "seed"}
_COUNTED = {"base", "revision", "train_data", "eval_data", "steps", "target_modules", "chat_template", "answer_pattern"}
_COUNTED |= {"rank_equivalent", "micro_batch_size", "warmup_fraction"}


@dataclass(frozen=True, kw_only=True)
class Settings:
    """The contestants, and the configuration they share.

    Args:
        contestants: the ways of training.
        recipe: the base of the configuration; None: the demo.
        options: of the configuration, over the recipe.
        seeds: runs at the best rate.
        validation_examples: of the training data, kept out to choose the rates.
        tasks: what to learn, one after the other.
        retained: further data to measure the loss on.
        more_rungs: how many rates each grid may grow by.
    """

    contestants: Sequence[Contestant]
    recipe: str | None
    options: Mapping[str, Any]
    seeds: int
    validation_examples: int
    tasks: Sequence[Task] = (Task(),)
    retained: Sequence[Retained] = ()
    more_rungs: int = MORE_RUNGS

    def job(self, task: Task, contestant: Contestant, learning_rate: float | None = None, seed: int = 0) -> Job:
        given = {name: value for name, value in self.options.items() if value is not None}
        defaults: Mapping[str, Any] = {} if self.recipe else DEFAULTS
        if not self.recipe and "train_data" not in {**given, **task.options}:
            defaults = {**DEFAULTS, **DEMO_DEFAULTS}
        return Job(
            contestant=contestant,
            learning_rate=learning_rate,
            seed=seed,
            recipe=self.recipe,
            options={**defaults, **given, **task.options},
            validation_examples=self.validation_examples,
            retained=retained_by(task, self.tasks, self.retained),
            task=task.name,
        )


def measure(settings: Settings, folder: Path, *, processes: int, say: Callable[[str], None]) -> list[Row]:
    """Do all runs that are not in `folder` yet, adding their rows; returns all rows of these settings.

    Args:
        settings: what to compare.
        folder: of the rows.
        processes: number of simultaneous runs, which share the cores or the GPU; 1: in this process.
        say: called with a line for every finished run.

    Raises:
        UserError: base, data, options or PEFT are invalid; nothing has run.
    """
    shared = {task.name: _checked(settings, task) for task in settings.tasks}
    campaign = _Campaign(settings, shared, Results(folder, BENCHMARK), _known(folder), say)
    campaign.begin()
    with Pool(run_job, processes=processes, threads=threads_of(processes)) as pool:
        for job, result in pool.results(campaign.waiting):
            campaign.finish(job, result, processes)
    return [row for row in campaign.rows.values() if row is not None]


def report(rows: Sequence[Row]) -> list[tuple[str, list[tuple[str, Table]], list[str]]]:
    """Make for each task its name, its tables with their titles, and remarks on them."""
    found = []
    for group in reversed(groups_of(rows)):
        every = summaries(group)
        remarks = [remark for summary in every if (remark := summary.remark()) is not None]
        remarks += [
            f"{summary.name}: learning rate {rate:g}: {why}"
            for summary in every
            if summary.best_rate is not None
            for rate, why in summary.failures.items()
        ]
        found.append((group[-1]["settings"]["shared"].get("task", ""), tables_of(group), remarks))
    return found


def write_csv(folder: Path) -> Path:
    """Write the tables of all rows in a folder as quality.csv; returns its path."""
    from scale_sft.files import write_text

    path = Path(folder) / f"{BENCHMARK}.csv"
    write_text(path, csv_of(read_rows(folder, BENCHMARK)))
    return path


def default_processes() -> int:
    """Choose the number of processes: the cores, at most 4; one on a GPU."""
    import torch

    return 1 if torch.cuda.is_available() else min(4, _cores())


def threads_of(processes: int) -> int | None:
    """Choose the number of torch's threads in each of several processes; None for a single one."""
    return max(1, _cores() // processes) if processes > 1 else None


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _checked(settings: Settings, task: Task) -> dict[str, Any]:
    """Check everything before the first run, and return the settings that all runs of a task share; see `measure`."""
    from scale_sft.training.inputs import read_inputs

    if any(contestant.kind.startswith("peft") for contestant in settings.contestants):
        from .peers import require_peft

        require_peft()
    first = settings.job(task, BASE)
    config = first.config()
    for option, value in (("--rank", config.sparse.rank_equivalent), ("--steps", config.run.steps)):
        if value is None:
            raise UserError(f"{option}: needed, as {settings.recipe} does not set it: it must be the same for all")
    if config.sparse.start_from:
        raise UserError(
            f"start_from: got {config.sparse.start_from}, expected none: peers cannot start from a sparse adapter. "
            "Fix: leave it out of the recipe"
        )
    for contestant in settings.contestants:
        try:
            for rate in contestant.learning_rates:
                settings.job(task, contestant, rate).config()
        except ConfigError as error:
            raise ConfigError(f"{contestant.name}: {error}") from None
    inputs = read_inputs(config)  # also tokenises the data, once for all processes
    split(inputs, settings.validation_examples)
    options = {
        name: value
        for section in dataclasses.asdict(inputs.config).values()
        for name, value in section.items()
        if name not in _OF_ONE_RUN and (name in _COUNTED or name not in MAY_CHANGE)
    }
    digests = {
        "train_digest": inputs.train.digest()[:16],
        "eval_digest": inputs.eval.digest()[:16] if inputs.eval else "",
    }
    more: dict[str, Any] = {"task": task.name} if task.name else {}
    if first.retained:
        more["retained"] = {one.name: retained_examples(one, inputs).digest()[:16] for one in first.retained}
    return _plain({**options, **digests, "validation_examples": settings.validation_examples, **more})


def _plain(value: Any) -> Any:
    """Return the value as it reads back from JSON."""
    return json.loads(json.dumps(value))


def _known(folder: Path) -> dict[str, Row]:
    """Index rows by settings, without those of crashed runs, which are tried again."""
    rows = map(present, read_rows(folder, BENCHMARK))
    return {settings_key(row["settings"]): row for row in rows if "crashed" not in row["result"]}


@dataclass
class _Campaign:
    """All runs of an invocation: those waiting, and the rows of those done."""

    settings: Settings
    shared: Mapping[str, Mapping[str, Any]]  # by task
    results: Results
    known: Mapping[str, Row]
    say: Callable[[str], None]
    waiting: deque[Job] = field(default_factory=deque)
    rows: dict[str, Row | None] = field(default_factory=dict, init=False)  # by settings, in the order of planning
    searches: dict[tuple[str, str], Search] = field(default_factory=dict, init=False)  # by task and contestant
    old: int = field(default=0, init=False)  # runs that earlier invocations have done

    def begin(self) -> None:
        """Plan the base and all grids, a rate of each contestant after the other."""
        for task in self.settings.tasks:
            self._add(self.settings.job(task, BASE))
            grids = []
            for contestant in self.settings.contestants:
                if contestant.trains:
                    search = Search(
                        contestant.name, contestant.learning_rates, self.settings.seeds, self.settings.more_rungs
                    )
                    self.searches[task.name, contestant.name] = search
                    grids.append([(contestant, *run) for run in search.begin()])
            for n in range(max(map(len, grids), default=0)):
                for grid in grids:
                    for contestant, rate, seed in grid[n : n + 1]:
                        self._add(self.settings.job(task, contestant, rate, seed))
        if self.old:
            self.say(f"{self.old} of {len(self.rows)} runs are done already")

    def finish(self, job: Job, result: Any, processes: int) -> None:
        """Store the row of a run that the pool has done, and plan what follows from it."""
        row = self.results.add(self._settings(job), **result_of(result), processes=processes)
        done = sum(row is not None for row in self.rows.values()) + 1 - self.old
        self.say(f"[{done}/{len(self.rows) - self.old}] {_line(row)}")
        self._take(job, row)

    def _add(self, job: Job) -> None:
        key = settings_key(self._settings(job))
        if key in self.rows:
            return
        self.rows[key] = None
        if key in self.known:
            self.old += 1
            self._take(job, self.known[key])
        else:
            self.waiting.append(job)

    def _take(self, job: Job, row: Row) -> None:
        self.rows[settings_key(self._settings(job))] = row
        if job.learning_rate is None:
            return
        search = self.searches[job.task, job.contestant.name]
        more, told = search.finish((job.learning_rate, job.seed), row["result"].get("validation_loss"))
        if told:
            self.say(f"{job.task}: {told}" if job.task else told)
        for rate, seed in more:
            self._add(dataclasses.replace(job, learning_rate=rate, seed=seed))

    def _settings(self, job: Job) -> dict[str, Any]:
        return {
            "shared": self.shared[job.task],
            "method": job.contestant.name,
            "kind": job.contestant.kind,
            "options": dict(job.contestant.options),
            "learning_rate": job.learning_rate,
            "seed": job.seed,
        }


def _line(row: Row) -> str:
    settings, result = row["settings"], row["result"]
    task = settings["shared"].get("task")
    who = f"{task}: {settings['method']}" if task else settings["method"]
    if settings["learning_rate"] is not None:
        who += f"  rate {settings['learning_rate']:g}  seed {settings['seed']}"
    why = reason_of(result)
    if why is not None:
        return f"{who}  failed: {why}"
    match = f"  exact match {result['exact_match']:.1%}" if "exact_match" in result else ""
    match += "".join(f"  {name} loss {loss:.4f}" for name, loss in result.get("retained", {}).items())
    seconds = f"  {result['seconds']:.1f} s" if "seconds" in result else ""
    losses = f"validation loss {result['validation_loss']:.4f}  held-out loss {result['held_out_loss']:.4f}"
    return f"{who}  {losses}{match}{seconds}"
