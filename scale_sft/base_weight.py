"""The frozen weights that carry the deltas: where their bytes lie, how a delta is written in and taken out again.

One rounding rule on every path: effective = (base.float() + delta).to(base.dtype).
A weight is kept whole (replicated base) or as one contiguous flat part per rank (ZeRO-3); the deltas' indices are
sorted, so the entries of a part are one slice of them.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from .errors import UserError
from .spiel.delta import DeltaStore, SparseDelta

ROUNDING_RULE = "effective = (base.float() + delta).to(base.dtype)"
_CHUNK_ENTRIES = 1 << 22
_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}  # by bytes per entry
_MASK64 = (1 << 64) - 1


def effective_values(base: Tensor, deltas: Tensor) -> Tensor:
    """The one rounding rule: base [K] in its dtype, deltas [K] fp32 -> [K] in base's dtype."""
    return (base.float() + deltas).to(base.dtype)


def read_entries(entries: Tensor, indices: Tensor) -> Tensor:
    """entries [N], indices [K] int32 or int64 -> their values [K]."""
    return entries.index_select(0, indices)


def write_entries(entries: Tensor, indices: Tensor, values: Tensor) -> None:
    """entries[indices] = values, in place: entries [N], indices [K] distinct, values [K] of the same dtype.

    Written as bits: on a CPU a scatter of bfloat16 would take the whole weight to fp32 and back. Not by `scatter_`: not
    every torch takes int32 indices there.
    """
    bits = _BITS[entries.element_size()]
    entries.view(bits).index_put_((indices,), values.view(bits))


@dataclass(frozen=True)
class WeightPart:
    """The part of one flattened weight that this process holds.

    `entries()` gives a 1-D view of it, in place; it is asked for anew each time because the storage may move.
    """

    entries: Callable[[], Tensor]
    start: int  # flat index of the first entry
    stop: int

    @classmethod
    def whole(cls, weight: nn.Parameter) -> WeightPart:
        """The part of a weight that is kept whole."""
        return cls(lambda: weight.data.view(-1), 0, weight.numel())

    def slice_of(self, indices: Tensor) -> slice:
        """Which of the sorted flat `indices` [K] lie in this part."""
        bounds = torch.tensor([self.start, self.stop], dtype=indices.dtype, device=indices.device)
        low, high = torch.searchsorted(indices, bounds).tolist()
        return slice(low, high)


class ResidentDeltas:
    """Keeps weight = effective value at the active indices, with the base values of those entries put aside.

    Args:
        store: the deltas.
        parts: for each weight of the store, the part of it that this process holds; still the bare base.
        settle: called before weights are read or written, to bring sharded weights back to their shards.
        written: called after they are written, before anybody gathers them.
    """

    def __init__(
        self,
        store: DeltaStore,
        parts: Mapping[str, WeightPart],
        settle: Callable[[], None] = lambda: None,
        written: Callable[[], None] = lambda: None,
    ):
        self.store, self.parts, self.settle, self.written = store, parts, settle, written
        self._places: dict[str, tuple[slice, Tensor]] = {}
        self._base: dict[str, Tensor] = {}
        self.settle()
        for delta in store:
            _refuse_packed(delta, self.parts[delta.name])
            self._put_aside(delta)

    def _put_aside(self, delta: SparseDelta) -> None:
        part = self.parts[delta.name]
        entries = part.entries()
        where = part.slice_of(delta.indices)
        local = delta.indices[where]  # a view: a weight that is kept whole needs no copy of its indices
        local = (local - part.start if part.start else local).to(entries.device)
        self._places[delta.name] = (where, local)
        self._base[delta.name] = read_entries(entries, local)

    def write(self) -> None:
        """Write the effective value of every active entry into its weight."""
        self.settle()
        for delta in self.store:
            where, local = self._places[delta.name]
            base = self._base[delta.name]
            values = effective_values(base, delta.deltas[where].to(base.device))
            write_entries(self.parts[delta.name].entries(), local, values)
        self.written()

    def follow(self, delta: SparseDelta) -> None:
        """After `delta.indices` have changed: the base returns to the old entries, the new ones are put aside.

        The new entries hold their base value until the next `write`.
        """
        self._restore(delta.name)
        self._put_aside(delta)

    def restore(self) -> None:
        """Give every weight its original bytes back."""
        self.settle()
        for name in self._base:
            self._restore(name)
        self.written()

    def _restore(self, name: str) -> None:
        write_entries(self.parts[name].entries(), self._places[name][1], self._base[name])

    @property
    def bytes(self) -> int:
        """Memory of the base values, and of local indices where they are not the deltas' own."""
        total = 0
        for delta in self.store:
            local, base = self._places[delta.name][1], self._base[delta.name]
            shared = local.untyped_storage().data_ptr() == delta.indices.untyped_storage().data_ptr()
            total += base.nbytes + (0 if shared else local.nbytes)
        return total


def _refuse_packed(delta: SparseDelta, part: WeightPart) -> None:
    """Raises UserError for packed bytes: a delta cannot be written into them, and their places are not its indices."""
    entries = part.entries()
    if not entries.is_floating_point():
        raise UserError(
            f"weight '{delta.name}' is quantised (packed {str(entries.dtype).removeprefix('torch.')}): a resident "
            "delta cannot be written into it; use TransientDeltas"
        )


def fingerprint(part: WeightPart) -> tuple[int, int]:
    """Two 64-bit sums over (index, bits) of the entries of a part; the sums of all parts add up to the weight's.

    It does not depend on how a weight is cut into parts, so every placement and world size gives the same.
    """
    entries = part.entries()
    sums = [0, 0]
    bits_type = _BITS[entries.element_size()]
    for first in range(0, entries.numel(), _CHUNK_ENTRIES):
        bits = entries[first : first + _CHUNK_ENTRIES].view(bits_type).long()
        place = torch.arange(part.start + first, part.start + first + bits.numel(), device=bits.device)
        mixed = _mix(bits ^ _mix(place))
        sums[0] += int(mixed.sum())
        sums[1] += int(_mix(mixed ^ place).sum())
    return sums[0] & _MASK64, sums[1] & _MASK64


def _mix(x: Tensor) -> Tensor:
    """A bijective mixing of int64 (wrapping multiplications and shifts)."""
    x = (x ^ (x >> 31)) * 0x2545F4914F6CDD1D
    x = (x ^ (x >> 29)) * -0x61C8864680B583EB
    return x ^ (x >> 32)


def combine_fingerprints(prints: Mapping[str, tuple[int, int]], shapes: Mapping[str, tuple[int, int]]) -> str:
    """One hash of all target weights: 64 hex digits over names, shapes and fingerprints in sorted order."""
    sha = hashlib.sha256()
    for name in sorted(prints):
        sha.update(f"{name} {shapes[name]} {prints[name][0]:016x} {prints[name][1]:016x}\n".encode())
    return sha.hexdigest()
