"""The dense product of the vendor's library, and its recorded entries picked out by one kernel.

The plain path with less around it: no flat index, no gathered copy; the same roundings, the same memory for dW.
Shapes: T tokens; R rows, C columns of a weight; K entries of an index set.
"""

from __future__ import annotations

from collections.abc import Sequence

import triton
import triton.language as tl
from torch import Tensor

from .layout import IndexSet, check_operands, column_mask

BLOCK = 128  # entries of a row taken at once


@triton.jit
def pick_kernel(gradient, row_starts, columns, out, width, COLUMN_MASK: tl.constexpr, BLOCK: tl.constexpr):
    """out += the recorded entries of one row of gradient [R, C]."""
    row = tl.program_id(0)
    last = tl.load(row_starts + row + 1)
    gradient_row = gradient + row.to(tl.int64) * width
    for start in range(tl.load(row_starts + row), last, BLOCK):
        entry = start + tl.arange(0, BLOCK)
        inside = entry < last
        column = tl.load(columns + entry, mask=inside, other=0).to(tl.int32) & COLUMN_MASK
        picked = tl.load(gradient_row + column, mask=inside, other=0.0).to(tl.float32)
        total = tl.load(out + entry, mask=inside, other=0.0).to(tl.float32) + picked
        tl.store(out + entry, total.to(out.dtype.element_ty), mask=inside)


def picked_entries(left: Tensor, right: Tensor, index_sets: Sequence[IndexSet]) -> None:
    """out[k] += dW[row(k), column(k)] for each index set, dW = left^T right in the factors' dtype.

    Equals `plain_entries` bit for bit. Nothing waits for the device.

    Args:
        left: [T, R], right: [T, C]; fp32, bf16 or fp16, both the same.
        index_sets: see `IndexSet`; on the device of the factors.
    Raises:
        ValueError: shapes or dtypes do not belong together.
    """
    check_operands(left, right, index_sets)
    gradient = left.t() @ right
    rows, width = gradient.shape
    for row_starts, columns, out in index_sets:
        pick_kernel[(rows,)](gradient, row_starts, columns, out, width, COLUMN_MASK=column_mask(columns), BLOCK=BLOCK)
