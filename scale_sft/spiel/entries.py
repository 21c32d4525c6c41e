"""Which entries of a weight are active, in few bytes.

Shapes: O rows, I columns of a weight; K active entries, sorted by row and column.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

PIECE_ENTRIES = 1 << 18
_MOST_COLUMNS = 1 << 16


class Entries:
    """K entries of an [O, I] weight as compressed sparse rows: 2 bytes per entry and 4 per row.

    The sorted flat indices, of which the published code keeps 4 bytes per entry, are made from them one weight at a
    time when they are asked for. Weights with fewer than two entries per row, or more than 65,536 columns, keep the
    flat indices themselves, which are smaller there.

    Args:
        indices: [K] sorted, unique flat indices i * I + j, any integer type.
        shape: (O, I).
    """

    def __init__(self, indices: Tensor, shape: tuple[int, int]):
        rows, width = shape
        self.shape, self.count = shape, indices.numel()
        fits = rows * width <= torch.iinfo(torch.int32).max
        self.dtype = torch.int32 if fits else torch.int64
        self._flat = self._row_starts = self._columns = None
        if _in_rows(shape, self.count):
            self._row_starts, self._columns = _compress(indices, shape)
        else:
            self._flat = indices.to(self.dtype)

    def flat(self) -> Tensor:
        """[K] flat indices, int32 (int64 where O * I does not fit). Not to be written to."""
        if self._flat is not None:
            return self._flat
        return self._rows().mul_(self.shape[1]).add_(self._columns.to(self.dtype))

    def _rows(self) -> Tensor:
        """[K] row of each entry. No int64 copy is made."""
        rows = torch.zeros(self.count + 1, dtype=self.dtype, device=self._columns.device)
        one = torch.ones((), dtype=self.dtype, device=rows.device).expand(self.shape[0] - 1)
        rows.index_add_(
            0, self._row_starts[1:-1], one
        )  # each row that begins; those without entries add up at one place
        return rows.cumsum_(0)[:-1]

    def csr(self) -> tuple[Tensor, Tensor]:
        """(row_starts [O + 1] int32, columns [K] uint16, or int32 where I > 65,536): views where they are kept."""
        if self._flat is None:
            return self._row_starts, self._columns
        return _compress(self._flat, self.shape)

    def coordinates(self) -> Iterator[tuple[slice, Tensor, Tensor]]:
        """(which entries, their rows, their columns: int64) in pieces, so that no int64 copy of all is made."""
        if self._flat is None:
            rows = self._rows()
            for part in pieces(self.count):
                yield part, rows[part].long(), self._columns[part].long()
            return
        for part in pieces(self.count):
            here = self._flat[part].long()
            yield part, here // self.shape[1], here % self.shape[1]

    @property
    def tensors(self) -> list[Tensor]:
        """What is kept."""
        return [tensor for tensor in (self._flat, self._row_starts, self._columns) if tensor is not None]


def _in_rows(shape: tuple[int, int], count: int) -> bool:
    return shape[1] <= _MOST_COLUMNS and 2 * (shape[0] + 1) < count


def bytes_of_entries(shape: tuple[int, int], count: int) -> int:
    """Bytes that `Entries` keeps for `count` entries of an [O, I] weight."""
    if _in_rows(shape, count):
        return 2 * count + 4 * (shape[0] + 1)
    return count * (4 if shape[0] * shape[1] <= torch.iinfo(torch.int32).max else 8)


def pieces(count: int, size: int | None = None) -> Iterator[slice]:
    """Slices of at most `size` (PIECE_ENTRIES) that cover [0, count)."""
    size = size or PIECE_ENTRIES
    for start in range(0, count, size):
        yield slice(start, min(start + size, count))


def _compress(indices: Tensor, shape: tuple[int, int]) -> tuple[Tensor, Tensor]:
    rows, width = shape
    first_of_row = torch.arange(0, rows * width, width, dtype=indices.dtype, device=indices.device)
    starts = torch.full((rows + 1,), indices.numel(), dtype=torch.int32, device=indices.device)
    starts[:-1] = torch.searchsorted(indices, first_of_row, out_int32=True)
    narrow = torch.uint16 if width <= _MOST_COLUMNS else torch.int32
    columns = torch.empty(indices.shape, dtype=narrow, device=indices.device)
    for part in pieces(indices.numel()):
        columns[part] = (indices[part] % width).to(narrow)
    return starts, columns
