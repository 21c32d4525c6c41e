"""How kernels are told which entries of a weight are meant, and the same product on plain torch.

Shapes: R rows, C columns of a weight; K entries of one index set; T tokens. The dense gradient is
dW [R, C] = left^T right, with left [T, R] and right [T, C]: dY and X for `nn.Linear`, X and dY for GPT-2's `Conv1D`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

LOW_16_BITS = 0xFFFF
ALL_BITS = 0x7FFFFFFF


class IndexSet(NamedTuple):
    """Entries of a weight in CSR order, row by row and ascending in each, and where their gradients are added."""

    row_starts: Tensor  # [R + 1] int32: how many entries lie before each row
    columns: Tensor  # [K] int16 holding the bits of uint16, or int32: ascending in each row, unique
    out: Tensor  # [K] fp32 or bf16: the gradient of each entry is added here


def column_mask(columns: Tensor) -> int:
    """What makes a column number of its stored bits, widened to int32: all bits, or the low 16 of an int16.

    Raises:
        ValueError: the dtype is neither int16 nor int32.
    """
    if columns.dtype is torch.int16:
        return LOW_16_BITS
    if columns.dtype is torch.int32:
        return ALL_BITS
    raise ValueError(f"columns: got {columns.dtype}, expected int16 (the bits of uint16) or int32")


def check_operands(left: Tensor, right: Tensor, index_sets: Sequence[IndexSet]) -> None:
    """Raises ValueError for factors and index sets that do not belong together. Nothing waits for the device."""
    if left.dim() != 2 or right.dim() != 2 or left.shape[0] != right.shape[0] or left.dtype != right.dtype:
        raise ValueError(
            f"factors of a weight gradient: got {tuple(left.shape)} {left.dtype} and {tuple(right.shape)} "
            f"{right.dtype}, expected [T, R] and [T, C] of one dtype"
        )
    for row_starts, columns, out in index_sets:
        if row_starts.shape != (left.shape[1] + 1,) or row_starts.dtype is not torch.int32:
            raise ValueError(
                f"row_starts: got {tuple(row_starts.shape)} {row_starts.dtype}, expected ({left.shape[1] + 1},) int32"
            )
        if out.shape != columns.shape or not out.is_contiguous() or not columns.is_contiguous():
            raise ValueError(f"out {tuple(out.shape)} and columns {tuple(columns.shape)} must be contiguous and alike")


def flat_indices(row_starts: Tensor, columns: Tensor, width: int) -> Tensor:
    """[K] int64: row * C + column of each entry, without waiting for the device; `width` is C."""
    rows = torch.arange(row_starts.numel() - 1, device=columns.device)
    counts = row_starts[1:] - row_starts[:-1]
    row = torch.repeat_interleave(rows, counts, output_size=columns.numel())
    return row * width + (columns.to(torch.int32) & column_mask(columns))


def plain_entries(left: Tensor, right: Tensor, index_sets: Sequence[IndexSet]) -> None:
    """The dense product in the factors' dtype, and what is recorded gathered from it: out += dW[row, column].

    Any device. left [T, R], right [T, C] of one dtype.
    """
    gradient = (left.t() @ right).view(-1)
    for row_starts, columns, out in index_sets:
        out += gradient.index_select(0, flat_indices(row_starts, columns, right.shape[1]))
