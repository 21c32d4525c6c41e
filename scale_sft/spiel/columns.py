"""Entries of a weight gradient without the gradient: dot products of sampled columns (appendix B), on a CPU.

On a GPU `scale_sft.kernels.sampled` does the same. Shapes: T tokens; R rows, C columns of a weight; K entries.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import Tensor

from .entries import Entries, pieces

CACHE_BYTES = 1 << 20
"""Of the right factor's columns, which are read in no order, at a time: about a core's second-level cache."""
MULTIPLICATION = {torch.float32: 23e-12, torch.bfloat16: 11e-12, torch.float16: 11e-12}
"""Seconds of a core for each of the T * R * C multiplications of a whole product, by the factors' dtype."""
SAMPLED_MULTIPLICATION = 140e-12
"""Seconds of a core for each of the T * K multiplications of `column_products`."""
LAYING_OUT = 1300e-12
"""Seconds for each of the T * (R + C) numbers that are laid out in columns, which one core does."""
ENTRY, ENTRY_OF_PIECE, CALL = 4e-9, 1.5e-9, 3e-4
"""Seconds for each entry's coordinates; for carrying each sum from one piece of the tokens to the next; for the rest."""


def sampling_is_cheaper(left: Tensor, right: Tensor, count: int) -> bool:
    """Whether `count` entries of left^T right come sooner from `column_products` than from the whole product.

    By arithmetic with the times of one processor (AVX-512 with dot products of bf16), not by a clock: a run that is
    repeated has to choose as before. Where 16-bit products have matrix units (AMX), for which these times say nothing,
    the product is formed.

    Args:
        left: [T, R], right: [T, C].
    """
    if left.device.type != "cpu" or left.dtype not in MULTIPLICATION or left.dtype is not right.dtype:
        return False
    if left.dtype is not torch.float32 and _has_matrix_units():
        return False
    (tokens, rows), width, cores = left.shape, right.shape[1], torch.get_num_threads()
    whole = tokens * rows * width * MULTIPLICATION[left.dtype] / cores
    in_parallel = tokens * SAMPLED_MULTIPLICATION + math.ceil(tokens / _tokens_at_once(width)) * ENTRY_OF_PIECE
    sampled = count * (in_parallel / cores + ENTRY) + tokens * (rows + width) * LAYING_OUT + CALL
    return sampled < whole


@lru_cache
def _has_matrix_units() -> bool:
    return getattr(torch.cpu, "_is_amx_tile_supported", lambda: False)()


def _tokens_at_once(width: int) -> int:
    return max(16, CACHE_BYTES // (torch.float32.itemsize * width))


def column_products(left: Tensor, right: Tensor, wanted: Sequence[tuple[Entries, Tensor]]) -> None:
    """out[k] += sum over t of left[t, row(k)] * right[t, column(k)], in fp32; nothing of R * C entries is made.

    Each entry is summed by one thread, in the same order for any number of threads.

    Args:
        left: [T, R], right: [T, C]; both the same dtype, on a CPU.
        wanted: [(entries, out [K]), ...].
    """
    sums = [_as_sparse(entries, out) for entries, out in wanted]
    for part in pieces(left.shape[0], _tokens_at_once(right.shape[1])):
        rows, columns = (factor[part].t().contiguous().float() for factor in (left, right))
        sums = [torch.sparse.sampled_addmm(some, rows, columns.t()) for some in sums]
    for (_, out), some in zip(wanted, sums, strict=True):
        out.copy_(some.values())


def _as_sparse(entries: Entries, values: Tensor) -> Tensor:
    _hear_of_beta_state_once()
    starts, columns = entries.compressed(torch.int32)
    return torch.sparse_csr_tensor(starts, columns, values.float(), entries.shape, check_invariants=False)


@lru_cache
def _hear_of_beta_state_once() -> None:
    """Torch warns at the first tensor of this kind and never again; the one that hears it here is empty."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Sparse CSR tensor support is in beta state")
        torch.sparse_csr_tensor(
            torch.zeros(1, dtype=torch.int32), torch.zeros(0, dtype=torch.int32), [], (0, 0), check_invariants=False
        )
