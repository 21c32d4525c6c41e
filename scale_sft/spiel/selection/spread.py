"""How evenly the entries of a weight are spread over its rows and columns.

Shapes: O rows, I columns of a weight; K entries.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from math import ceil

import torch
from torch import Tensor

from ..indices import Entries

FRACTIONS = (0.01, 0.02, 0.05, 0.1, 0.2, 0.5)
"""Of the rows (or columns), fullest first: where a profile is taken."""


def profiles(indices: Tensor, shape: tuple[int, int]) -> tuple[list[float], list[float]]:
    """Compute which share of the entries is in the fullest rows, and in the fullest columns.

    Args:
        indices: [K] flat, any integer type.
        shape: (O, I).

    Returns:
        Two lists, each with a share of the entries for each of `FRACTIONS`; about the fraction itself if the entries
        are spread evenly, 0 without entries.
    """
    return profiles_together([indices], shape)[0]


def profiles_together(found: Sequence[Tensor], shape: tuple[int, int]) -> list[tuple[list[float], list[float]]]:
    """Compute the `profiles` of many weights [K] of one shape at once."""
    (owners, joined), (rows, columns) = owned(found), shape
    in_rows = fullest(owners, joined // columns, (len(found), rows), FRACTIONS)
    in_columns = fullest(owners, joined % columns, (len(found), columns), FRACTIONS)
    return list(zip(in_rows.tolist(), in_columns.tolist(), strict=True))


def owned(found: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Join the indices [K] of many weights: the number of the weight that each belongs to, and the indices; int64."""
    counts = torch.tensor([indices.numel() for indices in found], device=found[0].device)
    return torch.repeat_interleave(counts), torch.cat(list(found)).long()


def fullest(owners: Tensor, places: Tensor, shape: tuple[int, int], fractions: Sequence[float]) -> Tensor:
    """Compute which share of each weight's entries is in its fullest rows, or columns.

    Args:
        owners: [K] int64, the number of each entry's weight.
        places: [K] int64, its row.
        shape: (weights W, rows of each O).
        fractions: F fractions of the rows, in (0, 1]; at least one row is taken.

    Returns:
        [W, F] fp64; 0 for a weight without entries.
    """
    counts = torch.bincount(owners * shape[1] + places, minlength=shape[0] * shape[1]).view(shape)
    summed = counts.sort(dim=1, descending=True).values.cumsum(1)
    taken = [max(0, ceil(fraction * shape[1]) - 1) for fraction in fractions]
    return summed[:, taken].double() / summed[:, -1:].clamp(min=1)


def batches(
    shapes: Mapping[str, tuple[int, int]], active: Mapping[str, int], limit: int = 1 << 22
) -> Iterator[list[str]]:
    """Yield the names of consecutive weights of one shape with up to `limit` rows, columns or entries; at least one.

    Thousands of experts are looked at in as few operations as some dozens of larger weights.
    """
    batch: list[str] = []
    used = 0
    for name, shape in shapes.items():
        cost = max(*shape, active[name])
        if batch and (shapes[batch[0]] != shape or used + cost > limit):
            yield batch
            batch, used = [], 0
        batch.append(name)
        used += cost
    if batch:
        yield batch


def update_rates(entries: Entries) -> Tensor:
    """Compute factors [K] fp32 for the updates of one weight's entries: higher where rows and columns hold few.

    (entries in the row x entries in the column)^-1/4, divided by their mean. Entries that crowd into a row or column
    move the weight along few directions, and so bear a smaller rate.
    """
    rows, columns = entries.shape
    in_row = torch.zeros(rows, dtype=torch.int64, device=entries.csr()[0].device)
    in_column = torch.zeros(columns, dtype=torch.int64, device=in_row.device)
    for _, i, j in entries.coordinates():
        in_row += torch.bincount(i, minlength=rows)
        in_column += torch.bincount(j, minlength=columns)
    rates = torch.empty(entries.count, device=in_row.device)
    for part, i, j in entries.coordinates():
        rates[part] = (in_row[i].float() * in_column[j].float()).pow_(-0.25)
    return rates / rates.mean()
