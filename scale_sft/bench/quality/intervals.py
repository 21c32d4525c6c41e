"""Confidence intervals: over seeds, and over the examples that a loss is measured on."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import mean, stdev

PARTS = 32
"""How many parts examples are dealt into, to tell how far a loss depends on them."""

# Two-sided 95 % quantiles of Student's t distribution, by degrees of freedom from 1; beyond, by interpolation in 1/df.
_T = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145, 2.131, 2.120,
      2.110, 2.101, 2.093, 2.086, 2.080, 2.074, 2.069, 2.064, 2.060, 2.056, 2.052, 2.048, 2.045, 2.042)  # fmt: skip
_NORMAL = 1.960


@dataclass(frozen=True)
class Figure:
    """Some values over seeds: their mean, and half the width of its 95 % confidence interval (t distribution)."""

    mean: float
    half_width: float | None  # None: a single value
    count: int

    @classmethod
    def of(cls, values: Sequence[float]) -> Figure | None:
        """Summarise values; None without any."""
        if not values:
            return None
        if len(values) == 1:
            return cls(values[0], None, 1)
        return cls(mean(values), t_quantile(len(values) - 1) * stdev(values) / math.sqrt(len(values)), len(values))


def t_quantile(degrees: int) -> float:
    """Return the two-sided 95 % quantile of Student's t distribution for `degrees` of freedom, from 1."""
    if degrees <= len(_T):
        return _T[degrees - 1]
    return _NORMAL + (_T[-1] - _NORMAL) * len(_T) / degrees


def half_width_over_parts(sums: Sequence[float], counts: Sequence[int]) -> float | None:
    """Return half the width of the 95 % interval of sum(sums) / sum(counts), a mean over examples dealt into parts.

    The jackknife: the quotient is taken again without each part in turn, which also holds for parts of unequal counts.

    Args:
        sums: of each part, such as of a loss or of the difference of two.
        counts: of what is summed there, such as target tokens.

    Returns None where one part has all of them.
    """
    n, total, count = len(sums), sum(sums), sum(counts)
    if n < 2 or max(counts) == count:
        return None
    without = [(total - of_part) / (count - own) for of_part, own in zip(sums, counts, strict=True)]
    centre = mean(without)
    return t_quantile(n - 1) * math.sqrt((n - 1) / n * sum((one - centre) ** 2 for one in without))
