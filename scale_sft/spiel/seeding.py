"""Seeded generators that depend on names, not on the order of calls; the initial random indices."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from math import isqrt

import torch
from torch import Tensor

from .indices import index_dtype
from .tiles import Tiles, Tiling

FEW_ENTRIES = 1 << 13
"""The entries of a small weight: if there are many alike, `random_indices_of_many` chooses."""
MANY_KEYS = 1 << 20
"""Keys at once."""


def seeded_generator(seed: int, purpose: str, name: str = "") -> torch.Generator:
    """Make a CPU generator for one purpose: the same on every rank, device and Python process."""
    key = hashlib.sha256(f"{seed}\0{purpose}\0{name}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(key[:8], "little") >> 1)


def random_indices(shape: tuple[int, int], k: int, seed: int, name: str) -> Tensor:
    """Choose `k` distinct flat indices of an [O, I] weight: [k] on the CPU, sorted, int32 (int64 where O * I is wider).

    Every set of `k` indices is equally likely. The same (shape, k, seed, name) gives the same indices everywhere: only
    integers are computed. Memory is O(k).
    """
    return _subset(shape[0] * shape[1], k, seeded_generator(seed, "initial indices", name))


def random_tiles(tiling: Tiling, count: int, seed: int, name: str) -> Tiles:
    """Choose `count` distinct tiles of a weight, on the CPU, every set of them equally likely; see `random_indices`."""
    return Tiles(tiling, _subset(tiling.count, count, seeded_generator(seed, "initial tiles", name)).long())


def slice_of_many(name: str) -> bool:
    """Return True for the name of one of many alike weights: `...experts.up_proj.17`."""
    return name.rpartition(".")[2].isdigit()


def random_indices_of_many(n: int, k: int, seed: int, names: Sequence[str]) -> Tensor:
    """Choose `k` distinct numbers below `n` for each of W small weights: [W, k] on the CPU, sorted, int64.

    Every number gets a pseudo-random key, of the seed, the weight's name and the number alone; those with the largest
    keys are chosen. In few operations, other than `random_indices`.
    """
    digests = [hashlib.sha256(f"{seed}\0initial indices\0{name}".encode()).digest() for name in names]
    chosen = torch.empty(len(names), k, dtype=torch.int64)
    numbers = torch.arange(n).mul_(-0x61C8864680B583EB)
    for first in range(0, len(names), rows := max(1, MANY_KEYS // n)):
        starts = torch.tensor([int.from_bytes(one[:8], "little", signed=True) for one in digests[first : first + rows]])
        keys = starts[:, None] + numbers
        for factor in (-0x40A7B892E31B1A47, -0x6B2FB644ECCEEE15):  # the finalizer of SplitMix64
            keys = (keys ^ ((keys >> 30) & (1 << 34) - 1)) * factor
        keys ^= (keys >> 31) & (1 << 33) - 1
        chosen[first : first + rows] = keys.topk(k, dim=1, sorted=False).indices.sort(1).values
    return chosen


def _subset(n: int, k: int, generator: torch.Generator) -> Tensor:
    """Choose `k` of the numbers below `n`, every set with the same probability: [k] sorted, int32 or int64.

    Independent draws treat all numbers alike, so the set of the distinct ones among them is, given its size, a uniform
    set of that size; and so is what remains of it when uniformly chosen members are deleted.
    """
    dtype = index_dtype(n)
    if k == 0:
        return torch.empty(0, dtype=dtype)
    if 2 * k > n:
        chosen = torch.ones(n, dtype=torch.bool)
        chosen[_subset(n, n - k, generator).long()] = False
        return chosen.nonzero().squeeze(1).to(dtype)
    found = torch.empty(0, dtype=dtype)
    while found.numel() < k:
        drawn = _uniform(n, _draws(n, k), dtype, generator)
        found = torch.cat((found, drawn)).sort().values.unique_consecutive()
    surplus = _subset(found.numel(), found.numel() - k, generator)  # positions of a few members
    first, *others = found.tensor_split(surplus.long())
    return torch.cat((first, *(part[1:] for part in others)))


def _draws(n: int, k: int) -> int:
    """Count the independent draws from `n` numbers that nearly always hit `k` <= n / 2 distinct ones, and few more.

    For x = k / n, n (x + x^2 / 2 + x^3 / 3 + ...) = -n log(1 - x) draws are needed on average; the terms from the third
    on add up to at most 2 x^3 / 3. The number of repeats has a standard deviation of about k / sqrt(2 n): the margin is
    four of them.
    """
    return k + k * k // (2 * n) + 2 * k**3 // (3 * n * n) + 3 * isqrt(k * k // n) + 4


def _uniform(n: int, count: int, dtype: torch.dtype, generator: torch.Generator) -> Tensor:
    """Draw `count` independent numbers below `n`, exactly uniform: [count] in their order of drawing.

    Draws of 31 or 62 bits beyond the last whole multiple of `n` are drawn again. `torch.randint(n)` keeps them, and so
    favours small numbers by as much as n / 2^32.
    """
    span = 1 << (31 if dtype is torch.int32 else 62)
    bits = torch.empty(count, dtype=dtype).random_(0, span, generator=generator)
    last = span // n * n - 1
    while (rejected := (bits > last).nonzero().squeeze(1)).numel():
        bits[rejected] = torch.empty(rejected.numel(), dtype=dtype).random_(0, span, generator=generator)
    return bits.remainder_(n)
