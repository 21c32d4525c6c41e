"""Drop and grow in many weights at once: the choices of `drop_grow`, in a few launches however many weights there are.

Shapes: W weights one after the other; n active entries of all, c that may join them; K, C, k of one weight, as in
`drop_grow`; R rows of all weights. Indices are joined: flat indices in all weights, one after the other, so they are
sorted over all. Nothing but the number of entries that may join is read by the host, and that only in SFT-MA.

A weight's best entries are found by one sort of all: keys are (number of the weight, bits of the score), as the bits of
non-negative floats sort like the numbers. Sorts are stable, so ties go to the smaller index. Temporaries take up to 120
bytes per entry: the caller bounds their number.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .drop_grow import Exchange
from .indices import FlatEntries, Part, on_device
from .joined_product import largest_products

_NEVER = 1 << 31  # the key of a candidate that cannot be chosen: behind all others of its weight


class Segments:
    """Consecutive parts of a tensor [n], one for each weight, of sizes that the host knows or does not.

    Args:
        sizes: [W] int64 on the device.
        total: n, their sum.
    """

    def __init__(self, sizes: Tensor, total: int):
        self.ends = sizes.cumsum(0)
        self.starts = self.ends - sizes
        self.owner = torch.repeat_interleave(sizes, output_size=total)
        """The number of each element's weight: [n] int64."""

    def of_each(self, values: Tensor) -> Tensor:
        """Give each element its weight's value: [n] of [W]."""
        return values.index_select(0, self.owner)

    def counted(self, flags: Tensor) -> tuple[Tensor, Tensor]:
        """Count `flags` [n] bool: those up to each element in its weight, [n]; all in each weight, [W]."""
        running = _from_zero(flags)
        before = running.index_select(0, self.starts)
        return running[1:] - self.of_each(before), running.index_select(0, self.ends) - before

    def keys(self, low: Tensor) -> Tensor:
        """Make keys that sort by weight, then by `low` [n], integers from 0 to 2^32 - 1: [n] int64."""
        return (self.owner << 32).add_(low)

    def first(self, keys: Tensor, wanted: Tensor) -> tuple[Tensor, Tensor]:
        """Sort `keys`; returns (order [n], [n] bool in that order: among the first `wanted` [W] of its weight)."""
        order = torch.sort(keys, stable=True).indices
        rank = torch.arange(order.numel(), device=order.device).sub_(self.of_each(self.starts))
        return order, rank < self.of_each(wanted)


def bits_of(values: Tensor) -> Tensor:
    """Return the bits of non-negative floats as int32, which sort like the numbers."""
    return values.float().view(torch.int32)


def exchange_by_gradient(
    active: FlatEntries, candidates: FlatEntries, part: Part, scores: Tensor, mean: Tensor, wanted: Sequence[int]
) -> Exchange:
    """Drop and grow by gradient in each weight of a part: see `drop_grow.exchange_by_gradient`.

    Args:
        active, candidates: the entries of all weights.
        part: whole weights.
        scores: [n] of the part's active entries. mean: [c] of its candidates.
        wanted: k of each weight.
    """
    of_candidates = candidates.part_of(part.weights)
    index, joining = active.joined(part), candidates.joined(of_candidates)
    entries, others = _segments(active, part), _segments(candidates, of_candidates)
    n = index.numel()
    place = torch.searchsorted(index, joining)
    at = place.clamp(max=n - 1)
    is_active = index.index_select(0, at) == joining
    fresh = others.counted(is_active.logical_not())[1]

    # As many as can grow are dropped: see `drop_grow._growable`.
    is_candidate = _marked(n, is_active, at)
    k = on_device(wanted, torch.int64, index.device)
    order, drops = entries.first(entries.keys(bits_of(scores)), k)
    leaving = entries.counted(is_candidate.index_select(0, order).logical_not_())[0]
    drops &= leaving <= entries.of_each(fresh)
    dropped = torch.empty_like(drops).scatter_(0, order, drops)

    growing = entries.counted(drops)[1]
    eligible = is_active.logical_not().logical_or_(dropped.index_select(0, at))
    low = torch.where(eligible, (_NEVER - 1) - bits_of(mean.abs()).long(), _NEVER)
    order, chosen_in_order = others.first(others.keys(low), growing)
    chosen = torch.empty_like(chosen_in_order).scatter_(0, order, chosen_in_order)
    kept = dropped.logical_not_().logical_or_(_marked(n, chosen & is_active, at))
    return _exchange(index, kept, joining, chosen.logical_and_(is_active.logical_not_()), place)


def exchange_by_accumulators(
    active: FlatEntries, part: Part, scores: Tensor, row: Tensor, col: Tensor, wanted: Sequence[int]
) -> Exchange:
    """Drop and grow by accumulators in each weight of a part: see `drop_grow.exchange_by_accumulators`.

    Args:
        active: the entries of all weights.
        part: whole weights.
        scores: [n] of the part's active entries.
        row: [R] fp32. col: of all columns: SM3 accumulators of all weights (see `indices.Rows`).
        wanted: k of each weight.
    """
    index, entries = active.joined(part).long(), _segments(active, part)
    shapes, counts = active.rows.shapes[part.weights], active.counts[part.weights]
    most = [rows * columns - count for (rows, columns), count in zip(shapes, counts, strict=True)]
    k = on_device([min(pair) for pair in zip(wanted, most, strict=True)], torch.int64, index.device)
    order, drops = entries.first(entries.keys(bits_of(scores)), k)
    kept = torch.empty_like(drops).scatter_(0, order, drops).logical_not_()
    joining, grown = largest_products(active, part, index, row, col, k)
    return _exchange(index, kept, joining, grown, torch.searchsorted(index, joining))


def _segments(entries: FlatEntries, part: Part) -> Segments:
    sizes = on_device(entries.counts[part.weights], torch.int64, entries.device)
    return Segments(sizes, part.count)


def _from_zero(flags: Tensor) -> Tensor:
    """Count the flags before each of n elements, and all of them: [n + 1] int64."""
    running = torch.zeros(flags.numel() + 1, dtype=torch.int64, device=flags.device)
    torch.cumsum(flags, 0, out=running[1:])
    return running


def _marked(count: int, flags: Tensor, places: Tensor) -> Tensor:
    """Mark the places [c] whose flag [c] is set: [count] bool."""
    marks = torch.zeros(count + 1, dtype=torch.bool, device=flags.device)
    return marks.index_fill_(0, torch.where(flags, places, count), True)[:count]


def _exchange(index: Tensor, kept: Tensor, joining: Tensor, grown: Tensor, place: Tensor) -> Exchange:
    """Merge the indices that stay with those that are grown; each weight has as many as before.

    Args:
        index: [n] sorted. kept: [n] bool.
        joining: [c] sorted. grown: [c] bool. place: [c], how many of `index` are smaller than each.
    """
    n, c = index.numel(), joining.numel()
    kept_before, grown_before = _from_zero(kept), _from_zero(grown)
    of_kept = kept_before[:-1] + grown_before.index_select(0, torch.searchsorted(joining, index))
    of_grown = grown_before[:-1] + kept_before.index_select(0, place)
    order = torch.empty(n + 1, dtype=torch.int64, device=index.device)  # the last takes what is in neither
    sources = torch.arange(n + c, device=index.device)
    order.scatter_(0, torch.where(kept, of_kept, n), sources[:n])
    order.scatter_(0, torch.where(grown, of_grown, n), sources[n:])
    return Exchange(kept=kept, grown=joining, order=order[:n], count=grown_before[-1])
