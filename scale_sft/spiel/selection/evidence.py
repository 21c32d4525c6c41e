"""What a score may look at: the gradient of each entry, the rms of its row and column, and its weight.

Shapes: O rows, I columns of a weight, flattened row-major; n entries of one contiguous part of it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ..indices import pieces


@dataclass(frozen=True)
class Evidence:
    """Facts about n entries of one weight, aligned: each [n] fp32, or [0] if the score does not read it."""

    count: int
    device: torch.device
    mean: Tensor  # gradient, averaged over batches
    mean_square: Tensor  # its square, averaged over batches
    row_rms: Tensor  # root mean square of `mean` over the entry's row of the whole weight
    column_rms: Tensor  # over its column
    weight: Tensor


@dataclass(frozen=True)
class Margins:
    """Root mean squares of a weight's mean gradient by row [O] and by column [I], fp32."""

    rows: Tensor
    columns: Tensor

    def among(self, numbers: Tensor, rows: int) -> Margins:
        """Take these as the margins of some rows, numbers [m] int64, of a weight of so many whose others are 0."""
        spread = self.rows.new_zeros(rows).index_copy_(0, numbers, self.rows)
        return Margins(spread, self.columns * (numbers.numel() / rows) ** 0.5)


def margins_of(part: Tensor, start: int, shape: tuple[int, int], sum_: Callable[[Tensor], None]) -> Margins:
    """Compute the margins of a whole weight, of which this process holds entries [start, start + n).

    Squares are added in float64 and rounded once, so that how the weight is cut does not show.

    Args:
        part: [n] fp32.
        start: flat index of its first entry.
        shape: (O, I).
        sum_: sums a tensor over all processes, in place.
    """
    rows, columns = shape
    sums = torch.zeros(rows + columns, dtype=torch.float64, device=part.device)
    by_row, by_column = sums[:rows], sums[rows:]
    stop, row = start + part.numel(), start // columns
    position = start
    while position < stop:  # the rest of a row, then whole rows, then the beginning of a row
        if position % columns or stop - position < columns:
            end = min(stop, (row + 1) * columns)
            squares = part[position - start : end - start].double().square()
            by_row[row] += squares.sum()
            by_column[position - row * columns : end - row * columns] += squares
            row, position = row + 1, end
        else:
            whole = min((stop - position) // columns, max(1, (1 << 22) // columns))
            squares = part[position - start :][: whole * columns].view(whole, columns).double().square()
            by_row[row : row + whole] += squares.sum(1)
            by_column += squares.sum(0)
            row, position = row + whole, position + whole * columns
    sum_(sums)
    return Margins((by_row / columns).sqrt().float(), (by_column / rows).sqrt().float())


def margins_among(part: Tensor, indices: Tensor, shape: tuple[int, int], sum_: Callable[[Tensor], None]) -> Margins:
    """Estimate the margins of a whole weight from some of its entries: over those that are in the row or column.

    Args:
        part: [n] fp32 of the entries that this process holds.
        indices: [n] int64 flat, of the same entries.
        shape: (O, I).
        sum_: sums a tensor over all processes, in place.
    """
    rows, columns = shape
    sums = torch.zeros(2, rows + columns, dtype=torch.float64, device=part.device)
    for piece in pieces(part.numel(), 1 << 22):
        row, column = _coordinates(indices[piece], columns)
        squares = part[piece].double().square()
        for places in (row, column + rows):
            sums[0].index_add_(0, places, squares)
            sums[1] += torch.bincount(places, minlength=rows + columns)
    sum_(sums)
    found = (sums[0] / sums[1].clamp(min=1)).sqrt().float()
    return Margins(found[:rows], found[rows:])


def gather_evidence(
    indices: Tensor,
    columns: int,
    *,
    mean: Tensor | None = None,
    mean_square: Tensor | None = None,
    margins: Margins | None = None,
    weight: Tensor | None = None,
) -> Evidence:
    """Line up what is known about the entries at flat `indices` [n] int64 of a weight with I `columns`.

    `mean`, `mean_square` and `weight` are [n] already; margins are looked up.
    """
    none = torch.empty(0, device=indices.device)
    row_rms = column_rms = none
    if margins is not None:
        row, column = _coordinates(indices, columns)
        row_rms = margins.rows.index_select(0, row)
        column_rms = margins.columns.index_select(0, column)
    return Evidence(
        count=indices.numel(),
        device=indices.device,
        mean=none if mean is None else mean.float(),
        mean_square=none if mean_square is None else mean_square.float(),
        row_rms=row_rms,
        column_rms=column_rms,
        weight=none if weight is None else weight.float(),
    )


def _coordinates(indices: Tensor, columns: int) -> tuple[Tensor, Tensor]:
    """Compute the rows [n] and columns [n] of flat indices [n] int64."""
    row = torch.div(indices, columns, rounding_mode="floor")
    return row, indices - row * columns
