"""Deterministic top-k: of a long vector, and of an outer product that is never formed.

Shapes: N entries, k chosen, O rows, I columns, E excluded entries. All ties go to the smaller index, so that every
rank and every device chooses the same entries.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .indices import find_places

CHUNK_ENTRIES = 1 << 22
SAMPLE_ENTRIES = 1 << 15


def top_k_magnitude(values: Tensor, k: int) -> Tensor:
    """Find the `k` entries of largest magnitude: their indices, sorted ascending; ties go to the smaller index.

    NaN counts as smaller than any number: a broken gradient stops the run at a point that all ranks reach, not here on
    some of them.

    The vector is read in chunks against a floor estimated from a strided sample, so that temporaries stay near `k`
    entries and one chunk, however long the vector is. A wrong estimate only costs time.

    Args:
        values: [N] floating point, any device.
        k: 0 <= k <= N.

    Returns:
        [k] int64, ascending.

    Raises:
        ValueError: k is out of range.
    """
    n = values.numel()
    if not 0 <= k <= n:
        raise ValueError(f"top-k of a vector: k must be in [0, {n}], got {k}")
    if k == 0:
        return torch.empty(0, dtype=torch.int64, device=values.device)
    for floor in (_sampled_floor(values, k), 0.0):
        found, magnitudes = _entries_from(values, floor, k)
        if found.numel() >= k:
            return found[top_k_sorted(magnitudes, k)]
    return torch.cat((found, _first_without_number(values, k - found.numel()))).sort().values


def unless_zero(values: Tensor, chosen: Tensor) -> Tensor:
    """Return the indices `chosen` [k] of the largest of `values` [N], or [0] if all values are 0.

    An expert that met no token has such a gradient: which entries should grow cannot be told from it.
    """
    return chosen if bool(values[chosen].any()) else chosen[:0]


def largest_magnitudes(values: Tensor, k: int) -> Tensor:
    """Find the same indices as `top_k_magnitude`; [0] if all of `values` are 0."""
    return unless_zero(values, top_k_magnitude(values, k))


def top_k_sorted(scores: Tensor, k: int) -> Tensor:
    """Find the positions of the `k` largest scores, ascending; of equal scores the smaller positions.

    Args:
        scores: [N] real numbers, any sign, no NaN.
        k: 0 <= k <= N.

    Returns:
        [k] int64, ascending.
    """
    if k == 0:
        return torch.empty(0, dtype=torch.int64, device=scores.device)
    threshold = torch.topk(scores, k, sorted=False).values.min()
    above = scores > threshold
    level = (scores == threshold).nonzero().squeeze(1)
    above[level[: k - int(above.sum())]] = True
    return above.nonzero().squeeze(1)


def bottom_k_sorted(scores: Tensor, k: int) -> Tensor:
    """Find the positions of the `k` smallest scores [N], ascending int64; of equal scores the smaller positions."""
    return top_k_sorted(-scores, k)


def _sampled_floor(values: Tensor, k: int) -> float:
    """Estimate from a strided sample a magnitude that slightly more than k entries reach; 0 if it cannot tell.

    The stride is odd: widths of weights are multiples of powers of two, and an even one would see few columns.
    """
    n = values.numel()
    if n <= SAMPLE_ENTRIES:
        return 0.0
    sample = values[:: max(1, n // SAMPLE_ENTRIES) | 1].abs()
    expected = k * sample.numel() / n
    rank = int(1.05 * expected + 4 * expected**0.5) + 8  # four standard deviations on the safe side
    if rank >= sample.numel():
        return 0.0
    floor = float(torch.topk(sample.float(), rank, sorted=False).values.min())
    return floor if floor == floor else 0.0


def _entries_from(values: Tensor, floor: float, k: int) -> tuple[Tensor, Tensor]:
    """Collect indices (ascending) and magnitudes of entries of magnitude >= floor: all that can be in the top k.

    Once many more than `k` entries have gathered, they are cut to the top k so far, and from then on only entries
    larger than the smallest of them count. As ties go to the smaller index, an entry left out cannot come back.
    """
    found, magnitudes, gathered, full = [], [], 0, False
    for start in range(0, values.numel(), CHUNK_ENTRIES):
        chunk = values[start : start + CHUNK_ENTRIES].abs()
        inside = (chunk > floor if full else chunk >= floor).nonzero().squeeze(1)
        magnitudes.append(chunk[inside])
        found.append(inside.add_(start))
        gathered += inside.numel()
        if gathered > 2 * k + CHUNK_ENTRIES:
            indices, kept = torch.cat(found), torch.cat(magnitudes)
            best = top_k_sorted(kept, k)
            found, magnitudes, gathered, full = [indices[best]], [kept[best]], k, True
            floor = float(magnitudes[0].min())
    return torch.cat(found), torch.cat(magnitudes)


def _first_without_number(values: Tensor, count: int) -> Tensor:
    """Find the first `count` NaN entries, or all if there are fewer: indices, int64, ascending."""
    found, missing = [torch.empty(0, dtype=torch.int64, device=values.device)], count
    for start in range(0, values.numel(), CHUNK_ENTRIES):
        if missing <= 0:
            break
        inside = values[start : start + CHUNK_ENTRIES].isnan().nonzero().squeeze(1)[:missing]
        found.append(inside + start)
        missing -= inside.numel()
    return torch.cat(found)


def in_sorted(needles: Tensor, haystack: Tensor) -> Tensor:
    """Mark the `needles` [k] that occur in `haystack` [E], sorted ascending: [k] bool."""
    if haystack.numel() == 0:
        return torch.zeros(needles.shape, dtype=torch.bool, device=needles.device)
    return find_places(haystack, needles.to(haystack.dtype))[1]


def top_k_of_product(row: Tensor, col: Tensor, k: int, excluded: Tensor) -> Tensor:
    """Find the `k` largest products row[i] * col[j] outside `excluded` (section 3.3, growth of SFT-MA).

    The outer product is never formed. Products of non-negative floats are monotone in each factor, also after
    rounding, so the number of products that reach a threshold is a binary search per row over the sorted columns;
    the threshold itself is bisected over the bit patterns of non-negative floats, which are ordered as the numbers are.
    Each search starts from the interval that earlier searches left.
    Differs from the paper: the fourth root of Eq. 10 is left out, as it does not change the order.

    Args:
        row: [O] fp32, non-negative.
        col: [I] fp32, non-negative.
        k: 0 <= k <= O * I - E.
        excluded: [E] flat indices i * I + j, sorted ascending, unique.

    Returns:
        [k] int64 flat indices, ascending; ties of the (rounded) product go to the smaller one. Memory: O(O log I + k +
        E).
    """
    n_free = row.numel() * col.numel() - excluded.numel()
    if not 0 <= k <= n_free:
        raise ValueError(f"top-k of an outer product: k must be in [0, {n_free}], got {k}")
    if k == 0:
        return torch.empty(0, dtype=torch.int64, device=row.device)
    width = col.numel()
    excluded = excluded.long()
    excluded_row, excluded_col = excluded // width, excluded % width
    excluded_product = row[excluded_row] * col[excluded_col]
    col_sorted, col_order = torch.sort(col, descending=True, stable=True)
    columns = torch.cat((col_sorted, col_sorted.new_full((1,), torch.nan)))  # nothing reaches beyond the last

    # at_least: entries per row that reach `low`; above: those that reach `high`. Both close in on the threshold, until
    # it is found, or so few entries are between them that each can be examined.
    low, high = 0, int((row.max() * col.max()).view(torch.int32)) + 1  # free(low) >= k > free(high)
    above = torch.zeros(row.shape, dtype=torch.int64, device=row.device)
    at_least = torch.full_like(above, width)
    between, few = row.numel() * width, row.numel() + width + k // 4
    while high - low > 1 and between > few:
        middle = (low + high) // 2
        threshold = _from_bits(middle, row)
        reached = _reached_per_row(row, columns, threshold, above, at_least)
        if int(reached.sum() - (excluded_product >= threshold).sum()) >= k:
            low, at_least = middle, reached
        else:
            high, above = middle, reached
        between = int((at_least - above).sum())

    rows = torch.arange(row.numel(), device=row.device)
    strictly = _flat_entries(rows, torch.zeros_like(above), above, col_order)
    strictly = strictly[~in_sorted(strictly, excluded)]
    wanted = k - strictly.numel()
    if high - low == 1:
        # Entries between them equal the threshold: the first in flat order, which are whole rows, then part of one.
        level_excluded = torch.bincount(excluded_row[excluded_product == _from_bits(low, row)], minlength=row.numel())
        free_level = (at_least - above - level_excluded).cumsum(0)
        rows = rows[: int(torch.searchsorted(free_level, wanted)) + 1]
    level = _flat_entries(rows, above[: rows.numel()], at_least[: rows.numel()], col_order)
    level = level[~in_sorted(level, excluded)].sort().values
    level = level[top_k_sorted(row[level // width] * col[level % width], wanted)]
    return torch.cat((strictly, level)).sort().values


def _from_bits(bits: int, like: Tensor) -> Tensor:
    """Make the non-negative float of bit pattern `bits`, as a scalar tensor on the device of `like`."""
    return torch.tensor(bits, dtype=torch.int32, device=like.device).view(torch.float32)


def _reached_per_row(row: Tensor, columns: Tensor, threshold: Tensor, low: Tensor, high: Tensor) -> Tensor:
    """Count per row the descending `columns` [I + 1, last NaN] for which fl(row[i] * column) >= threshold: [O] int64.

    The count is known to be in [low, high], both [O]: the closer they are, the fewer steps this takes.
    """
    for _ in range(int((high - low).max()).bit_length()):
        middle = (low + high) >> 1
        reaches = row * columns[middle] >= threshold
        low, high = torch.where(reaches, middle + 1, low), torch.where(reaches, high, middle)
    return low


def _flat_entries(rows: Tensor, start: Tensor, stop: Tensor, col_order: Tensor) -> Tensor:
    """Return flat indices of columns col_order[start[r]:stop[r]] of each row r, unordered within a row."""
    count = stop - start
    owner = torch.repeat_interleave(torch.arange(rows.numel(), device=rows.device), count)
    first = count.cumsum(0) - count
    within = torch.arange(owner.numel(), device=rows.device) - first[owner] + start[owner]
    return rows[owner] * col_order.numel() + col_order[within]
