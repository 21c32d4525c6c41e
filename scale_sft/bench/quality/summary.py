"""Summarise the rows of `bench quality`: each contestant's best rate, and its figures over the seeds at that rate."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import mean, stdev
from typing import Any

from .contestants import BASE

Row = dict[str, Any]

COLUMNS = (
    "method", "trained weights", "learning rate", "seeds", "held-out loss", "exact match", "seconds", "tokens/s",
    "peak above base",
)  # fmt: skip


@dataclass(frozen=True)
class Summary:
    """One contestant: its grid, its best rate, and the runs at that rate."""

    name: str
    grid: Mapping[float, float]  # learning rate -> validation loss, of the grid's seed, ascending rates
    failures: Mapping[float, str]  # learning rate -> the reason that this run of the grid has no loss
    best_rate: float | None  # None: nothing is trained, or no run of the grid has finished
    runs: Sequence[Row]  # finished, at the best rate, by seed

    def values(self, key: str) -> list[float]:
        return [row["result"][key] for row in self.runs if row["result"].get(key) is not None]

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
        if self.best_rate not in (tried[0], tried[-1]):
            return None
        edge, factor = ("lowest", 1 / 3) if self.best_rate == tried[0] else ("highest", 3)
        more = sorted({*tried, float(f"{self.best_rate * factor:.1g}")})
        return (
            f"{self.name}: the best rate, {self.best_rate:g}, is the {edge} tried; a better one may be beyond it: "
            f"--learning_rates {self.name}={','.join(f'{rate:g}' for rate in more)}"
        )

    def cells(self) -> list[str]:
        """Format its line of the table, under COLUMNS."""
        if not self.runs:
            return [self.name, "", "", "0", *[""] * (len(COLUMNS) - 4)]
        trained = self.name != BASE.name
        return [
            self.name,
            f"{self.runs[0]['result']['trainable']:,}",
            f"{self.best_rate:g}" if trained else "",
            str(len(self.runs)) if trained else "",
            spread(self.values("held_out_loss"), "{:.4f}".format),
            spread([100 * value for value in self.values("exact_match")], "{:.1f} %".format),
            spread(self.values("seconds"), "{:.1f}".format, with_spread=False),
            spread(self.values("tokens_per_second"), "{:,.0f}".format, with_spread=False),
            spread([value / 2**20 for value in self.values("peak_bytes")], "{:,.1f} MiB".format, with_spread=False),
        ]


def spread(values: Sequence[float], shown: Callable[[float], str], *, with_spread: bool = True) -> str:
    """Format mean and sample standard deviation of some values; empty if there are none."""
    if not values:
        return ""
    return shown(mean(values)) + (f" ± {shown(stdev(values))}" if with_spread and len(values) > 1 else "")


def settings_key(settings: Mapping[str, Any]) -> str:
    """Return a text that is equal for equal settings, from a file or from Python."""
    return json.dumps(settings, sort_keys=True)


def comparable(rows: Sequence[Row]) -> list[Row]:
    """Select, from rows of all invocations, oldest first, those comparable with the newest: each run's newest row."""
    shared = settings_key(rows[-1]["settings"]["shared"])
    newest = {settings_key(row["settings"]): row for row in rows if settings_key(row["settings"]["shared"]) == shared}
    return list(newest.values())


def best_rate(grid: Mapping[float, float]) -> float | None:
    """Find the rate of the lowest validation loss; of equals the lower rate."""
    return min(grid, key=lambda rate: (grid[rate], rate), default=None)


def summaries(rows: Sequence[Row]) -> list[Summary]:
    """Make one summary per contestant, in the order of first appearance; rows as from `comparable`."""
    return [_summary(name, rows) for name in dict.fromkeys(row["settings"]["method"] for row in rows)]


def _summary(name: str, rows: Sequence[Row]) -> Summary:
    own = [row for row in rows if row["settings"]["method"] == name]
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
    )


def reason_of(result: Mapping[str, Any]) -> str | None:
    """Explain why a run has no figures; None if it has."""
    return result.get("failed", result.get("crashed"))


def _listing(rates: Sequence[float]) -> str:
    return ", ".join(f"{rate:g}" for rate in rates) or "none"
