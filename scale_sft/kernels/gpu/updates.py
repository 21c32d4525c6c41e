"""Apply the updates of sections 3.2 (AdamW) and 3.3 (SM3) in one pass over state and weight, on a GPU.

Shapes: K active entries of one weight [R, C], sorted by row and column.
The formulas and their order are those of `spiel.optimizers.adamw_update` and `sm3_update`. Every operation is rounded
to fp32 as IEEE 754 requires, and none is fused with another. Torch fuses some products with sums, depending on the
device, so results may differ from it in the last bit; the same call gives the same bits. Then effective =
(base.float() + delta).to(dtype) is written into the weight, from the delta as stored.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from scale_sft.kernels.operands import Written, check_written
from scale_sft.spiel.indices import Entries

BLOCK = 1024  # entries of an AdamW program
ROW_BLOCK = 128  # entries of a row that an SM3 program takes at once
_VIEWS = (
    "deltas", "gradients", "row_accumulator", "old_columns", "column_accumulator", "row_starts", "columns", "weight",
    "base",
)  # fmt: skip
"""Parts of flat buffers: their alignment differs from weight to weight, and must not make a kernel of each."""


@triton.jit
def write_effective(delta, entry, inside, row, column, width, weight, base, part_start, part_size, first):
    """Set weight[row, column] = base + delta for entries inside the part; all but the scalars are [B]."""
    place = row.to(tl.int64) * width + column - part_start
    inside = inside & (place >= 0) & (place < part_size)
    value = tl.load(base + (entry - first), mask=inside, other=0.0).to(tl.float32) + delta
    tl.store(weight + place, value.to(weight.dtype.element_ty), mask=inside)


@triton.jit
def row_of(row_starts, entry, low, high, span):
    """Find the row of each entry: the last in [low, high] that starts at or before it.

    `entry`, `low`, `high` are all scalars or all vectors; row_starts[low] <= entry; span, a scalar: >= high - low.
    """
    while span > 0:
        middle = low + (high - low + 1) // 2
        reached = tl.load(row_starts + middle) <= entry
        low = tl.where(reached, middle, low)
        high = tl.where(reached, high, middle - 1)
        span = span // 2
    return low


@triton.jit(
    do_not_specialize=["entries", "rows", "part_start", "first"],
    do_not_specialize_on_alignment=["cohort", "row_starts", "columns", "weight", "base"],
)
def adamw_kernel(
    deltas,
    gradients,
    exp_avg,
    exp_avg_sq,
    cohort,
    step_sizes,
    denominators,
    row_starts,
    columns,
    weight,
    base,
    entries,  # K
    rows,  # R
    width,  # C
    part_start,
    part_size,
    first,
    decay,  # 1 - learning rate * weight decay
    weight1,  # 1 - beta1
    beta2,
    weight2,  # 1 - beta2
    eps,
    WRITES: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Update one block of entries, of any rows."""
    start = tl.program_id(0) * BLOCK
    entry = start + tl.arange(0, BLOCK)
    inside = entry < entries
    gradient = tl.load(gradients + entry, mask=inside, other=0.0).to(tl.float32)
    member = tl.load(cohort + entry, mask=inside, other=0).to(tl.int32)
    delta = tl.load(deltas + entry, mask=inside, other=0.0).to(tl.float32) * decay

    mean = tl.load(exp_avg + entry, mask=inside, other=0.0).to(tl.float32)
    towards = gradient - mean  # torch.lerp: from the nearer end
    mean = tl.where(weight1 < 0.5, mean + weight1 * towards, gradient - towards * (1.0 - weight1))
    square = tl.load(exp_avg_sq + entry, mask=inside, other=0.0).to(tl.float32) * beta2
    square = square + weight2 * gradient * gradient
    tl.store(exp_avg + entry, mean.to(exp_avg.dtype.element_ty), mask=inside)
    tl.store(exp_avg_sq + entry, square.to(exp_avg_sq.dtype.element_ty), mask=inside)

    divisor = tl.load(denominators + member, mask=inside, other=1.0)
    denominator = tl.math.div_rn(tl.math.sqrt_rn(square), divisor) + eps
    delta += tl.math.div_rn(tl.load(step_sizes + member, mask=inside, other=0.0) * mean, denominator)
    stored = delta.to(deltas.dtype.element_ty)
    tl.store(deltas + entry, stored, mask=inside)
    if WRITES:
        low = row_of(row_starts, start, tl.cast(0, tl.int32), rows - 1, rows - 1)
        high = row_of(row_starts, tl.minimum(start + BLOCK, entries) - 1, low, rows - 1, rows - 1 - low)
        none = tl.zeros([BLOCK], tl.int32)
        row = row_of(row_starts, entry, none + low, none + high, high - low)
        column = tl.load(columns + entry, mask=inside, other=0).to(tl.int32)
        write_effective(
            stored.to(tl.float32), entry, inside, row, column, width, weight, base, part_start, part_size, first
        )


@triton.jit(do_not_specialize=["part_start", "first"], do_not_specialize_on_alignment=_VIEWS)
def sm3_kernel(
    deltas,
    gradients,
    row_accumulator,  # [R]: each program reads and writes its own
    old_columns,  # [C]: the column accumulator as it was
    column_accumulator,  # [C]: grows
    row_starts,
    columns,
    weight,
    base,
    width,
    part_start,
    part_size,
    first,
    decay,
    step_size,  # -learning rate
    eps,
    WRITES: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Update one row of the weight."""
    row = tl.program_id(0)
    last = tl.load(row_starts + row + 1)
    old_row = tl.load(row_accumulator + row)
    largest = tl.zeros([BLOCK], tl.float32) + old_row
    for start in range(tl.load(row_starts + row), last, BLOCK):
        entry = start + tl.arange(0, BLOCK)
        inside = entry < last
        column = tl.load(columns + entry, mask=inside, other=0).to(tl.int32)
        gradient = tl.load(gradients + entry, mask=inside, other=0.0).to(tl.float32)
        nu = tl.minimum(old_row, tl.load(old_columns + column, mask=inside, other=0.0)) + gradient * gradient
        largest = tl.maximum(largest, tl.where(inside, nu, old_row))
        # The bits of non-negative floats sort like the numbers, so this is a maximum of integers, in any order.
        bits = (column_accumulator + column).to(tl.pointer_type(tl.int32), bitcast=True)
        tl.atomic_max(bits, nu.to(tl.int32, bitcast=True), mask=inside)

        delta = tl.load(deltas + entry, mask=inside, other=0.0).to(tl.float32) * decay
        delta += tl.math.div_rn(step_size * gradient, tl.math.sqrt_rn(nu + eps))
        stored = delta.to(deltas.dtype.element_ty)
        tl.store(deltas + entry, stored, mask=inside)
        if WRITES:
            write_effective(
                stored.to(tl.float32), entry, inside, row, column, width, weight, base, part_start, part_size, first
            )
    tl.store(row_accumulator + row, tl.max(largest, axis=0))


def adamw_write(
    deltas: Tensor,
    gradients: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    cohort: Tensor,
    step_sizes: Tensor,
    denominators: Tensor,
    *,
    decay: float,
    betas: tuple[float, float],
    eps: float,
    entries: Entries,
    written: Written | None = None,
) -> None:
    """Do one AdamW step on the [K] entries of a weight in place, and write their effective values into the weight.

    Args:
        deltas: [K] fp32 or bf16. gradients: [K] fp32 or bf16.
        exp_avg: [K] fp32 or bf16. exp_avg_sq: [K] fp32. State that is not fp32 is rounded once, at the end.
        cohort: [K] integers: which entry of the two tables holds for each delta.
        step_sizes, denominators: by cohort, fp32 on the device: -learning_rate / (1 - beta1^n) and sqrt(1 - beta2^n)
            after n gradients.
        decay: 1 - learning_rate * weight_decay.
        entries: their places in the weight.
        written: the weight to write; None (transient deltas): none.
    """
    check_written(written, entries)
    row_starts, columns = entries.csr() if written else (deltas, deltas)  # needed only to write
    weight, base, start, first = _target(written, deltas)
    adamw_kernel[(triton.cdiv(deltas.numel(), BLOCK),)](
        deltas,
        gradients,
        exp_avg,
        exp_avg_sq,
        cohort,
        step_sizes,
        denominators,
        row_starts,
        columns,
        weight,
        base,
        entries.count,
        *entries.shape,
        start,
        weight.numel(),
        first,
        decay,
        1 - betas[0],
        betas[1],
        1 - betas[1],
        eps,
        WRITES=written is not None,
        BLOCK=BLOCK,
        enable_fp_fusion=False,
    )


def sm3_write(
    deltas: Tensor,
    gradients: Tensor,
    row: Tensor,
    col: Tensor,
    *,
    learning_rate: float,
    decay: float,
    eps: float,
    entries: Entries,
    written: Written | None = None,
    old_col: Tensor | None = None,
) -> None:
    """Do one SM3-II step on the [K] entries of a weight in place, and write their effective values into the weight.

    Accumulators grow by maxima of non-negative numbers, which do not depend on their order: the same call gives the
    same bits.

    Args:
        deltas: [K] fp32 or bf16 (rounded once, at the end). gradients: [K] fp32 or bf16.
        row: [R] fp32, col: [C] fp32: the accumulators, non-negative.
        decay: 1 - learning_rate * weight_decay.
        entries: their places in the weight.
        written: see `adamw_write`.
        old_col: a copy of `col`, where the caller has one; None: made here.
    """
    check_written(written, entries)
    row_starts, columns = entries.csr()
    weight, base, start, first = _target(written, deltas)
    sm3_kernel[(row.numel(),)](
        deltas,
        gradients,
        row,
        col.clone() if old_col is None else old_col,
        col,
        row_starts,
        columns,
        weight,
        base,
        col.numel(),
        start,
        weight.numel(),
        first,
        decay,
        -learning_rate,
        eps,
        WRITES=written is not None,
        BLOCK=ROW_BLOCK,
        enable_fp_fusion=False,
    )


def _target(written: Written | None, stand_in: Tensor) -> tuple[Tensor, Tensor, int, int]:
    """Return (weight, base, start, first) for a kernel, with stand-in tensors, never read, if nothing is written."""
    return (written.weight, written.base, written.start, written.first) if written else (stand_in, stand_in, 0, 0)
