"""Summarise the rows of `bench quality`: each contestant's best rate, and its figures over the seeds at that rate."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean
from typing import Any, TypeVar

from scale_sft.config.options import SECTIONS

from .contestants import BASE, present_name
from .intervals import Figure, half_width_over_parts

Row = dict[str, Any]
T = TypeVar("T")


@dataclass(frozen=True)
class Summary:
    """One contestant: its grid, its best rate, and the runs at that rate."""

    name: str
    grid: Mapping[float, float]  # learning rate -> validation loss, of the grid's seed, ascending rates
    failures: Mapping[float, str]  # learning rate -> the reason that this run of the grid has no loss
    best_rate: float | None  # None: nothing is trained, or no run of the grid has finished
    runs: Sequence[Row]  # finished, at the best rate, by seed
    of_grid: Sequence[Row] = ()  # the runs of the grid, ascending rates

    def values(self, key: str) -> list[float]:
        """Return a result of each run at the best rate; `retained.NAME` for a loss on other data."""
        return [value for row in self.runs if (value := value_of(row, key)) is not None]

    def figure(self, key: str) -> Figure | None:
        return Figure.of(self.values(key))

    def difference(self, other: Summary, key: str) -> Figure | None:
        """Compare with another contestant, seed by seed: the same seed means the same batches."""
        return Figure.of([mine - its for mine, its in self._pairs(other, lambda row: value_of(row, key))])

    def half_width_by_examples(self, other: Summary, key: str) -> float | None:
        """Tell how far the difference of a loss depends on the examples that it is measured on, whatever the seeds.

        Returns half the width of its 95 % interval; None where no seed has the parts of both.
        """
        both = self._pairs(other, lambda row: _parts_of(row, key))
        if not both:
            return None
        tokens = [int(count) for _, count in both[0][0]]
        sums = [[loss - its for (loss, _), (its, _) in zip(*pair, strict=True)] for pair in both]
        return half_width_over_parts([mean(of_part) for of_part in zip(*sums, strict=True)], tokens)

    def _pairs(self, other: Summary, get: Callable[[Row], T | None]) -> list[tuple[T, T]]:
        """Pair what the runs of both at the same seed have."""
        theirs = {row["settings"]["seed"]: get(row) for row in other.runs}
        pairs = ((get(row), theirs.get(row["settings"]["seed"])) for row in self.runs)
        return [(mine, its) for mine, its in pairs if mine is not None and its is not None]

    def remark(self) -> str | None:
        """Warn of anything that casts doubt on the best rate; None if nothing does."""
        if self.name == BASE.name:
            return None
        tried = sorted({*self.grid, *self.failures})
        if self.best_rate is None:
            reason = next(iter(self.failures.values()), "no run has finished")
            return f"{self.name}: no learning rate of {_listing(tried)} led to a result: {reason}"
        if len(tried) == 1:
            return f"{self.name}: only one learning rate was tried, {self.best_rate:g}; others may be better"
        rung = rung_beyond(tried, self.best_rate)
        if rung is None:
            return None
        edge, more = "highest" if rung > self.best_rate else "lowest", sorted([*tried, rung])
        return (
            f"{self.name}: the best rate, {self.best_rate:g}, is the {edge} tried; a better one may be beyond it: "
            f"--learning_rates {self.name}={','.join(f'{rate:g}' for rate in more)}"
        )


def value_of(row: Row, key: str) -> float | None:
    """Return a figure of a run's result; `retained.NAME` for a loss on other data; None if the row has none."""
    group, _, name = key.rpartition(".")
    found = row["result"].get(group, {}).get(name) if group else row["result"].get(key)
    return None if found is None else float(found)


def _parts_of(row: Row, key: str) -> list[list[float]] | None:
    """Return the summed losses and target tokens of the parts of a loss; None in rows of an earlier version."""
    group, _, name = key.rpartition(".")
    if group:
        return row["result"].get(f"{group}_parts", {}).get(name)
    return row["result"].get(f"{key.removesuffix('_loss')}_parts")


def retained_names(rows: Sequence[Row]) -> list[str]:
    """Name the data of which a loss was measured in addition, in the order of first appearance."""
    return list(dict.fromkeys(name for row in rows for name in row["result"].get("retained", {})))


def short_name(source: str | Sequence[str]) -> str:
    """Name a base or data without its folder."""
    names = [source] if isinstance(source, str) else source
    return ", ".join(Path(name.partition("?")[0]).name or name for name in names)


def present(row: Row) -> Row:
    """Return a row under the present name of its contestant."""
    settings = row["settings"]
    known = settings["method"] != "random-mask"  # other entries than `random`: it keeps its name
    name = present_name(settings["method"]) if known else settings["method"]
    return row if name == settings["method"] else {**row, "settings": {**settings, "method": name}}


def settings_key(settings: Mapping[str, Any]) -> str:
    """Return a text that is equal for equal settings, from a file or from Python.

    Shared options at their present defaults are left out: a version that has more options resumes what another began.
    """
    return json.dumps({**settings, "shared": _essential(settings["shared"])}, sort_keys=True)


def _essential(shared: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in shared.items() if name not in _DEFAULTS or value != _DEFAULTS[name]}


def _defaults() -> dict[str, Any]:
    fields = [field for kind in SECTIONS.values() for field in dataclasses.fields(kind)]
    return json.loads(json.dumps({field.name: field.default for field in fields}))


_DEFAULTS = _defaults()


def groups_of(rows: Sequence[Row]) -> list[list[Row]]:
    """Group comparable rows, each run's newest row; the group with the newest row first.

    Args:
        rows: of all invocations, oldest first.
    """
    newest: dict[str, dict[str, Row]] = {}
    for row in map(present, rows):
        shared = json.dumps(_essential(row["settings"]["shared"]), sort_keys=True)
        group = newest.pop(shared, {})
        newest[shared] = group | {settings_key(row["settings"]): row}
    return [list(group.values()) for group in reversed(newest.values())]


def best_rate(grid: Mapping[float, float]) -> float | None:
    """Find the rate of the lowest validation loss; of equals the lower rate."""
    return min(grid, key=lambda rate: (grid[rate], rate), default=None)


def rung_beyond(tried: Iterable[float], best: float) -> float | None:
    """Return the rate to try next if `best` is an end of those tried, as far from it as its neighbour; otherwise None.

    A single rate has no neighbour: None.
    """
    rates = sorted(tried)
    if len(rates) < 2 or best not in (rates[0], rates[-1]):
        return None
    neighbour = rates[1] if best == rates[0] else rates[-2]
    return _short(best * best / neighbour, best)


def _short(rate: float, best: float) -> float:
    """Round a rate to one digit where that changes it by at most 12 %, otherwise to more; it stays beyond `best`."""
    for digits in (1, 2, 3):
        short = float(f"{rate:.{digits}g}")
        if abs(short / rate - 1) <= 0.12 and (short > best) == (rate > best) and short != best:
            return short
    return rate


def summaries(rows: Sequence[Row]) -> list[Summary]:
    """Make one summary per contestant, in the order of first appearance; rows as from `groups_of`."""
    return [_summary(name, rows) for name in dict.fromkeys(row["settings"]["method"] for row in rows)]


def _summary(name: str, rows: Sequence[Row]) -> Summary:
    own = [row for row in rows if row["settings"]["method"] == name]
    # what a name meant before, or a variant with other options: its runs are not further seeds of today's
    own = [row for row in own if _meaning(row) == _meaning(own[-1])]
    seed = min(row["settings"]["seed"] for row in own)
    of_grid = sorted(
        (row for row in own if row["settings"]["seed"] == seed and row["settings"]["learning_rate"] is not None),
        key=lambda row: row["settings"]["learning_rate"],
    )
    grid = {
        row["settings"]["learning_rate"]: row["result"]["validation_loss"]
        for row in of_grid
        if "validation_loss" in row["result"]
    }
    best = best_rate(grid)
    runs = [row for row in own if row["settings"]["learning_rate"] == best and "held_out_loss" in row["result"]]
    return Summary(
        name=name,
        grid=grid,
        failures={
            row["settings"]["learning_rate"]: why for row in of_grid if (why := reason_of(row["result"])) is not None
        },
        best_rate=best,
        runs=sorted(runs, key=lambda row: row["settings"]["seed"]),
        of_grid=of_grid,
    )


def _meaning(row: Row) -> tuple[Any, Any]:
    return row["settings"].get("kind"), row["settings"].get("options")


def result_of(outcome: Any) -> dict[str, Any]:
    """Return what a run has given the pool as the result of a row; an exception as {"crashed": why}."""
    if isinstance(outcome, Exception):
        return {"crashed": f"{type(outcome).__name__}: {' '.join(str(outcome).split())}"}
    return outcome


def reason_of(result: Mapping[str, Any]) -> str | None:
    """Explain why a run has no figures; None if it has."""
    return result.get("failed", result.get("crashed"))


def _listing(rates: Sequence[float]) -> str:
    return ", ".join(f"{rate:g}" for rate in rates) or "none"
