"""Find the entries of largest magnitude of a long vector, in C on a CPU. Shapes: N entries, k chosen."""

from __future__ import annotations

import torch
from torch import Tensor

from scale_sft.spiel import topk

from .compile import library, why_not


def top_k_magnitude(values: Tensor, k: int) -> Tensor:
    """Find the same indices as `spiel.topk.top_k_magnitude`: [k] int64, ascending, ties to the smaller index.

    This uses C wherever there is a compiler, whatever the option `kernels`: only the time differs.

    Args:
        values: [N] floating point, any device; NaN counts as smaller than any number.
        k: 0 <= k <= N.

    Raises:
        ValueError: k is out of range.
    """
    on_cpu = values.device.type == "cpu" and values.dtype in (torch.float32, torch.bfloat16)
    if not on_cpu or not 0 < k <= values.numel() or not values.is_contiguous() or why_not():
        return topk.top_k_magnitude(values, k)
    threads = torch.get_num_threads()
    found = torch.empty(k, dtype=torch.int64)
    counts = torch.empty(threads * library().counting_words(), dtype=torch.int32)
    slices = torch.empty(2 * threads, dtype=torch.int64)
    library().top_k_magnitude(
        values.data_ptr(),
        values.dtype is torch.bfloat16,
        values.numel(),
        k,
        found.data_ptr(),
        counts.data_ptr(),
        slices.data_ptr(),
        threads,
    )
    return found


def largest_magnitudes(values: Tensor, k: int) -> Tensor:
    """Find the same indices as `top_k_magnitude`; [0] if all of `values` are 0."""
    return topk.unless_zero(values, top_k_magnitude(values, k))
