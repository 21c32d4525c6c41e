"""What the tests of kernels share: where they run, and random things to run on."""

import os
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor

from scale_sft.spiel.indices import Entries

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cpu" if INTERPRETED else "cuda"
marks = [
    pytest.mark.gpu,
    pytest.mark.skipif(not INTERPRETED and not torch.cuda.is_available(), reason="needs a GPU, or TRITON_INTERPRET=1"),
]


@contextmanager
def no_waiting() -> Iterator[None]:
    """On a GPU, whatever waits for the device raises."""
    if INTERPRETED:
        yield
        return
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def drawn(seed: int, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE, dtype)


def some_entries(shape: tuple[int, int], count: int, seed: int = 0) -> Entries:
    """Random entries, more of them in the first rows, so that some rows are full and others empty."""
    rows, width = shape
    weight = torch.rand(rows, width, generator=torch.Generator().manual_seed(seed))
    flat = (weight / (1 + torch.arange(rows))[:, None]).view(-1).topk(count).indices.sort().values
    return Entries(flat.to(DEVICE), shape)


def rounded(values: Tensor, dtype: torch.dtype) -> Tensor:
    """`values` fp32 to the nearest in `dtype`, as a GPU rounds; Triton's interpreter cuts bits of bf16 off instead."""
    if INTERPRETED and dtype is torch.bfloat16:
        values = (values.view(torch.int32) & ~0xFFFF).view(torch.float32)
    return values.to(dtype)
