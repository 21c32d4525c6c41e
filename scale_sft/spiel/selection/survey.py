"""Gradients of several batches before the first update, and the first choice of entries made from them.

Shapes: O rows, I columns, N = O * I entries of a weight; W processes, each with n = ceil(N / W) of them (the last ones
may have fewer); K entries to choose. With a pool, M entries of a weight take the place of its N.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor

from ..row_gradients import Pending, RowGradient
from ..seeding import random_indices, random_tiles
from ..tiles import Tiles, Tiling
from ..topk import top_k_magnitude
from .evidence import margins_among, margins_of
from .parts import Parts, ReadWeight
from .pool import Pool
from .quotas import choose_within
from .rule import SelectionRule
from .shares import global_shares
from .tile_keys import random_keys, random_tile_keys, tile_keys


class Survey:
    """The sums of gradients over batches, from which the first choice of entries is made.

    This process keeps 4 bytes for each of its n entries; 12 where the score reads squares. With pools only their
    entries are looked at, and rms of rows and columns are estimated from them.

    Args:
        shapes: (O, I) of each weight.
        rule: what to choose by.
        parts: the processes that choose together.
        read_weight: see `ReadWeight`; called only if the score reads weights.
        device: where gradients are, and where the processes can exchange tensors.
        tilings: of each weight, if whole tiles are to be chosen.
        pool_sizes: M of each weight that shall be judged by a pool.
    """

    def __init__(
        self,
        shapes: Mapping[str, tuple[int, int]],
        rule: SelectionRule,
        parts: Parts,
        read_weight: ReadWeight,
        device: torch.device | None = None,
        tilings: Mapping[str, Tiling] | None = None,
        pool_sizes: Mapping[str, int] | None = None,
    ):
        self.shapes, self.rule, self.parts, self.read_weight = shapes, rule, parts, read_weight
        self.device, self.tilings = device, tilings or {}
        self.batches = 0
        """Complete batches so far."""
        self._sums: dict[str, Tensor] = {}
        self._squares: dict[str, Tensor] = {}
        self._open: dict[str, Tensor] = {}  # of the batch in progress, where squares are needed
        self._pending = Pending()
        self.pools: dict[str, Pool] = {}
        if self.needs_batches:
            sizes = {name: rows * columns for name, (rows, columns) in shapes.items()}
            self.pools = {
                name: Pool(sizes[name], count, rule.seed, name)
                for name, count in (pool_sizes or {}).items()
                if count < sizes[name]
            }

    @property
    def needs_batches(self) -> bool:
        """Return True if the score reads gradients, so that batches must be recorded before `choose`."""
        return self.rule.of(batches=2).reads_gradients

    def record(self, name: str, left: Tensor, right: Tensor, *, more: bool = False) -> None:
        """Add left^T right, the gradient [O, I] of one weight in one backward pass: left [T, O], right [T, I].

        An embedding's left is [T] int64, and its gradient is made whole here: sums over batches fill it anyway.

        Args:
            more: other parts of this gradient follow, which the processes exchange together.
        """
        rows = left.dim() == 1
        gradient = RowGradient(left, right, self.shapes[name][0]) if rows else left.t() @ right
        whole = self._pending.add(name, gradient, more=more)
        if whole is None:
            return
        flat, pool = whole.view(-1), self.pools.get(name)
        part = self.parts.own_part(pool.pick(flat) if pool else flat)
        into = self._open if "squares" in self.rule.of(batches=2).reads else self._sums
        if name in into:
            into[name] += part
        else:
            into[name] = part.float()

    def end_batch(self) -> None:
        """Close a global batch, after all of its backward passes."""
        self.batches += 1
        for name, gradient in self._open.items():
            for sums, term in ((self._sums, gradient), (self._squares, gradient.square())):
                sums[name] = sums[name].add_(term) if name in sums else term.clone()
        self._open = {}

    def choose(self, counts: Mapping[str, int], *, floor_fraction: float | None = None) -> dict[str, Tensor]:
        """Choose entries of each weight, and free the sums as they are used.

        Args:
            counts: K of each weight; with tiles a multiple of their size.
            floor_fraction: rank the entries of all weights together, and give each weight at least this fraction of
                its count; None: each weight gets its count.

        Returns:
            [K] int64 flat indices, sorted, by name.

        Raises:
            ValueError: no gradient has reached a weight, a gradient or a score is not finite, or see `choose_within`.
        """
        if floor_fraction is None:
            return {name: self._choose(name, self._keys(name), counts[name]) for name in self.shapes}
        keys = {name: self._keys(name) for name in self.shapes}
        sizes = {name: self._size(name) for name in self.shapes}
        floors = {name: max(1, int(floor_fraction * count)) for name, count in counts.items()}
        shares = global_shares(keys, sizes, floors, sum(counts.values()), self.parts.sum_)
        return {name: self._choose(name, keys.pop(name), shares[name]) for name in self.shapes}

    def _size(self, name: str) -> int:
        """Return M of a weight that has a pool, otherwise N."""
        rows, columns = self.shapes[name]
        return self.pools[name].count if name in self.pools else rows * columns

    def _keys(self, name: str) -> Tensor:
        """Compute the keys [n] of one weight's part, or of all its tiles, and free its sums."""
        score = self.rule.of(batches=self.batches)
        shape, part = self.shapes[name], self.parts.range_of(self._size(name))
        places: slice | Tensor = part
        mean = squares = margins = weight = None
        if self.needs_batches:
            if name not in self._sums:
                raise ValueError(f"no gradient reached '{name}' in {self.batches} batches. Fix: leave it out")
            mean, squares = self._sums.pop(name).div_(self.batches), self._squares.pop(name, None)
            if name in self.pools:
                places = self.pools[name].places(torch.arange(part.start, part.stop, device=mean.device))
        if name in self.tilings and score.name == "random":
            return random_tile_keys(self.rule, name, self.tilings[name], self.device)
        if "margins" in score.reads and mean is not None:
            if isinstance(places, slice):
                margins = margins_of(mean, places.start, shape, self.parts.sum_)
            else:
                margins = margins_among(mean, places, shape, self.parts.sum_)
        if "weight" in score.reads:
            with self.read_weight(name) as whole:
                weight = whole.reshape(-1)[places].float()
        rule = replace(self.rule, temperature=math.inf) if name in self.tilings else self.rule  # keys are scores
        keys = rule.keys(
            name,
            shape[1],
            0,
            places,
            score=score,
            mean=mean,
            mean_square=None if squares is None else squares.div_(self.batches),
            margins=margins,
            weight=weight,
            device=self.device,
        )
        broken = torch.stack([(~(keys if mean is None else mean).isfinite()).sum(), (~(keys >= 0)).sum()])
        self.parts.sum_(broken, "scalars")
        gradients, scores = broken.tolist()
        if gradients and mean is not None:
            raise ValueError(
                f"{gradients} entries of the gradient of '{name}' are not finite in {self.batches} batches"
            )
        if scores:
            raise ValueError(f"score '{score.name}': got NaN or a negative number for {scores} entries of '{name}'")
        if name in self.tilings:
            return tile_keys(self.rule, name, self.tilings[name], keys, part.start, self.parts.sum_)
        return keys

    def _choose(self, name: str, keys: Tensor, count: int) -> Tensor:
        if name in self.tilings:
            tiling = self.tilings[name]
            if not keys.any():  # an expert that met no token
                return random_tiles(tiling, count // tiling.size, self.rule.seed, name).to(keys.device).indices()
            return Tiles(tiling, top_k_magnitude(keys, count // tiling.size)).indices()
        n, pool = self._size(name), self.pools.get(name)
        quotas = self.rule.quotas(count, self.shapes[name])
        if quotas is None or pool:
            chosen = self.parts.choose(keys, n, count)
            if count and not len(chosen):  # an expert that met no token
                return random_indices(self.shapes[name], count, self.rule.seed, name).long().to(keys.device)
            return pool.places(chosen) if pool else chosen
        keys = self.parts.join(keys, n)
        if not keys.any():
            keys = random_keys(self.rule, name, n, keys.device)
        try:
            return choose_within(keys.view(self.shapes[name]), count, *quotas)
        except ValueError as error:
            raise ValueError(f"weight '{name}': {error}") from None
