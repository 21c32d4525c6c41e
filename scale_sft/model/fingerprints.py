"""Fingerprint the base: sums over index and bits that do not depend on how a weight is sharded."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor

from .resident import WeightPart, bits_of

CHUNK_ENTRIES = 1 << 22
_TOGETHER = 1 << 16
"""Entries of several small weights that share operations: few enough for a cache."""
_MASK64 = (1 << 64) - 1


def fingerprint(part: WeightPart) -> tuple[int, int]:
    """Compute two 64-bit sums over (index, bits) of a part's entries; the sums of all parts add up to the weight's.

    The result does not depend on how a weight is cut into parts: every placement and world size gives the same.
    """
    entries = part.entries()
    sums = torch.zeros(2, dtype=torch.int64, device=entries.device)
    for first in range(0, entries.numel(), CHUNK_ENTRIES):
        bits = bits_of(entries[first : first + CHUNK_ENTRIES]).long()
        sums += _sums(torch.arange(part.start + first, part.start + first + bits.numel(), device=bits.device), bits)
    first, second = sums.tolist()  # one transfer per weight
    return first & _MASK64, second & _MASK64


def fingerprints_of(parts: Mapping[str, WeightPart]) -> dict[str, tuple[int, int]]:
    """Fingerprint each part, small ones of one device together: see `fingerprint`."""
    prints: dict[str, tuple[int, int]] = {}
    group: dict[str, WeightPart] = {}
    entries, place = 0, None
    for name, part in parts.items():
        size = part.stop - part.start
        if size > _TOGETHER // 2:
            prints[name] = fingerprint(part)
            continue
        here = (part.entries().device, part.entries().dtype)
        if group and (entries + size > _TOGETHER or here != place):
            prints |= _together(group)
            group, entries = {}, 0
        group[name], place = part, here
        entries += size
    prints |= _together(group)
    return {name: prints[name] for name in parts}


def _together(parts: Mapping[str, WeightPart]) -> dict[str, tuple[int, int]]:
    """Fingerprint small parts on one device, of one dtype, in a few operations."""
    if not parts:
        return {}
    sizes = [part.stop - part.start for part in parts.values()]
    bits = bits_of(torch.cat([part.entries() for part in parts.values()])).long()
    counts = torch.tensor(sizes, device=bits.device)
    owner = torch.repeat_interleave(counts, output_size=sum(sizes))
    ends = counts.cumsum(0)
    first = torch.tensor([part.start for part in parts.values()], device=bits.device) - (ends - counts)
    place = torch.arange(sum(sizes), device=bits.device).add_(first.index_select(0, owner))
    mixed = _mix(bits ^ _mix(place))
    both = torch.stack((mixed, _mix(mixed ^ place)), 1)
    sums = torch.zeros(len(sizes), 2, dtype=torch.int64, device=bits.device).index_add_(0, owner, both)
    return {name: (a & _MASK64, b & _MASK64) for name, (a, b) in zip(parts, sums.tolist(), strict=True)}


def entry_sums(indices: Tensor, values: Tensor) -> Tensor:
    """Compute what the entries at flat `indices` [K] add to a weight's fingerprint: [2] int64, modulo 2^64."""
    sums = torch.zeros(2, dtype=torch.int64, device=values.device)
    for first in range(0, values.numel(), CHUNK_ENTRIES):
        part = slice(first, first + CHUNK_ENTRIES)
        sums += _sums(indices[part].long(), bits_of(values[part]).long())
    return sums


def change_sums(changes: Sequence[tuple[Tensor, Tensor, Tensor]]) -> list[list[int]]:
    """Compute what writes add to the fingerprints of several weights: two integers each, modulo 2^64.

    Args:
        changes: of each weight, (flat indices [K], new values [K], old values [K]), all on one device.

    Returns:
        By weight; `add_sums` adds them. One transfer from the device, and few operations however many weights.
    """
    found: list[Tensor] = []
    first = entries = 0
    for last, (indices, _, _) in enumerate(changes, start=1):
        entries += indices.numel()
        if last == len(changes) or entries > _TOGETHER:
            found.append(_change_sums(changes[first:last]))
            first, entries = last, 0
    return torch.cat(found).tolist() if found else []


def _change_sums(group: Sequence[tuple[Tensor, Tensor, Tensor]]) -> Tensor:
    """Compute the sums of W weights together: [W, 2] int64."""
    place, new, old = (torch.cat([bits_of(one).long() for one in parts]) for parts in zip(*group, strict=True))
    counts = torch.tensor([indices.numel() for indices, _, _ in group], device=place.device)
    owner = torch.repeat_interleave(torch.arange(len(group), device=place.device), counts)
    key = _mix(place)
    new, old = _mix(new ^ key), _mix(old ^ key)
    added = torch.stack((new - old, _mix(new ^ place) - _mix(old ^ place)), 1)
    return torch.zeros(len(group), 2, dtype=torch.int64, device=place.device).index_add_(0, owner, added)


def add_sums(print_: tuple[int, int], sums: Iterable[int]) -> tuple[int, int]:
    """Add sums of `entry_sums` or `change_sums` to a fingerprint."""
    first, second = (known + more & _MASK64 for known, more in zip(print_, sums, strict=True))
    return first, second


def _sums(place: Tensor, bits: Tensor) -> Tensor:
    """Sum over entries at `place` [n] int64 with `bits` [n] int64: [2] int64."""
    mixed = _mix(bits ^ _mix(place))
    return torch.stack((mixed.sum(), _mix(mixed ^ place).sum()))


def _mix(x: Tensor) -> Tensor:
    """Mix int64 by wrapping multiplications and shifts.

    The shifts keep the sign, so an entry and its bitwise complement count the same. Adapters keep these fingerprints:
    the formula stays.
    """
    x = (x ^ (x >> 31)) * 0x2545F4914F6CDD1D
    x = (x ^ (x >> 29)) * -0x61C8864680B583EB
    return x ^ (x >> 32)


def combine_fingerprints(prints: Mapping[str, tuple[int, int]], shapes: Mapping[str, tuple[int, int]]) -> str:
    """Hash all target weights: 64 hex digits over names, shapes and fingerprints in sorted order."""
    sha = hashlib.sha256()
    for name in sorted(prints):
        sha.update(f"{name} {shapes[name]} {prints[name][0]:016x} {prints[name][1]:016x}\n".encode())
    return sha.hexdigest()
