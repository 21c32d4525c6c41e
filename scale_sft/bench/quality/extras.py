"""The further reports of `bench quality`, at the best rates that it has found: merging and drift."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import combinations
from pathlib import Path
from typing import Any

from scale_sft.bench.pool import Pool
from scale_sft.bench.rows import Results, Row, read_rows
from scale_sft.errors import UserError

from . import drift, merging
from .contestants import BASE, Contestant
from .measure import Settings, threads_of
from .summary import groups_of, reason_of, result_of, settings_key, summaries


def refuse_impossible(settings: Settings, *, of_merging: bool, of_drift: bool) -> None:
    """Raise UserError if a report cannot be made."""
    asked = "--merging" if of_merging else "--drift"
    for task in settings.tasks if of_merging or of_drift else ():
        quantization = settings.job(task, BASE).config().model.quantization
        if quantization != "none":
            raise UserError(
                f"{asked}: got a base in {quantization}, expected one that is not quantised, to whose weights updates "
                "can be added. Fix: leave out --quantization"
            )
    if of_merging and len(settings.tasks) < 2:
        raise UserError(
            f"--merging: got {len(settings.tasks)} task, expected two or more, whose adapters are added. Fix: name "
            "them with --task"
        )


def measure_extras(
    settings: Settings,
    rows: Sequence[Row],
    folder: Path,
    *,
    of_merging: bool,
    of_drift: bool,
    processes: int,
    say: Callable[[str], None],
) -> None:
    """Do the runs of the further reports that are not in `folder` yet, adding their rows.

    Args:
        settings: those of the comparison.
        rows: what `measure` has returned for them.
        folder: of the rows.
        of_merging: add the adapters of each pair of tasks; trains both again, for each seed.
        of_drift: merge and unmerge the adapter of each task; trains it again, for the first seed.
        processes: number of simultaneous runs.
        say: called with a line for every finished run.
    """
    best = _best_rates(rows)
    if of_merging:
        _run(merging.BENCHMARK, merging.run_merge, _merge_jobs(settings, best), folder, processes, say)
    if of_drift:
        _run(drift.BENCHMARK, drift.run_drift, _drift_jobs(settings, best), folder, processes, say)


Best = Mapping[str, tuple[dict[str, Any], Mapping[str, float | None]]]
"""By task: the settings that its runs share, and the best rate of each contestant."""
Work = list[tuple[dict[str, Any], Any]]
"""Settings of a row, and the job that fills it."""


def _best_rates(rows: Sequence[Row]) -> Best:
    found = {}
    for group in groups_of(rows):
        shared = group[-1]["settings"]["shared"]
        found[shared.get("task", "")] = shared, {summary.name: summary.best_rate for summary in summaries(group)}
    return found


def _merge_jobs(settings: Settings, best: Best) -> Work:
    work: Work = []
    for first, second in combinations(settings.tasks, 2):
        for contestant in (BASE, *settings.contestants):
            rates = [best[task.name][1].get(contestant.name) for task in (first, second)]
            if contestant.trains and None in rates:
                continue
            for seed in range(settings.seeds if contestant.trains else 1):
                jobs = [
                    settings.job(task, contestant, rate, seed)
                    for task, rate in zip((first, second), rates, strict=True)
                ]
                told = _described(contestant, [best[task.name][0] for task in (first, second)], rates, seed)
                work.append(({**told, "tasks": [first.name, second.name]}, merging.MergeJob(*jobs)))
    return work


def _drift_jobs(settings: Settings, best: Best) -> Work:
    work: Work = []
    for task in settings.tasks:
        shared, rates = best[task.name]
        for contestant in settings.contestants:
            if (rate := rates.get(contestant.name)) is not None:
                told = _described(contestant, [shared], [rate], 0)
                job = drift.DriftJob(settings.job(task, contestant, rate))
                work.append(({**told, "tasks": [task.name], "cycles": job.cycles}, job))
    return work


def _described(contestant: Contestant, shared: list[Any], rates: list[Any], seed: int) -> dict[str, Any]:
    return {
        "shared": shared,
        "method": contestant.name,
        "kind": contestant.kind,
        "options": dict(contestant.options),
        "learning_rates": rates,
        "seed": seed,
    }


def _run(
    benchmark: str,
    work: Callable[[Any], Any],
    items: Work,
    folder: Path,
    processes: int,
    say: Callable[[str], None],
) -> None:
    known = {_key(row["settings"]) for row in read_rows(folder, benchmark) if "crashed" not in row["result"]}
    left = [(told, job) for told, job in items if _key(told) not in known]
    if len(left) < len(items):
        say(f"{benchmark}: {len(items) - len(left)} of {len(items)} runs are done already")
    results, described = Results(folder, benchmark), {id(job): told for told, job in left}
    with Pool(work, processes=processes, threads=threads_of(processes)) as pool:
        for done, (job, outcome) in enumerate(pool.results([job for _, job in left]), start=1):
            told, result = described[id(job)], result_of(outcome)
            results.add(told, **result, processes=processes)
            why = reason_of(result)
            who = f"{' + '.join(filter(None, told['tasks'])) or 'the task'}: {told['method']}  seed {told['seed']}"
            say(f"{benchmark} [{done}/{len(left)}] {who}" + (f"  failed: {why}" if why else ""))


def _key(settings: Mapping[str, Any]) -> str:
    """Return a text that is equal for equal settings of a row; see `summary.settings_key`."""
    return "\n".join(settings_key({**settings, "shared": shared}) for shared in settings["shared"])
