"""Compute each recorded entry as a dot product of two columns, below the crossover density (appendix B).

Shapes: T tokens; R rows, C columns of a weight; K entries.
Both factors are first transposed to [R, T] and [C, T], in pieces of the tokens: an entry then reads whole cache lines,
and one piece of the larger factor stays in the second-level cache while all entries use it. This costs one pass over
both factors, (R + C) T entries read and written, compared with the 2 K T that the dot products read.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from scale_sft.kernels.operands import Wanted, check_operands

ENTRIES = 16  # of one row that a program sums at a time
TOKENS = 128  # read of each at once
PIECE_BYTES = 16 << 20  # of the factor with columns: well below the second-level cache of an A100 (40 MB)
MAX_PROGRAMS_PER_ROW = 64


@triton.jit
def dot_kernel(
    left,  # [R, token_stride], tokens innermost, padded with zeros
    right,  # [C, token_stride], in the same layout
    row_starts,
    columns,
    sums,  # [K] fp32
    token_stride,  # a multiple of TOKENS
    ENTRIES: tl.constexpr,
    TOKENS: tl.constexpr,
):
    """Add the dot products of one row's entries; program (r, s) takes every num_programs(1)-th group of row r."""
    row = tl.program_id(0)
    first = tl.load(row_starts + row)
    last = tl.load(row_starts + row + 1)
    token = tl.arange(0, TOKENS)
    left_row = left + row.to(tl.int64) * token_stride + token
    for start in range(first + tl.program_id(1) * ENTRIES, last, tl.num_programs(1) * ENTRIES):
        entry = start + tl.arange(0, ENTRIES)
        inside = entry < last
        column = tl.load(columns + entry, mask=inside, other=0).to(tl.int32)
        right_rows = right + column.to(tl.int64)[:, None] * token_stride + token[None, :]
        products = tl.zeros([ENTRIES, TOKENS], tl.float32)
        for t in range(0, token_stride, TOKENS):
            a = tl.load(left_row + t).to(tl.float32)
            b = tl.load(right_rows + t, mask=inside[:, None], other=0.0).to(tl.float32)
            products += a[None, :] * b
        total = tl.load(sums + entry, mask=inside, other=0.0) + tl.sum(products, axis=1)
        tl.store(sums + entry, total, mask=inside)


def sampled_dots(left: Tensor, right: Tensor, wanted: Wanted) -> None:
    """Compute out[k] += sum over t of left[t, row(k)] * right[t, column(k)], for all wanted entries.

    Products and sums are fp32; every entry is summed by one program in one order, so the same call gives the same
    bits. This does not wait for the device. Temporaries: one piece of both factors, and 4 bytes per entry if `out` is
    not fp32.

    Args:
        left: [T, R], right: [T, C]; fp32, bf16 or fp16, both the same.
        wanted: see `Wanted`; on the device of the factors.

    Raises:
        ValueError: shapes or dtypes do not match.
    """
    check_operands(left, right, wanted)
    rows, width = left.shape[1], right.shape[1]
    sums = [out if out.dtype is torch.float32 else torch.zeros_like(out, dtype=torch.float32) for _, out in wanted]
    stored = [entries.csr() for entries, _ in wanted]
    piece = max(TOKENS, PIECE_BYTES // (width * right.element_size()) // TOKENS * TOKENS)
    for start in range(0, left.shape[0], piece):
        left_piece, right_piece = (_tokens_innermost(factor[start : start + piece]) for factor in (left, right))
        for (row_starts, columns), total in zip(stored, sums, strict=True):
            groups = triton.cdiv(2 * total.numel(), rows * ENTRIES)  # twice the mean: long rows are split
            dot_kernel[(rows, max(1, min(groups, MAX_PROGRAMS_PER_ROW)))](
                left_piece,
                right_piece,
                row_starts,
                columns,
                total,
                left_piece.shape[1],
                ENTRIES=ENTRIES,
                TOKENS=TOKENS,
            )
    for (_, out), total in zip(wanted, sums, strict=True):
        if out is not total:
            out += total


def _tokens_innermost(factor: Tensor) -> Tensor:
    """Transpose [T, R] to [R, T'], contiguous; T' is the next multiple of TOKENS, padded with zeros."""
    tokens, rows = factor.shape
    padded = triton.cdiv(tokens, TOKENS) * TOKENS
    laid_out = torch.empty(rows, padded, dtype=factor.dtype, device=factor.device)
    laid_out[:, :tokens] = factor.t()
    laid_out[:, tokens:] = 0
    return laid_out
