"""Apply the updates of sections 3.2 and 3.3 in one pass over state and weight, on a CPU, in C.

Arguments and results are those of the functions of the same names in `gpu.updates`.
Shapes: K active entries of a weight [R, C].
"""

from __future__ import annotations

from ctypes import byref

import torch
from torch import Tensor

from scale_sft.kernels.operands import Written, check_written
from scale_sft.spiel.indices import Entries

from .compile import Target, library

COHORTS = {torch.uint8: False, torch.int16: True}
"""True if a cohort's number has two bytes."""


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
    """Do one AdamW step on the [K] entries of a weight in place, and write their effective values into the weight."""
    check_written(written, entries)
    library().adamw_write(
        entries.count,
        *(deltas.data_ptr(), halves(deltas), gradients.data_ptr(), halves(gradients)),
        *(exp_avg.data_ptr(), halves(exp_avg), exp_avg_sq.data_ptr()),
        *(cohort.data_ptr(), COHORTS[cohort.dtype], step_sizes.data_ptr(), denominators.data_ptr()),
        *(decay, 1 - betas[0], betas[1], 1 - betas[1], eps),
        byref(_target(entries, written) if written else Target()),
        torch.get_num_threads(),
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
) -> None:
    """Do one SM3-II step on the [K] entries of a weight in place, and write their effective values into the weight."""
    check_written(written, entries)
    threads = torch.get_num_threads()
    largest = torch.empty(threads, col.numel(), dtype=torch.float32)  # of each thread, by column
    library().sm3_write(
        *(deltas.data_ptr(), halves(deltas), gradients.data_ptr(), halves(gradients)),
        *(row.data_ptr(), col.data_ptr(), largest.data_ptr()),
        *(decay, -learning_rate, eps),
        byref(_target(entries, written)),
        threads,
    )


def halves(tensor: Tensor) -> bool:
    """Return True for bf16, False for fp32. Raises ValueError for other dtypes and non-contiguous tensors."""
    if tensor.dtype not in (torch.float32, torch.bfloat16) or not tensor.is_contiguous():
        raise ValueError(
            f"state of deltas: got {tensor.dtype}, contiguous: {tensor.is_contiguous()}; expected fp32 or bf16"
        )
    return tensor.dtype is torch.bfloat16


def _target(entries: Entries, written: Written | None) -> Target:
    """Describe the target of one call; the tensors it points to must outlive the call, as those of `entries.csr` do."""
    row_starts, columns = entries.csr()
    place = Target(row_starts.data_ptr(), columns.data_ptr(), columns.dtype is torch.int32, *entries.shape)
    if written:
        place.weight, place.base = written.weight.data_ptr(), written.base.data_ptr()
        place.halves = halves(written.weight)
        place.start, place.size, place.first = written.start, written.weight.numel(), written.first
    return place
