"""Drop and grow in many weights at once: the choices of `drop_grow`, in a few launches however many weights there are.

Shapes: W weights one after the other; n active entries of all, c that may join them; K, C, k of one weight, as in
`drop_grow`; R rows of all weights. Indices are joined: flat indices in all weights, one after the other, so they are
sorted over all. Nothing but the number of entries that may join is read by the host, and that only in SFT-MA.

A weight's best entries are found by one sort of all: keys are (number of the weight, bits of the score), as the bits of
non-negative floats sort like the numbers. Sorts are stable, so ties go to the smaller index. The caller bounds n, as
temporaries take up to 110 bytes per active entry in SFT-AG, with as many candidates, and 75 in SFT-MA.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .drop_grow import Exchange
from .indices import FlatEntries, Part, on_device
from .joined_product import largest_products

_NEVER = 1 << 31  # sorts behind the bits of every number


class Segments:
    """Consecutive parts of a tensor [n], one for each weight, of sizes that the host knows or does not.

    Args:
        sizes: [W] int64 on the device.
        total: n, their sum.
    """

    def __init__(self, sizes: Tensor, total: int):
        self.ends = sizes.cumsum(0)
        self.starts = self.ends - sizes
        self.owner = torch.repeat_interleave(sizes.int(), output_size=total)
        """The number of each element's weight: [n] int32."""

    def of_each(self, values: Tensor) -> Tensor:
        """Give each element its weight's value: [n] of [W]."""
        return values.index_select(0, self.owner)

    def counted(self, flags: Tensor) -> tuple[Tensor, Tensor]:
        """Count `flags` [n] bool: those up to each element in its weight, [n]; all in each weight, [W]."""
        running = _from_zero(flags)
        before = running.index_select(0, self.starts)
        return running[1:] - self.of_each(before), running.index_select(0, self.ends) - before

    def sorted(self, low: Tensor) -> Tensor:
        """Sort by weight, then by `low` [n], integers from 0 to 2^32 - 1, then by place: the order, [n]."""
        return torch.sort((self.owner.long() << 32).add_(low), stable=True).indices

    def rank(self) -> Tensor:
        """Count each element's place in its weight: [n]."""
        return torch.arange(self.owner.numel(), device=self.owner.device).sub_(self.of_each(self.starts))

    def first(self, low: Tensor, wanted: Tensor) -> Tensor:
        """Mark the first `wanted` [W] of each weight in the order of `sorted`: [n] bool."""
        chosen = self.rank() < self.of_each(wanted)
        return torch.empty_like(chosen).scatter_(0, self.sorted(low), chosen)


def sort_bits(values: Tensor) -> Tensor:
    """Return the bits of non-negative floats as int32, which sort like the numbers."""
    return values.float().view(torch.int32)


def exchange_by_gradient(
    active: FlatEntries, candidates: FlatEntries, part: Part, scores: Tensor, ranking: Tensor, wanted: Sequence[int]
) -> Exchange:
    """Drop and grow by gradient in each weight of a part: see `drop_grow.exchange_by_gradient`.

    Args:
        active, candidates: the entries of all weights.
        part: whole weights.
        scores: [n] of the part's active entries.
        ranking: [c] of its candidates: the largest magnitudes grow.
        wanted: k of each weight.
    """
    of_candidates = candidates.part_of(part.weights)
    index, joining = active.joined(part), candidates.joined(of_candidates)
    place = torch.searchsorted(index, joining)
    at = place.clamp(max=index.numel() - 1)
    is_active = index.index_select(0, at) == joining
    others = _segments(candidates, of_candidates)
    fresh = others.counted(is_active.logical_not())[1]
    k = on_device(wanted, torch.int64, index.device)
    dropped, growing = _dropped(_segments(active, part), scores, _marked(index.numel(), is_active, at), fresh, k)
    eligible = is_active.logical_not().logical_or_(dropped.index_select(0, at))
    chosen = others.first((_NEVER - 1) - sort_bits(ranking.abs()).long().masked_fill_(~eligible, -1), growing)
    kept = dropped.logical_not_().logical_or_(_marked(index.numel(), chosen & is_active, at))
    return _exchange(index, kept, joining, chosen.logical_and_(is_active.logical_not_()), place)


def _dropped(
    entries: Segments, scores: Tensor, is_candidate: Tensor, fresh: Tensor, k: Tensor
) -> tuple[Tensor, Tensor]:
    """Drop the k [W] smallest scores of each weight, or as many as can grow: see `drop_grow._growable`.

    Args:
        entries: the active ones. scores: [n]. is_candidate: [n].
        fresh: [W], the inactive candidates.

    Returns:
        ([n] bool, [W] how many).
    """
    order = entries.sorted(sort_bits(scores))
    leaving = entries.counted(is_candidate.index_select(0, order).logical_not_())[0]
    drops = (leaving <= entries.of_each(fresh)).logical_and_(entries.rank() < entries.of_each(k))
    return torch.empty_like(drops).scatter_(0, order, drops), entries.counted(drops)[1]


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
    k = k * _touched(active, part, row)
    kept = entries.first(sort_bits(scores), k).logical_not_()
    joining, grown = largest_products(active, part, index, row, col, k)
    return _exchange(index, kept, joining, grown, torch.searchsorted(index, joining))


def _touched(entries: FlatEntries, part: Part, row: Tensor) -> Tensor:
    """Tell which weights of a part a gradient has ever reached, by their accumulators `row` [R]: [W] bool."""
    rows, starts = entries.rows.of(part.weights), entries.rows.starts
    # the last row of each weight is empty
    firsts = [start - rows.start for start in starts[part.weights]]
    ends = [start - rows.start - 1 for start in starts[part.weights.start + 1 : part.weights.stop + 1]]
    before = _from_zero(row[rows] > 0).index_select(0, on_device(firsts + ends, torch.int64, row.device))
    first, end = before.chunk(2)
    return end > first


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
