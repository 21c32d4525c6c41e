"""Compare the quality of ways of fine-tuning, with the same base, data, batches and number of trained weights.

First every contestant tries its grid of learning rates with the first seed; the best rate is the one with the lowest
loss on examples kept out of the training data. Then it runs at that rate with the other seeds. The reported loss is on
the held-out data, which are not used for any choice. Each finished run is a row, and is not repeated.
"""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from scale_sft.bench.pool import Pool
from scale_sft.bench.rows import Results, read_rows
from scale_sft.config.options import MAY_CHANGE, ConfigError
from scale_sft.errors import UserError

from .contestants import BASE, Contestant
from .page import part
from .summary import COLUMNS, Row, comparable, reason_of, settings_key, summaries
from .worker import Job, run_job, split

__all__ = ["Settings", "measure", "part", "report"]

BENCHMARK = "quality"
DEFAULTS = {"dtype": "float32", "steps": 150, "global_batch_size": 16, "rank_equivalent": 2, "warmup_fraction": 0.0}
"""Options without a recipe; float32 keeps rounding out of the comparison."""
DEMO_DEFAULTS = {"eval_data": "demo", "exact_match_examples": 256, "eval_batch_size": 64}
"""Further options if no other training data are given either."""

_OF_ONE_RUN = {"method", "learning_rate", "seed"}
_COUNTED = {"base", "revision", "train_data", "eval_data", "steps", "target_modules", "chat_template", "answer_pattern"}
_COUNTED |= {"rank_equivalent", "micro_batch_size"}


@dataclass(frozen=True, kw_only=True)
class Settings:
    """The contestants, and the configuration they share."""

    contestants: Sequence[Contestant]
    recipe: str | None  # the base of the configuration; None: the demo
    options: Mapping[str, Any]  # of the configuration, over the recipe
    seeds: int
    validation_examples: int

    def job(self, contestant: Contestant, learning_rate: float | None = None, seed: int = 0) -> Job:
        given = {name: value for name, value in self.options.items() if value is not None}
        defaults: Mapping[str, Any] = {} if self.recipe else DEFAULTS
        if not self.recipe and "train_data" not in given:
            defaults = {**DEFAULTS, **DEMO_DEFAULTS}
        return Job(
            contestant=contestant,
            learning_rate=learning_rate,
            seed=seed,
            recipe=self.recipe,
            options={**defaults, **given},
            validation_examples=self.validation_examples,
        )


def measure(settings: Settings, folder: Path, *, processes: int, say: Callable[[str], None]) -> list[Row]:
    """Do all runs that are not in `folder` yet, adding their rows; returns all rows of these settings.

    Args:
        processes: number of simultaneous runs, which share the cores; 1: in this process.
        say: called with a line for every finished run.

    Raises:
        UserError: base, data, options or PEFT are invalid; nothing has run.
    """
    shared = _checked(settings)
    results, known = Results(folder, BENCHMARK), _known(folder)
    threads = max(1, _cores() // processes) if processes > 1 else None
    trained = [contestant for contestant in settings.contestants if contestant.trains]
    with Pool(run_job, processes=processes, threads=threads) as pool:
        round_of = _Round(shared, results, known, pool, say)
        longest = max((len(contestant.learning_rates) for contestant in trained), default=0)
        grid = [settings.job(BASE)] + [
            settings.job(contestant, contestant.learning_rates[n])
            for n in range(longest)
            for contestant in trained
            if n < len(contestant.learning_rates)
        ]
        rows = round_of.rows_of(grid)
        best = {summary.name: summary.best_rate for summary in summaries(rows)}
        seeds = [
            settings.job(contestant, best[contestant.name], seed)
            for seed in range(1, settings.seeds)
            for contestant in trained
            if best[contestant.name] is not None
        ]
        return rows + round_of.rows_of(seeds)


def report(rows: Sequence[Row]) -> tuple[list[list[str]], list[str]]:
    """Make the table (first line: its columns), and remarks on it."""
    found = summaries(comparable(rows))
    remarks = [remark for summary in found if (remark := summary.remark()) is not None]
    failures = [
        f"{summary.name}: learning rate {rate:g}: {why}"
        for summary in found
        if summary.best_rate is not None
        for rate, why in summary.failures.items()
    ]
    return [list(COLUMNS), *(summary.cells() for summary in found)], remarks + failures


def default_processes() -> int:
    """Choose the number of processes: the cores, at most 4; one on a GPU."""
    import torch

    return 1 if torch.cuda.is_available() else min(4, _cores())


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _checked(settings: Settings) -> dict[str, Any]:
    """Check everything before the first run, and return the settings that all runs share; see `measure`."""
    from scale_sft.training.inputs import read_inputs

    if any(contestant.kind.startswith("peft") for contestant in settings.contestants):
        from .peers import require_peft

        require_peft()
    config = settings.job(BASE).config()
    for option, value in (("--rank", config.sparse.rank_equivalent), ("--steps", config.run.steps)):
        if value is None:
            raise UserError(f"{option}: needed, as {settings.recipe} does not set it: it must be the same for all")
    for contestant in settings.contestants:
        try:
            for rate in contestant.learning_rates:
                settings.job(contestant, rate).config()
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
    return _plain({**options, **digests, "validation_examples": settings.validation_examples})


def _plain(value: Any) -> Any:
    """Return the value as it reads back from JSON."""
    return json.loads(json.dumps(value))


def _known(folder: Path) -> dict[str, Row]:
    """Index rows by settings, without those of crashed runs, which are tried again."""
    rows = read_rows(folder, BENCHMARK)
    return {settings_key(row["settings"]): row for row in rows if "crashed" not in row["result"]}


@dataclass
class _Round:
    """A round of jobs, and their rows."""

    shared: Mapping[str, Any]
    results: Results
    known: Mapping[str, Row]
    pool: Pool
    say: Callable[[str], None]

    def rows_of(self, jobs: Sequence[Job]) -> list[Row]:
        """Return one row per job, in their order: old ones, and new ones as they finish."""
        found = {self._key(job): self.known.get(self._key(job)) for job in jobs}
        missing = [job for job in jobs if found[self._key(job)] is None]
        if len(missing) < len(jobs):
            self.say(f"{len(jobs) - len(missing)} of {len(jobs)} runs are done already")
        for done, (job, row) in enumerate(self._run(missing), start=1):
            found[self._key(job)] = row
            self.say(f"[{done}/{len(missing)}] {_line(row)}")
        return [row for row in found.values() if row is not None]

    def _run(self, jobs: Sequence[Job]) -> Iterator[tuple[Job, Row]]:
        for job, result in self.pool.results(jobs):
            if isinstance(result, Exception):
                reason = " ".join(str(result).split())
                result = {"crashed": f"{type(result).__name__}: {reason}"}
            yield job, self.results.add(self._settings(job), **result, processes=self.pool.processes)

    def _settings(self, job: Job) -> dict[str, Any]:
        return {
            "shared": self.shared,
            "method": job.contestant.name,
            "kind": job.contestant.kind,
            "options": dict(job.contestant.options),
            "learning_rate": job.learning_rate,
            "seed": job.seed,
        }

    def _key(self, job: Job) -> str:
        return settings_key(self._settings(job))


def _line(row: Row) -> str:
    settings, result = row["settings"], row["result"]
    who = settings["method"]
    if settings["learning_rate"] is not None:
        who += f"  rate {settings['learning_rate']:g}  seed {settings['seed']}"
    why = reason_of(result)
    if why is not None:
        return f"{who}  failed: {why}"
    match = f"  exact match {result['exact_match']:.1%}" if "exact_match" in result else ""
    seconds = f"  {result['seconds']:.1f} s" if "seconds" in result else ""
    losses = f"validation loss {result['validation_loss']:.4f}  held-out loss {result['held_out_loss']:.4f}"
    return f"{who}  {losses}{match}{seconds}"
