"""The indices of a weight's active entries, in 2 bytes each.

Shapes: O rows, I columns of a weight; K active entries, sorted by row and column.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor


def wrong_with_indices(indices: Tensor, shape: tuple[int, int]) -> str | None:
    """Explain why `indices` cannot be those of a weight of `shape`: integers [K], in range, sorted, unique; or None."""
    if indices.dim() != 1 or indices.dtype not in (torch.int32, torch.int64):
        return f"indices are {tuple(indices.shape)} {indices.dtype}, expected one row of integers"
    if indices.numel() and (int(indices.min()) < 0 or int(indices.max()) >= shape[0] * shape[1]):
        return f"an index is outside the weight of shape {shape}"
    if bool((indices[1:] <= indices[:-1]).any()):
        return "indices are not sorted and unique"
    return None


PIECE_ENTRIES = 1 << 18
_FAR = 1 << 16


class Entries:
    """K entries of an [O, I] weight, stored as the gaps between them.

    The published code keeps 4 bytes per sorted flat index; here an index is the running sum of the gaps, computed one
    weight at a time on request. The few gaps beyond 16 bits store their upper bits separately. Kernels take compressed
    rows instead, which need as much memory: the first call of `csr` switches to them for good.

    Args:
        indices: [K] sorted, unique flat indices i * I + j, any integer type.
        shape: (O, I).
    """

    def __init__(self, indices: Tensor, shape: tuple[int, int]):
        self.shape, self.count = shape, indices.numel()
        self.dtype = torch.int32 if shape[0] * shape[1] <= torch.iinfo(torch.int32).max else torch.int64
        self._gaps = torch.empty(self.count, dtype=torch.uint16, device=indices.device)
        far, steps = [], []
        for part in pieces(self.count):
            before = indices[part.start - 1 : part.start] if part.start else indices.new_zeros(1)
            gaps = torch.diff(indices[part], prepend=before)
            beyond = (gaps >= _FAR).nonzero().squeeze(1)
            far.append((beyond + part.start).int())
            steps.append((gaps[beyond] // _FAR * _FAR).to(self.dtype))
            self._gaps[part] = (gaps % _FAR).to(torch.uint16)
        self._far = (torch.cat(far), torch.cat(steps)) if sum(map(len, far)) else None
        self._rows: tuple[Tensor, Tensor] | None = None

    def flat(self) -> Tensor:
        """Compute the [K] flat indices: a new tensor, int32 (int64 where O * I does not fit)."""
        if self._rows is not None:
            return _first_of_rows(*self._rows, self.shape, self.dtype).add_(self._rows[1].to(self.dtype))
        gaps = self._gaps.to(self.dtype)
        if self._far:
            gaps.index_add_(0, *self._far)
        return gaps.cumsum_(0)

    def csr(self) -> tuple[Tensor, Tensor]:
        """Return (row_starts [O + 1] int32, columns [K] uint16, or int32 where I > 65,536), which replace the gaps."""
        if self._rows is None:
            self._rows = self._compressed()
            self._gaps, self._far = self._gaps.new_empty(0), None
        return self._rows

    def _compressed(self) -> tuple[Tensor, Tensor]:
        rows, width = self.shape
        dtype = torch.uint16 if width <= _FAR else torch.int32
        flat = self.flat()
        first_of_row = torch.arange(0, rows * width, width, dtype=flat.dtype, device=flat.device)
        starts = torch.full((rows + 1,), self.count, dtype=torch.int32, device=flat.device)
        starts[:-1] = torch.searchsorted(flat, first_of_row, out_int32=True)
        columns = torch.empty(self.count, dtype=dtype, device=flat.device)
        for part in pieces(self.count):
            columns[part] = (flat[part] % width).to(dtype)
        return starts, columns

    def coordinates(self) -> Iterator[tuple[slice, Tensor, Tensor]]:
        """Yield (slice of entries, int64 rows, int64 columns) in pieces, so that no int64 copy of all is made."""
        width, flat = self.shape[1], self.flat()
        for part in pieces(self.count):
            rows = torch.div(flat[part], width, rounding_mode="floor")
            columns = torch.sub(flat[part], rows, alpha=width)
            yield part, rows.long(), columns.long()

    @property
    def tensors(self) -> list[Tensor]:
        """Return the tensors that are kept."""
        return [*self._rows] if self._rows is not None else [self._gaps, *(self._far or ())]


def bytes_of_entries(count: int) -> int:
    """Count the bytes `Entries` keeps for `count` entries, without gaps beyond 16 bits, which take 8 each."""
    return 2 * count


def pieces(count: int, size: int | None = None) -> Iterator[slice]:
    """Yield slices of at most `size` (PIECE_ENTRIES) that cover [0, count)."""
    size = size or PIECE_ENTRIES
    for start in range(0, count, size):
        yield slice(start, min(start + size, count))


def _first_of_rows(starts: Tensor, columns: Tensor, shape: tuple[int, int], dtype: torch.dtype) -> Tensor:
    """Compute the flat index at which the row of each entry begins: [K]. No int64 copy is made."""
    sums = torch.zeros(columns.numel() + 1, dtype=dtype, device=columns.device)
    of_row = torch.full((), shape[1], dtype=dtype, device=sums.device).expand(shape[0] - 1)
    sums.index_add_(0, starts[1:-1], of_row)  # rows without entries add up where the next one begins
    return sums.cumsum_(0)[:-1]


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
