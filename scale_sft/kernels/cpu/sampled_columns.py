"""Compute entries of a weight gradient on a CPU as dot products of sampled columns (appendix B), in C.

Shapes: T tokens; R rows, C columns of a weight; K entries.
"""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

from scale_sft.kernels.operands import Wanted, check_operands

from .compile import addresses, library

LARGEST_SHARE = 1 / 5
"""Of a weight's entries. On one core (AVX-512 with bf16 products), 1,024 tokens take 31 ns per sampled entry, where the
full product takes 10 ns per entry of the weight; in fp32 60 to 80 ns, and 21 ns."""


class SampledColumns:
    """A `Products` of the recorder: adds a small number of entries to each `out`, and leaves more to the full product.

    Sums are fp32, in an order that does not depend on the number of threads. The limit is computed, not timed, so a
    repeated run makes the same choice. On CPUs with matrix units for bf16 (AMX) the full product is used, as nothing
    has been measured there.

    Raises:
        NoCompiler: see `compile.library`.
    """

    def __init__(self) -> None:
        self._products, self._words = library().column_products, library().words_per_column()

    def __call__(self, left: Tensor, right: Tensor, wanted: Wanted) -> bool:
        """Add the entries if that pays; returns whether it did.

        Args:
            left: [T, R], right: [T, C]; both the same dtype.
            wanted: see `Wanted`.
        """
        check_operands(left, right, wanted)
        tokens, rows, width, pairs = *left.shape, right.shape[1], left.dtype is torch.bfloat16
        if not self.pays(left, right, sum([out.numel() for _, out in wanted])):
            return False
        left, right = left.contiguous(), right.contiguous()
        buffer = torch.empty((rows + width) * self._words, dtype=torch.int32)
        sums = [out if out.dtype is torch.float32 else torch.zeros(out.shape, dtype=torch.float32) for _, out in wanted]
        places = [entries.csr() for entries, _ in wanted]
        self._products(
            left.data_ptr(),
            right.data_ptr(),
            tokens,
            rows,
            width,
            pairs,
            len(wanted),
            addresses([starts for starts, _ in places]),
            addresses([columns for _, columns in places]),
            places[0][1].dtype is torch.int32,
            addresses(sums),
            buffer.data_ptr(),
            torch.get_num_threads(),
        )
        for (_, out), total in zip(wanted, sums, strict=True):
            if out is not total:
                out += total
        return True

    def pays(self, left: Tensor, right: Tensor, count: int) -> bool:
        """Return True if `count` entries of left^T right are faster one by one than by the full product."""
        dtype, (tokens, rows) = left.dtype, left.shape
        if left.device.type != "cpu" or dtype not in (torch.float32, torch.bfloat16):
            return False
        if dtype is torch.bfloat16 and has_matrix_units():
            return False
        at_once = self._words if dtype is torch.float32 else 2 * self._words
        computed = -(-tokens // at_once) * at_once  # tokens, with the last block padded by zeros
        return count * computed <= LARGEST_SHARE * tokens * rows * right.shape[1]


@lru_cache
def has_matrix_units() -> bool:
    """Return True if this processor has matrix units for bf16."""
    return getattr(torch.cpu, "_is_amx_tile_supported", lambda: False)()
