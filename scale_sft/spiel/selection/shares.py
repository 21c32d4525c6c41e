"""One ranking of the entries of all weights: how many each weight gets, with floors.

Shapes: n entries of each weight's part that this process holds.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

_LARGEST = 0x7F800000
"""Bit pattern of infinity: floats that are not negative are ordered as their patterns are."""


def global_shares(
    keys: Mapping[str, Tensor],
    sizes: Mapping[str, int],
    floors: Mapping[str, int],
    total: int,
    sum_: Callable[[Tensor], None],
) -> dict[str, int]:
    """Split `total` over weights so that the largest keys of all are chosen, and no weight gets less than its floor.

    Bisects the bit patterns of keys for the lowest threshold that `total` allows; entries at the threshold itself are
    given to weights in their order.

    Args:
        keys: [n] fp32 of each weight, not negative; NaN counts as the smallest.
        sizes: N of each whole weight.
        floors: entries that each weight gets in any case; together at most `total`.
        total: entries of all weights, at most the sum of `sizes`.
        sum_: sums a tensor over all processes, in place.
    """
    names = list(keys)
    least = torch.tensor([floors[name] for name in names])

    def counts_from(bits: int) -> Tensor:
        if bits == 0:  # every entry, also one that is no number
            return torch.maximum(least, torch.tensor([sizes[name] for name in names]))
        threshold = torch.tensor(bits, dtype=torch.int32).view(torch.float32)
        counts = torch.stack([(keys[name] >= threshold.to(keys[name].device)).sum() for name in names])
        sum_(counts)
        return torch.maximum(least, counts.cpu())

    low, high = 0, _LARGEST + 1  # low allows `total` or more, high less
    at_least, above = counts_from(low), least
    while high - low > 1:
        middle = (low + high) // 2
        counts = counts_from(middle)
        if int(counts.sum()) >= total:
            low, at_least = middle, counts
        else:
            high, above = middle, counts
    shares, left = above.tolist(), total - int(above.sum())
    for place, most in enumerate(at_least.tolist()):
        more = min(left, most - shares[place])
        shares[place] += more
        left -= more
    return dict(zip(names, shares, strict=True))
