"""The largest products row[i] * col[j] of many weights at once, for the growth of SFT-MA (section 3.3).

Shapes: as in `joined_drop_grow`; R rows, C columns of all weights of a part.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .indices import FlatEntries, Part, Rows, on_device

_ROUNDS = [(28, 8), *((shift, 16) for shift in range(24, -1, -4))]
"""(shift, values) of the digits of a threshold's 31 bits, the highest first."""


def largest_products(
    active: FlatEntries, part: Part, index: Tensor, row: Tensor, col: Tensor, k: Tensor
) -> tuple[Tensor, Tensor]:
    """Find each weight's k largest products among inactive entries, without forming the outer product.

    A weight's threshold is found digit by digit: the largest number that at least k free products reach. Rows count
    the columns that reach it by a search in the sorted columns. Products are those of fp32, rounded; ties go to the
    smaller index. See `topk.top_k_of_product`, which handles one weight.

    Args:
        index: [n] joined indices of the active entries, int64, sorted.
        row: [all R] fp32, col: [all C] fp32, non-negative: of all weights.
        k: [W] int64, at most the number of inactive entries.

    Returns:
        ([c] joined indices, sorted; [c] bool, those chosen). The host waits once, for c.
    """
    search = _Search(active, part, row, col)
    of_row = active.row_of_each(part)
    products = search.products(of_row, active.columns(part))
    owner = search.weight_of_row.index_select(0, of_row)
    taken = torch.sort(search.keys_of_rows.index_select(0, of_row).add_(products.view(torch.int32))).values
    bits = torch.zeros_like(k)
    for shift, values in _ROUNDS:
        digits = torch.arange(1 << shift, values << shift, 1 << shift, device=k.device)
        free = search.free(bits[:, None] + digits, taken)
        bits += (free >= k[:, None]).sum(1) << shift

    # All above the threshold, and so many whole rows of those at it that enough of them are free.
    above, reached = search.per_row((bits + 1)[:, None])[:, 0], search.per_row(bits[:, None])[:, 0]
    reached = torch.where(search.of_rows(bits) == 0, search.width, reached)
    wanted = k - search.free((bits + 1)[:, None], taken)[:, 0]
    at_threshold = products.view(torch.int32) == bits.index_select(0, owner)
    level = reached - above
    level_taken = torch.zeros_like(level).index_add_(0, of_row, at_threshold.long())
    free_level = (level - level_taken).cumsum(0)
    first = search.rows_before
    before = torch.cat((free_level.new_zeros(1), free_level))
    in_weight = before[:-1] - search.of_rows(before.index_select(0, first))
    count = above + torch.where(in_weight < search.of_rows(wanted), level, 0)
    return _chosen(search, index, above, count, wanted)


def _chosen(search: _Search, index: Tensor, above: Tensor, count: Tensor, wanted: Tensor) -> tuple[Tensor, Tensor]:
    """List the `count` largest of each row [R], and choose: free ones of the first `above` [R], and `wanted` others.

    `wanted` [W]: of each weight, in the order of their indices.
    """
    ends = count.cumsum(0)
    total = int(ends[-1])
    rows = torch.repeat_interleave(count, output_size=total)
    within = torch.arange(total, device=rows.device).sub_((ends - count).index_select(0, rows))
    is_level = within >= above.index_select(0, rows)
    joined = search.joined(rows, within)
    joined, order = torch.sort(joined)
    is_level, owner = is_level.index_select(0, order), search.weight_of_row.index_select(0, rows)
    place = torch.searchsorted(index, joined).clamp_(max=index.numel() - 1)
    free = index.index_select(0, place) != joined
    running = torch.zeros(total + 1, dtype=torch.int64, device=rows.device)
    torch.cumsum(free & is_level, 0, out=running[1:])
    # Rows are in the order of weights, before the sort and after it.
    start_of_weight = torch.cat((ends.new_zeros(1), ends)).index_select(0, search.rows_before)
    before = running.index_select(0, start_of_weight) + wanted
    return joined, free & (is_level.logical_not() | (running[1:] <= before.index_select(0, owner)))


class _Search:
    """The accumulators of a part's weights, with their columns sorted."""

    def __init__(self, active: FlatEntries, part: Part, row: Tensor, col: Tensor):
        rows, weights, device = active.rows, part.weights, active.device
        numbers = torch.arange(len(part.numbers), device=device)
        self.weight_of_row = rows.spread(numbers, weights)
        self.keys_of_weights, self.keys_of_rows = numbers << 32, self.weight_of_row << 32
        sizes = on_device([columns for _, columns in rows.shapes[weights]], torch.int64, device)
        self.column_ends = sizes.cumsum(0)
        self.width = self._not_in_empty_rows(rows, weights, sizes)
        self.row = torch.where(self.width > 0, row[rows.of(weights)], 0)
        columns = slice(rows.first_columns[weights.start], rows.first_columns[weights.stop])
        self.col = col[columns]
        weight_of_column = torch.repeat_interleave(sizes, output_size=columns.stop - columns.start)
        keys = (weight_of_column << 32).add_(self.col.view(torch.int32))
        self.keys, self.order = torch.sort(keys)
        self.columns_before = self.of_rows(self.column_ends - sizes)
        self.last_column = self.of_rows(self.column_ends)
        offsets = on_device(rows.offsets(weights)[:-1], torch.int64, device)
        self.first_joined = rows.first_entries[rows.of(weights)] + self.of_rows(offsets)
        first = rows.starts[weights.start]
        self.rows_before = on_device([start - first for start in rows.starts[weights]], torch.int64, device)
        self.entry_ends = on_device(active.counts[weights], torch.int64, device).cumsum(0)

    def of_rows(self, values: Tensor) -> Tensor:
        """Give each row its weight's value: [R] of [W], or [R, m] of [W, m]."""
        return values.index_select(0, self.weight_of_row)

    def _not_in_empty_rows(self, rows: Rows, weights: slice, sizes: Tensor) -> Tensor:
        """Return the columns of each row [R]; none in the last row of each weight, which is empty."""
        lasts = [stop - 1 - rows.starts[weights.start] for stop in rows.starts[weights.start + 1 : weights.stop + 1]]
        return self.of_rows(sizes).index_fill_(0, on_device(lasts, torch.int64, sizes.device), 0)

    def products(self, rows: Tensor, columns: Tensor) -> Tensor:
        """Compute row[i] * col[j] of entries [n]: rows of the part, columns of their weight."""
        places = columns.add_(self.columns_before.index_select(0, rows))
        return self.row.index_select(0, rows) * self.col.index_select(0, places)

    def free(self, bits: Tensor, taken: Tensor) -> Tensor:
        """Count the inactive entries of each weight whose product reaches the numbers of bits [W, m]: [W, m].

        `taken`: [n] sorted keys of the active entries' products.
        """
        reached = torch.zeros_like(bits).index_add_(0, self.weight_of_row, self.per_row(bits))
        active = self.entry_ends[:, None] - torch.searchsorted(taken, self.keys_of_weights[:, None] + bits)
        return reached - active

    def per_row(self, bits: Tensor) -> Tensor:
        """Count the columns of each row whose product, rounded to fp32, reaches the positive numbers of bits [W, m].

        With t such a number, fl(row * c) >= t holds from some column c on. In fp64 products of fp32 numbers are exact,
        so it holds where row * c is at least, or beyond, the middle between t and the number before it. The quotient
        of this and the row is rounded, but to an fp64 number, among which the fp32 numbers are: it is on the same side
        of any c that it does not equal. So c is the quotient rounded up to fp32, or the number after it.

        Returns:
            [R, m] int64.
        """
        threshold, before = bits.int().view(torch.float32), (bits - 1).int().view(torch.float32)
        unbounded = threshold.double().clamp(max=2.0**128)  # an infinity is what rounds to 2^128
        middle = unbounded.add_(before).div_(2).nan_to_num_(torch.inf)  # nothing reaches what is no number
        quotient = self.of_rows(middle).div_(self.row[:, None])
        column = quotient.float()
        column_bits = column.view(torch.int32) + (column.double() < quotient)
        column_bits += self.row[:, None] * column_bits.view(torch.float32) < self.of_rows(threshold)
        found = torch.searchsorted(self.keys, self.keys_of_rows[:, None] + column_bits)
        return self.last_column[:, None] - found

    def joined(self, rows: Tensor, within: Tensor) -> Tensor:
        """Compute the joined index of the column that comes after `within` larger ones in a row: [c] of [c], [c]."""
        places = self.last_column.index_select(0, rows).sub_(within).sub_(1)
        column = self.order.index_select(0, places).sub_(self.columns_before.index_select(0, rows))
        return column.add_(self.first_joined.index_select(0, rows))
