"""How evenly the entries of a weight are spread over its rows and columns.

Shapes: O rows, I columns of a weight; K entries.
"""

from __future__ import annotations

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
    rows, columns = shape
    return _profile(indices // columns, rows), _profile(indices % columns, columns)


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


def _profile(places: Tensor, count: int) -> list[float]:
    if not places.numel():
        return [0.0] * len(FRACTIONS)
    shares = torch.bincount(places, minlength=count).sort(descending=True).values.cumsum(0).double() / places.numel()
    return [float(shares[max(0, ceil(fraction * count) - 1)]) for fraction in FRACTIONS]
