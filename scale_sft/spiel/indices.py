"""The indices of active entries, in 2 bytes each: of one weight, and of all weights in two buffers.

Shapes: O rows, I columns of a weight; K active entries, sorted by row and column. R rows of all weights, each with one
more at its end, which is empty.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate

import torch
from torch import Tensor

PIECE_ENTRIES = 1 << 18
"""Entries at once on a CPU: temporaries stay in its cache."""
DEVICE_PIECE_ENTRIES = 1 << 26
"""Entries at once elsewhere: few launches; temporaries take up to 32 bytes for each of them."""
_NARROW = 1 << 16


def wrong_with_indices(indices: Tensor, shape: tuple[int, int]) -> str | None:
    """Explain why `indices` cannot be those of a weight of `shape`: integers [K], in range, sorted, unique; or None."""
    if indices.dim() != 1 or indices.dtype not in (torch.int32, torch.int64):
        return f"indices are {tuple(indices.shape)} {indices.dtype}, expected one row of integers"
    if indices.numel() and (int(indices.min()) < 0 or int(indices.max()) >= shape[0] * shape[1]):
        return f"an index is outside the weight of shape {shape}"
    if bool((indices[1:] <= indices[:-1]).any()):
        return "indices are not sorted and unique"
    return None


class Entries:
    """K entries of an [O, I] weight, stored as compressed rows.

    The published code keeps 4 bytes per sorted flat index; columns take 2, and the start of a row 4.

    Args:
        indices: [K] sorted, unique flat indices i * I + j, any integer type; None: `into` is set later.
        shape: (O, I).
        into: (row_starts [O + 1] int32, columns [K] uint16 or int32) to keep them in; None: new tensors, uint16 where
            I <= 65,536.
    """

    def __init__(self, indices: Tensor | None, shape: tuple[int, int], into: tuple[Tensor, Tensor] | None = None):
        self.shape, self.dtype = shape, index_dtype(shape[0] * shape[1])
        if into is None:
            if indices is None:
                raise ValueError("entries: got neither indices nor tensors, expected one of them")
            into = (
                torch.empty(shape[0] + 1, dtype=torch.int32, device=indices.device),
                torch.empty(indices.numel(), dtype=_dtype_of_columns(shape[1]), device=indices.device),
            )
        self.count = into[1].numel()
        self._row_starts, self._columns = into
        if indices is not None:
            self.replace(indices)

    def replace(self, indices: Tensor) -> None:
        """Take over other indices [K], in place, without waiting for the device."""
        rows, width = self.shape
        if indices.dtype not in (torch.int32, torch.int64):
            indices = indices.to(self.dtype)
        first_of_row = torch.arange(0, rows * width, width, dtype=indices.dtype, device=indices.device)
        self._row_starts[:-1] = torch.searchsorted(indices, first_of_row, out_int32=True)
        self._row_starts[-1:].fill_(self.count)
        for part in pieces(self.count, piece_entries(indices.device)):
            self._columns[part] = (indices[part] % width).to(self._columns.dtype)

    def flat(self) -> Tensor:
        """Compute the [K] flat indices: a new tensor, int32 (int64 where O * I does not fit)."""
        counts = (self._row_starts[1:] - self._row_starts[:-1]).to(self.dtype)
        rows = torch.repeat_interleave(counts, output_size=self.count)
        return rows.mul_(self.shape[1]).add_(self._columns.to(self.dtype))

    def csr(self) -> tuple[Tensor, Tensor]:
        """Return (row_starts [O + 1] int32, columns [K] uint16 or int32): the stored tensors."""
        return self._row_starts, self._columns

    def coordinates(self) -> Iterator[tuple[slice, Tensor, Tensor]]:
        """Yield (slice of entries, int64 rows, int64 columns) in pieces, so that no int64 copy of all is made."""
        width, flat = self.shape[1], self.flat()
        for part in pieces(self.count, piece_entries(flat.device)):
            rows = torch.div(flat[part], width, rounding_mode="floor")
            columns = torch.sub(flat[part], rows, alpha=width)
            yield part, rows.long(), columns.long()

    @property
    def tensors(self) -> list[Tensor]:
        """Return the tensors that are kept."""
        return [self._row_starts, self._columns]


@dataclass(frozen=True)
class Part:
    """Some consecutive weights, whole, or a part of one: a slice of weights, and one of all entries."""

    weights: slice
    entries: slice
    whole: bool = True

    @property
    def count(self) -> int:
        """Count the entries."""
        return self.entries.stop - self.entries.start

    @property
    def numbers(self) -> range:
        """List the weights by their numbers."""
        return range(self.weights.start, self.weights.stop)


class Rows:
    """The rows of all weights one after the other, each weight with one more, which stays empty.

    Args:
        shapes: (O, I) of each weight.
        device: where tensors are made.
    """

    def __init__(self, shapes: Sequence[tuple[int, int]], device: torch.device):
        self.shapes, self.device = list(shapes), device
        self.sizes = [rows + 1 for rows, _ in self.shapes]
        self.starts = _offsets(self.sizes)  # [W + 1]: the first row of each weight
        self.first_columns = _offsets([width for _, width in self.shapes])  # [W + 1]: in the columns of all weights

    def of(self, weights: slice) -> slice:
        """Return the rows of some weights."""
        return slice(self.starts[weights.start], self.starts[weights.stop])

    def offsets(self, weights: slice) -> list[int]:
        """Return where each of some weights begins among all of their entries, active or not, and where they end."""
        return _offsets([rows * width for rows, width in self.shapes[weights]])

    def spread(self, values: Sequence[int] | Tensor, weights: slice) -> Tensor:
        """Repeat each weight's value for each of its rows: int64, or the dtype of a tensor of them."""
        rows = self.of(weights)
        if not isinstance(values, Tensor):
            values = on_device(values, torch.int64, self.device)
        sizes = on_device(self.sizes[weights], torch.int64, self.device)
        return values.index_select(0, torch.repeat_interleave(sizes, output_size=rows.stop - rows.start))

    @cached_property
    def first_entries(self) -> Tensor:
        """The flat index at which each row begins in its weight: [R] int64."""
        every = slice(0, len(self.shapes))
        found = torch.arange(self.starts[-1], device=self.device).sub_(self.spread(self.starts[:-1], every))
        return found.mul_(self.spread([width for _, width in self.shapes], every))

    @cached_property
    def columns_before(self) -> Tensor:
        """The number of columns of all weights before each row's own: [R] int64."""
        return self.spread(self.first_columns[:-1], slice(0, len(self.shapes)))


class FlatEntries:
    """The entries of all weights in two buffers, so that one operation covers many weights.

    Args:
        rows: the rows of the weights.
        counts: K of each weight.
    """

    def __init__(self, rows: Rows, counts: Sequence[int]):
        self.rows, self.counts, self.device = rows, list(counts), rows.device
        self.starts = _offsets(self.counts)  # [W + 1]: the first entry of each weight
        dtype = _dtype_of_columns(max((width for _, width in rows.shapes), default=0))
        self._columns = torch.empty(self.starts[-1], dtype=dtype, device=self.device)
        self._row_starts = torch.zeros(rows.starts[-1] + 1, dtype=torch.int32, device=self.device)

    def entries(self, number: int) -> Entries:
        """Return the entries of one weight, as views of the buffers; they may still have to be set."""
        first, after = self.rows.starts[number : number + 2]
        columns = self._columns[self.starts[number] : self.starts[number + 1]]
        return Entries(None, self.rows.shapes[number], (self._row_starts[first:after], columns))

    def of_weight(self, number: int, indices: Tensor) -> Entries:
        """Set the entries of one weight; returns them as views of the buffers."""
        entries = self.entries(number)
        entries.replace(indices)
        return entries

    def range_of(self, number: int) -> slice:
        """Return where one weight's entries are among all."""
        return slice(self.starts[number], self.starts[number + 1])

    def part_of(self, weights: slice) -> Part:
        """Describe some whole weights."""
        return Part(weights, slice(self.starts[weights.start], self.starts[weights.stop]))

    def groups(self, numbers: Sequence[int] | None = None, limit: int | None = None) -> Iterator[Part]:
        """Yield parts of consecutive whole weights: as many as have at most `limit` entries together, at least one.

        Args:
            numbers: ascending; None: all weights.
            limit: None: `piece_entries` of the device.
        """
        limit, first = limit or piece_entries(self.device), 0
        numbers = range(len(self.counts)) if numbers is None else numbers
        for place, number in enumerate(numbers):
            following = numbers[place + 1] if place + 1 < len(numbers) else None
            if following != number + 1 or self.starts[following + 1] - self.starts[numbers[first]] > limit:
                weights = slice(numbers[first], number + 1)
                yield self.part_of(weights)
                first = place + 1

    def parts(self) -> Iterator[Part]:
        """Yield parts of at most `piece_entries` of the device: whole weights, or a part of one."""
        limit = piece_entries(self.device)
        for group in self.groups():
            if group.count <= limit:
                yield group
                continue
            for piece in pieces(group.count, limit):
                start = group.entries.start
                yield Part(group.weights, slice(start + piece.start, start + piece.stop), False)

    def row_of_each(self, part: Part) -> Tensor:
        """Find the row of each entry [n] int32, counted from the first row of the part's weights."""
        rows = self.rows.of(part.weights)
        starts = self._row_starts[rows.start : rows.stop + 1]
        if not part.whole:
            first = self.starts[part.weights.start]
            starts = starts.clamp(part.entries.start - first, part.entries.stop - first)
        counts = (starts[1:] - starts[:-1]).clamp_(min=0)  # after a weight's empty row the next one starts at 0
        return torch.repeat_interleave(counts, output_size=part.count)

    def flat(self, part: Part, shifts: Sequence[int] | None = None) -> Tensor:
        """Compute the flat index of each entry in its own weight: [n] int64, or int32 for one weight where it fits.

        Args:
            part: of the entries.
            shifts: of each of its weights: what to add to its indices.
        """
        row = self.row_of_each(part)
        if len(part.numbers) == 1:
            height, width = self.rows.shapes[part.weights.start]
            dtype = index_dtype(height * width)
            found = row.to(dtype).mul_(width).add_(self._columns[part.entries].to(dtype))
            shift = shifts[0] if shifts else 0
            if height * width + shift > torch.iinfo(dtype).max:
                found = found.long()
            return found.add_(shift) if shift else found
        first = self.rows.first_entries[self.rows.of(part.weights)]
        if shifts is not None and any(shifts):
            first = first + self.rows.spread(shifts, part.weights)
        return first.index_select(0, row).add_(self.columns(part))

    def joined(self, part: Part) -> Tensor:
        """Compute the flat index of each entry in the part's weights, one after the other: [n], sorted, as `flat`."""
        return self.flat(part, self.rows.offsets(part.weights)[:-1])

    def replace(self, part: Part, joined: Tensor) -> None:
        """Take over other indices of some whole weights: [n], `joined` and sorted, as many of each weight as before."""
        rows, weights = self.rows.of(part.weights), part.weights
        first = self.rows.first_entries[rows] + self.rows.spread(self.rows.offsets(weights)[:-1], weights)
        starts = torch.searchsorted(joined, first.to(joined.dtype), out_int32=True)
        before = [start - part.entries.start for start in self.starts[weights]]
        self._row_starts[rows] = starts - self.rows.spread(before, weights)
        columns = joined - first.index_select(0, self.row_of_each(part))
        self._columns[part.entries] = columns.to(self._columns.dtype)

    def columns(self, part: Part) -> Tensor:
        """Return the column of each entry in its own weight: a new tensor, [n] int64."""
        return self._columns[part.entries].to(torch.int64, copy=True)

    def coordinates(self) -> Iterator[tuple[slice, Tensor, Tensor]]:
        """Yield (slice of all entries, int64 rows, int64 columns), rows and columns of all weights, in pieces."""
        for part in self.parts():
            row, columns, rows = self.row_of_each(part), self.columns(part), self.rows.of(part.weights)
            if len(part.numbers) == 1:
                columns.add_(self.rows.first_columns[part.weights.start])
            else:
                columns.add_(self.rows.columns_before[rows].index_select(0, row))
            yield part.entries, row.long().add_(rows.start), columns


class JoinedEntries:
    """The entries of some whole weights, which take the place of one weight's `Entries` in drop and grow.

    Their flat indices are those of `FlatEntries.joined`.
    """

    def __init__(self, entries: FlatEntries, part: Part):
        self._entries, self._part = entries, part

    def flat(self) -> Tensor:
        """Compute the joined indices: [n], sorted."""
        return self._entries.joined(self._part)

    def replace(self, indices: Tensor) -> None:
        """Take over other joined indices [n], in place."""
        self._entries.replace(self._part, indices)


def bytes_of_entries(count: int, rows: int) -> int:
    """Count the bytes that entries take, in a number of rows (one more than it has for each weight)."""
    return 2 * count + 4 * rows


def pieces(count: int, size: int | None = None) -> Iterator[slice]:
    """Yield slices of at most `size` (PIECE_ENTRIES) that cover [0, count)."""
    size = size or PIECE_ENTRIES
    for start in range(0, count, size):
        yield slice(start, min(start + size, count))


def piece_entries(device: torch.device) -> int:
    """Return how many entries an operation should take at once."""
    return PIECE_ENTRIES if device.type == "cpu" else DEVICE_PIECE_ENTRIES


def on_device(values: Sequence[float] | Sequence[Sequence[float]], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Put numbers into a tensor on the device, without waiting for it."""
    pinned = device.type == "cuda"  # a copy from pageable memory may wait for queued work
    return torch.tensor(values, dtype=dtype, pin_memory=pinned).to(device, non_blocking=True)


def _dtype_of_columns(width: int) -> torch.dtype:
    return torch.uint16 if width <= _NARROW else torch.int32


def index_dtype(count: int) -> torch.dtype:
    """Return the dtype for `count` and the indices of as many entries: int32, or int64 where that is too small."""
    return torch.int32 if count <= torch.iinfo(torch.int32).max else torch.int64


def _offsets(sizes: Sequence[int]) -> list[int]:
    return list(accumulate(sizes, initial=0))


def find_places(sorted_: Tensor, wanted: Tensor) -> tuple[Tensor, Tensor]:
    """Find members of a sorted set.

    Args:
        sorted_: [K] with K > 0, sorted and unique. wanted: [M] of the same dtype.

    Returns:
        ([M] int64, [M] bool): places in the set, and whether each is that of an equal member.
    """
    places = torch.searchsorted(sorted_, wanted).clamp_(max=sorted_.numel() - 1)
    return places, sorted_[places] == wanted


def merge_places(sorted_: Tensor, more: Tensor) -> tuple[Tensor, Tensor]:
    """Find where two sorted sets of indices without common members go in their union.

    Args:
        sorted_: [K], more: [M], each sorted and unique.

    Returns:
        ([K], [M]): places of both in the sorted union, int64.
    """
    after = torch.searchsorted(sorted_, more) + torch.arange(more.numel(), device=more.device)
    free = torch.ones(sorted_.numel() + more.numel(), dtype=torch.bool, device=more.device)
    free[after] = False
    return free.nonzero().squeeze(1), after
