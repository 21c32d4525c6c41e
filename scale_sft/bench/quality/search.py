"""The search for a contestant's best learning rate: a grid that grows while the best is at its end, then seeds."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from .summary import best_rate, rung_beyond

MORE_RUNGS = 3
GRID_SEED = 0

Run = tuple[float, int]
"""Learning rate and seed."""


@dataclass
class Search:
    """The runs of one contestant on one task, in phases: its grid, rungs beyond it, the other seeds at the best rate.

    Args:
        name: of the contestant.
        grid: learning rates, ascending.
        seeds: number of runs at the best rate.
        more_rungs: how many rates the grid may grow by; one that has a single rate does not grow.
    """

    name: str
    grid: Sequence[float]
    seeds: int
    more_rungs: int = MORE_RUNGS
    losses: dict[float, float | None] = field(default_factory=dict)  # of the grid's seed; None: the run has failed
    _open: int = 0
    _seeded: bool = False

    def begin(self) -> list[Run]:
        """Return the first runs."""
        self._open = len(self.grid)
        return [(rate, GRID_SEED) for rate in self.grid]

    def finish(self, run: Run, loss: float | None) -> tuple[list[Run], str | None]:
        """Take the validation loss of a finished run; returns the runs that follow it, and what to tell of them."""
        self._open -= 1
        rate, seed = run
        if seed == GRID_SEED:
            self.losses[rate] = loss
        if self._open or self._seeded:
            return [], None
        found = {rate: loss for rate, loss in self.losses.items() if loss is not None}
        best = best_rate(found)
        if best is None:
            return [], None
        rung = rung_beyond(self.losses, best)
        if rung is not None and len(self.losses) < len(self.grid) + self.more_rungs:
            self._open = 1
            edge = "highest" if rung > best else "lowest"
            return [
                (rung, GRID_SEED)
            ], f"{self.name}: the best rate, {best:g}, is the {edge} tried: trying {rung:g} too"
        self._seeded = True
        self._open = self.seeds - 1
        return [(best, seed) for seed in range(GRID_SEED + 1, GRID_SEED + self.seeds)], None
