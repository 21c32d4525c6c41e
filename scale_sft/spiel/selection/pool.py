"""A random sample of a weight's entries, from which the first choice is made where all of them take too much memory.

Shapes: N entries of a weight; M of them in its pool.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..indices import pieces
from .draws import hashed, stream

PICKED = 1 << 22
"""Entries that are picked at a time."""


@dataclass(frozen=True)
class Pool:
    """M of N entries: the weight is cut into M runs of equal length (up to one), and each gives one entry.

    Which one is a hash of (seed, weight, run), so that a pool takes no memory and is the same on every process.

    Args:
        entries: N.
        count: M, 1 <= M <= N.
        seed: of the run.
        name: of the weight.
    """

    entries: int
    count: int
    seed: int
    name: str

    def places(self, runs: Tensor) -> Tensor:
        """Compute the flat indices [n] of the entries of some runs [n] int64, in the same order."""
        length, longer = divmod(self.entries, self.count)
        first = runs * longer // self.count
        longer_by = (runs + 1) * longer // self.count - first
        within = hashed(runs, stream(self.seed, self.name, 0, "pool")) % (length + longer_by)
        return runs * length + first + within

    def pick(self, flat: Tensor) -> Tensor:
        """Pick the pool's entries [M] of all [N]."""
        picked = flat.new_empty(self.count)
        for part in pieces(self.count, PICKED):
            runs = torch.arange(part.start, part.stop, device=flat.device)
            picked[part] = flat.index_select(0, self.places(runs))
        return picked
