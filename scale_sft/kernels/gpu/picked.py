"""Compute the dense product with the vendor's library, and pick its recorded entries in one kernel.

This is the plain path without a flat index and a gathered copy; roundings and the memory for dW are the same.
Shapes: T tokens; R rows, C columns of a weight; K entries.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from scale_sft.kernels.operands import Wanted, check_operands

BLOCK = 128  # entries of a row taken at once


@triton.jit(do_not_specialize_on_alignment=["row_starts", "columns", "out"])  # views at any place of flat buffers
def pick_kernel(gradient, row_starts, columns, out, width, BLOCK: tl.constexpr):
    """Add the recorded entries of one row of gradient [R, C] to out."""
    row = tl.program_id(0)
    last = tl.load(row_starts + row + 1)
    gradient_row = gradient + row.to(tl.int64) * width
    for start in range(tl.load(row_starts + row), last, BLOCK):
        entry = start + tl.arange(0, BLOCK)
        inside = entry < last
        column = tl.load(columns + entry, mask=inside, other=0).to(tl.int32)
        picked = tl.load(gradient_row + column, mask=inside, other=0.0).to(out.dtype.element_ty)
        total = tl.load(out + entry, mask=inside, other=0.0).to(tl.float32) + picked.to(tl.float32)
        tl.store(out + entry, total.to(out.dtype.element_ty), mask=inside)


def picked_entries(left: Tensor, right: Tensor, wanted: Wanted) -> bool:
    """Compute out[k] += dW[row(k), column(k)] for all wanted entries, dW = left^T right: a `Products`, always True.

    dW is rounded to the factors' dtype, then to that of `out`, and the result equals `dense_products` bit for bit. This
    does not wait for the device.

    Args:
        left: [T, R], right: [T, C]; fp32, bf16 or fp16, both the same.
        wanted: see `Wanted`; on the device of the factors.

    Raises:
        ValueError: shapes or dtypes do not match.
    """
    check_operands(left, right, wanted)
    gradient = left.t() @ right
    rows, width = gradient.shape
    for entries, out in wanted:
        pick_kernel[(rows,)](gradient, *entries.csr(), out, width, BLOCK=BLOCK)
    return True
