"""Fingerprint the base: sums over index and bits that do not depend on how a weight is sharded."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

import torch
from torch import Tensor

from .resident import _BITS, WeightPart

CHUNK_ENTRIES = 1 << 22
_MASK64 = (1 << 64) - 1


def fingerprint(part: WeightPart) -> tuple[int, int]:
    """Compute two 64-bit sums over (index, bits) of a part's entries; the sums of all parts add up to the weight's.

    The result does not depend on how a weight is cut into parts: every placement and world size gives the same.
    """
    entries = part.entries()
    sums = [0, 0]
    bits_type = _BITS[entries.element_size()]
    for first in range(0, entries.numel(), CHUNK_ENTRIES):
        bits = entries[first : first + CHUNK_ENTRIES].view(bits_type).long()
        place = torch.arange(part.start + first, part.start + first + bits.numel(), device=bits.device)
        mixed = _mix(bits ^ _mix(place))
        sums[0] += int(mixed.sum())
        sums[1] += int(_mix(mixed ^ place).sum())
    return sums[0] & _MASK64, sums[1] & _MASK64


def _mix(x: Tensor) -> Tensor:
    """Mix int64 bijectively (by wrapping multiplications and shifts)."""
    x = (x ^ (x >> 31)) * 0x2545F4914F6CDD1D
    x = (x ^ (x >> 29)) * -0x61C8864680B583EB
    return x ^ (x >> 32)


def combine_fingerprints(prints: Mapping[str, tuple[int, int]], shapes: Mapping[str, tuple[int, int]]) -> str:
    """Hash all target weights: 64 hex digits over names, shapes and fingerprints in sorted order."""
    sha = hashlib.sha256()
    for name in sorted(prints):
        sha.update(f"{name} {shapes[name]} {prints[name][0]:016x} {prints[name][1]:016x}\n".encode())
    return sha.hexdigest()
