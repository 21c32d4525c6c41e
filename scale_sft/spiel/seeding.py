"""Seeded generators that depend on names, not on the order of calls; the initial random indices."""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor


def seeded_generator(seed: int, purpose: str, name: str = "") -> torch.Generator:
    """Make a CPU generator for one purpose, the same on every rank, device and Python process."""
    key = hashlib.sha256(f"{seed}\0{purpose}\0{name}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(key[:8], "little") >> 1)


def random_indices(shape: tuple[int, int], k: int, seed: int, name: str) -> Tensor:
    """Draw `k` distinct flat indices of an [O, I] weight, uniform, sorted: [k] int64 on the CPU.

    Sparse draws reject repeats instead of permuting all N entries, so memory is O(k).
    """
    n = shape[0] * shape[1]
    generator = seeded_generator(seed, "initial indices", name)
    if 3 * k > n:
        return torch.randperm(n, generator=generator)[:k].sort().values
    found = torch.empty(0, dtype=torch.int64)
    while found.numel() < k:
        found = torch.cat((found, torch.randint(n, (k + k // 4 + 8,), generator=generator))).unique()
    return found[torch.randperm(found.numel(), generator=generator)[:k]].sort().values
