"""Tiles of a weight, each of which is trained whole or not at all: columns, rows or blocks.

Shapes: O rows, I columns of a weight; tiles of h x w entries that cover it, numbered row by row; n chosen ones, which
have K = n * h * w entries; T tokens.

The entries of chosen tiles, sorted by flat index, are dense matrices one after the other: [O, n] for columns, [n, I]
for rows, and [h, m * w] for each band of m blocks at the same height. So their gradient is a dense product of a few
columns of its factors, and state that runs parallel to the entries needs no other layout than that of single entries.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor


@dataclass(frozen=True)
class Tiling:
    """A weight of `shape` (O, I), cut into tiles of `height` x `width` entries.

    Raises:
        ValueError: they do not cover it exactly.
    """

    shape: tuple[int, int]
    height: int
    width: int

    def __post_init__(self) -> None:
        if self.shape[0] % self.height or self.shape[1] % self.width:
            raise ValueError(
                f"a weight of {self.shape[0]} x {self.shape[1]} entries does not divide into tiles of "
                f"{self.height} x {self.width}"
            )

    @property
    def across(self) -> int:
        """The number of tiles next to each other: I / w."""
        return self.shape[1] // self.width

    @property
    def count(self) -> int:
        """The number of all tiles."""
        return self.shape[0] // self.height * self.across

    @property
    def size(self) -> int:
        """The entries of a tile."""
        return self.height * self.width

    @property
    def is_band(self) -> bool:
        """True for whole columns or whole rows, whose entries make up a single dense matrix."""
        return self.height == self.shape[0] or self.width == self.shape[1]

    def numbers_of(self, indices: Tensor) -> Tensor:
        """Find the tile of each entry: flat indices [n] of any integer type -> [n] of the same type."""
        rows = torch.div(indices, self.shape[1], rounding_mode="floor")
        columns = indices - rows * self.shape[1]
        down = torch.div(rows, self.height, rounding_mode="floor")
        return down * self.across + torch.div(columns, self.width, rounding_mode="floor")

    def chosen_in(self, indices: Tensor) -> Tiles:
        """Find the tiles that flat indices [K], sorted and unique, make up.

        Raises:
            ValueError: some tile is there in part.
        """
        tiles = Tiles(self, torch.unique(self.numbers_of(indices.long())))
        if not torch.equal(tiles.indices(), indices.long()):
            raise ValueError(
                f"{indices.numel()} entries of a weight of {self.shape[0]} x {self.shape[1]} are not whole tiles of "
                f"{self.height} x {self.width}"
            )
        return tiles


@dataclass(frozen=True, eq=False)
class Tiles:
    """Chosen tiles of a weight: `numbers` [n] int64, sorted, unique."""

    tiling: Tiling
    numbers: Tensor

    def indices(self) -> Tensor:
        """Compute the flat indices of all entries: [K] int64, sorted."""
        tiling, device = self.tiling, self.numbers.device
        down = torch.div(self.numbers, tiling.across, rounding_mode="floor")
        first = down * tiling.height * tiling.shape[1] + (self.numbers - down * tiling.across) * tiling.width
        rows = torch.arange(tiling.height, device=device)[:, None] * tiling.shape[1]
        within = (rows + torch.arange(tiling.width, device=device)).view(-1)
        return (first[:, None] + within).view(-1).sort().values

    def to(self, device: torch.device | str) -> Tiles:
        """Put the numbers on a device."""
        return Tiles(self.tiling, self.numbers.to(device))

    def norms(self, values: Tensor) -> Tensor:
        """Compute the norm of each tile of `values` [K], in the order of entries: [n] fp32, added in float64.

        Raises:
            ValueError: tiles are blocks.
        """
        return self._lines(values.double().square()).sum((0, 2)).sqrt().float()

    def spread(self, values: Tensor) -> Tensor:
        """Give each entry its tile's value: [n] -> [K], in the order of entries.

        Raises:
            ValueError: tiles are blocks.
        """
        count = values.numel()
        return self._lines(values.new_empty(count * self.tiling.size)).copy_(values[:, None]).view(-1)

    def _lines(self, values: Tensor) -> Tensor:
        """View [K] as [h, n, w] for columns, and as [1, n, h * w] for rows."""
        if not self.tiling.is_band:
            raise ValueError("got blocks, expected whole columns or rows")
        whole = self.tiling.height == self.tiling.shape[0]
        return values.view(self.tiling.height if whole else 1, self.numbers.numel(), -1)

    @cached_property
    def _bands(self) -> list[tuple[Tensor | None, Tensor | None]]:
        """List (rows, columns) of each dense matrix of entries, int64; None: all of them."""
        tiling, numbers = self.tiling, self.numbers
        spread = lambda tiles, size: (tiles[:, None] * size + torch.arange(size, device=tiles.device)).view(-1)
        if tiling.height == tiling.shape[0]:
            return [(None, spread(numbers, tiling.width))]
        if tiling.width == tiling.shape[1]:
            return [(spread(numbers, tiling.height), None)]
        down = torch.div(numbers, tiling.across, rounding_mode="floor")
        bands, counts = torch.unique_consecutive(down, return_counts=True)
        across = (numbers - down * tiling.across).split(counts.tolist())
        return [
            (spread(band[None], tiling.height), spread(columns, tiling.width))
            for band, columns in zip(bands, across, strict=True)
        ]

    def needed(self, factor: Tensor, *, left: bool) -> Tensor:
        """Return the columns [T, n] that products need of a factor of dW: fewer than [T, O] or [T, I] where possible.

        Args:
            factor: [T, O] if `left`, otherwise [T, I].
        """
        wanted = self._bands[0][0 if left else 1] if len(self._bands) == 1 else None
        return factor if wanted is None else factor.index_select(1, wanted)

    def products(self, left: Tensor, right: Tensor) -> Iterator[tuple[slice, Tensor]]:
        """Yield (slice of the K entries, their part of left^T right, flat) for each dense matrix of entries.

        Args:
            left: [T, O]. right: [T, I]; either of them may be what `needed` returned.
        """
        start = 0
        for rows, columns in self._bands:
            one, other = _picked(left, rows, self.tiling.shape[0]), _picked(right, columns, self.tiling.shape[1])
            product = (one.t() @ other).view(-1)
            yield slice(start, start + product.numel()), product
            start += product.numel()


def _picked(factor: Tensor, wanted: Tensor | None, whole: int) -> Tensor:
    """Pick columns of a factor [T, `whole`]; one that is narrower has only them already."""
    return factor if wanted is None or factor.shape[1] < whole else factor.index_select(1, wanted)
