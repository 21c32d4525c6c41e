"""How evenly the entries of a weight are spread over its rows and columns.

Shapes: O rows, I columns of a weight; K entries.
"""

from __future__ import annotations

from math import ceil

import torch
from torch import Tensor

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


def _profile(places: Tensor, count: int) -> list[float]:
    if not places.numel():
        return [0.0] * len(FRACTIONS)
    shares = torch.bincount(places, minlength=count).sort(descending=True).values.cumsum(0).double() / places.numel()
    return [float(shares[max(0, ceil(fraction * count) - 1)]) for fraction in FRACTIONS]
