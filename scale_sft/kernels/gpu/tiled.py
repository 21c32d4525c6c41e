"""Compute recorded entries by a tiled matrix product that never stores dW, above the crossover density.

Shapes: T tokens; R rows, C columns of a weight; K entries; a tile is BLOCK_R x BLOCK_C.
A program computes one tile of dW = left^T right in fp32, bisects each row's sorted entries for the first one in the
tile, and picks entries out of the tile through shared memory. The tile is gathered as one flat vector, which keeps
Triton from exchanging it between threads by shuffles (a hundred instructions instead of thousands).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from scale_sft.kernels.operands import Wanted, check_operands


class Tile(NamedTuple):
    """The configuration of a program: its tile, the tokens of one multiplication, warps, stages of the pipeline."""

    block_r: int
    block_c: int
    block_t: int
    warps: int
    stages: int


TILES = (Tile(128, 128, 64, 8, 3), Tile(128, 256, 64, 8, 3), Tile(128, 128, 32, 4, 4), Tile(64, 64, 64, 4, 4))
FP32_TILE = Tile(64, 64, 32, 4, 3)  # larger tiles spill without tensor cores
AT_ONCE = 2
MAX_PICKS = 32  # more would spill registers


@triton.jit
def add_recorded(
    tile,  # [BLOCK_R, BLOCK_C] fp32
    first_row,
    first_column,
    rows,  # R
    row_starts,
    columns,
    out,
    bisections,  # bits of C
    PICKS: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Add the recorded entries of this tile to out, PICKS entries of each row at a time."""
    local_row = tl.arange(0, BLOCK_R)
    row = first_row + local_row
    low = tl.load(row_starts + row, mask=row < rows, other=0)
    last = tl.load(row_starts + row + 1, mask=row < rows, other=0)
    high = last
    for _ in range(bisections):
        open_ = low < high
        middle = low + (high - low) // 2
        column = tl.load(columns + middle, mask=open_, other=0).to(tl.int32)
        before = column < first_column
        low = tl.where(open_ & before, middle + 1, low)
        high = tl.where(open_ & (column >= first_column), middle, high)
    flat_tile = tl.reshape(tile, [BLOCK_R * BLOCK_C])
    most = PICKS  # entries of the fullest row in the last round: PICKS means that there may be more
    while most == PICKS:
        entry = low[:, None] + tl.arange(0, PICKS)[None, :]
        inside = entry < last[:, None]
        local_column = tl.load(columns + entry, mask=inside, other=0).to(tl.int32) - first_column
        inside = inside & (local_column < BLOCK_C)
        place = tl.where(inside, local_row[:, None] * BLOCK_C + local_column, 0)
        picked = tl.gather(flat_tile, tl.reshape(place, [BLOCK_R * PICKS]), 0)
        old = tl.load(out + entry, mask=inside, other=0.0).to(tl.float32)
        new = old + tl.reshape(picked, [BLOCK_R, PICKS])
        tl.store(out + entry, new.to(out.dtype.element_ty), mask=inside)
        low += PICKS
        most = tl.max(tl.sum(inside.to(tl.int32), axis=1), axis=0)


@triton.jit(do_not_specialize=["tokens", "bisections"])
def tile_kernel(
    left,
    right,
    tokens,
    rows,
    width,
    left_stride,
    right_stride,
    bisections,
    row_starts,
    columns,
    out,
    row_starts_2,
    columns_2,
    out_2,
    SECOND: tl.constexpr,  # whether there are second entries
    PRECISION: tl.constexpr,
    PICKS: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_T: tl.constexpr,
    GROUP: tl.constexpr,  # tile rows shared by neighbouring programs, to reuse each other's cached factors
):
    """Compute one tile of left^T right, and pick the recorded entries in it."""
    tile_rows = tl.cdiv(rows, BLOCK_R)
    tile_columns = tl.cdiv(width, BLOCK_C)
    program = tl.program_id(0)
    group = program // (GROUP * tile_columns)
    group_rows = tl.minimum(tile_rows - group * GROUP, GROUP)
    within = program % (GROUP * tile_columns)
    first_row = (group * GROUP + within % group_rows) * BLOCK_R
    first_column = within // group_rows * BLOCK_C

    token = tl.arange(0, BLOCK_T)
    row = first_row + tl.arange(0, BLOCK_R)
    column = first_column + tl.arange(0, BLOCK_C)
    left_tile = left + token[:, None] * left_stride + row[None, :]
    right_tile = right + token[:, None] * right_stride + column[None, :]
    tile = tl.zeros([BLOCK_R, BLOCK_C], tl.float32)
    for start in range(0, tokens, BLOCK_T):
        there = (start + token < tokens)[:, None]
        a = tl.load(left_tile, mask=there & (row < rows)[None, :], other=0.0)
        b = tl.load(right_tile, mask=there & (column < width)[None, :], other=0.0)
        tile = tl.dot(tl.trans(a), b, tile, input_precision=PRECISION)
        left_tile += BLOCK_T * left_stride
        right_tile += BLOCK_T * right_stride

    add_recorded(tile, first_row, first_column, rows, row_starts, columns, out, bisections, PICKS, BLOCK_R, BLOCK_C)
    if SECOND:
        add_recorded(
            tile, first_row, first_column, rows, row_starts_2, columns_2, out_2, bisections, PICKS,
            BLOCK_R, BLOCK_C,
        )  # fmt: skip


def product_entries(left: Tensor, right: Tensor, wanted: Wanted, tile: Tile | None = None) -> None:
    """Compute out[k] += (left^T right)[row(k), column(k)] for all wanted entries, two lists at a time from one product.

    Sums are fp32 in one order (fp32 factors are multiplied as such, never as TF32). Every entry is written by the one
    program whose tile contains it, so the same call gives the same bits. This does not wait for the device, and no
    temporary is in global memory.

    Args:
        left: [T, R], right: [T, C]; fp32, bf16 or fp16, both the same.
        wanted: see `Wanted`; on the device of the factors.
        tile: how to cut the work; None: the first of `TILES`, or `FP32_TILE`.

    Raises:
        ValueError: shapes or dtypes do not match.
    """
    check_operands(left, right, wanted)
    left, right = (factor if factor.stride(1) == 1 else factor.contiguous() for factor in (left, right))
    tile = tile or (FP32_TILE if left.dtype is torch.float32 else TILES[0])
    (tokens, rows), width = left.shape, right.shape[1]
    stored = [(*entries.csr(), out) for entries, out in wanted]
    for first in range(0, len(stored), AT_ONCE):
        one, *others = stored[first : first + AT_ONCE]
        two = others[0] if others else one
        most = max(one[-1].numel(), two[-1].numel())
        tile_kernel[(triton.cdiv(rows, tile.block_r) * triton.cdiv(width, tile.block_c),)](
            left,
            right,
            tokens,
            rows,
            width,
            left.stride(0),
            right.stride(0),
            width.bit_length(),
            *one,
            *two,
            SECOND=bool(others),
            PRECISION="ieee",
            PICKS=picks(most, rows * width, tile),
            BLOCK_R=tile.block_r,
            BLOCK_C=tile.block_c,
            BLOCK_T=tile.block_t,
            GROUP=8,
            num_warps=tile.warps,
            num_stages=tile.stages,
        )


def picks(entries: int, numel: int, tile: Tile) -> int:
    """Choose how many entries to pick from a tile's row at once: about twice its average, a power of two."""
    return min(MAX_PICKS, tile.block_c, max(8, triton.next_power_of_2(2 * entries * tile.block_c // numel)))
