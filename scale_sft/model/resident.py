"""Write deltas into the frozen weights, and take them out again.

Every path follows one rounding rule: effective = (base.float() + delta).to(base.dtype).
A weight is stored whole (replicated base) or as one contiguous flat part per rank (ZeRO-3); the deltas' indices are
sorted, so a part's entries are one slice of them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from scale_sft.errors import UserError
from scale_sft.spiel.deltas import DeltaStore, SparseDelta
from scale_sft.spiel.indices import pieces

ROUNDING_RULE = "effective = (base.float() + delta).to(base.dtype)"
_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}  # by bytes per entry


def effective_values(base: Tensor, deltas: Tensor) -> Tensor:
    """Apply the rounding rule to base [K] in its dtype and deltas [K] fp32: [K] in base's dtype."""
    return (base.float() + deltas).to(base.dtype)


def bits_of(values: Tensor) -> Tensor:
    """View values as integers of the same width, so that comparisons see signs of zeros and NaNs."""
    return values.view(_BITS[values.element_size()])


def read_entries(entries: Tensor, indices: Tensor) -> Tensor:
    """Read the values [K] at indices [K], int32 or int64, of entries [N]."""
    return entries.index_select(0, indices)


def write_entries(entries: Tensor, indices: Tensor, values: Tensor) -> None:
    """Set entries[indices] = values in place: entries [N], indices [K] distinct, values [K] of the same dtype.

    Values are written as bits, as a CPU scatter of bfloat16 would convert the whole weight to fp32 and back; and in
    pieces, as a scatter needs int64 indices, which are widened one piece at a time.
    """
    bits = _BITS[entries.element_size()]
    entries, values = entries.view(bits), values.view(bits)
    for part in pieces(indices.numel()):
        entries.scatter_(0, indices[part].long(), values[part])


@dataclass(frozen=True)
class WeightPart:
    """The part of one flattened weight that this process holds.

    `entries()` returns a 1-D view of it, in place; call it each time, as the storage may move.
    """

    entries: Callable[[], Tensor]
    start: int  # flat index of the first entry
    stop: int

    @classmethod
    def whole(cls, weight: nn.Parameter) -> WeightPart:
        """Describe all of a weight that is stored whole."""
        return cls(lambda: weight.data.view(-1), 0, weight.numel())

    def slice_of(self, indices: Tensor) -> slice:
        """Find the slice of the sorted flat `indices` [K] that belongs to this part."""
        bounds = torch.tensor([self.start, self.stop], dtype=indices.dtype, device=indices.device)
        low, high = torch.searchsorted(indices, bounds).tolist()
        return slice(low, high)


class ResidentDeltas:
    """Deltas resident in the weights: effective values at the active indices, with the base values saved.

    Args:
        store: the deltas.
        parts: for each weight of the store, the part of it that this process holds; still the bare base.
        settle: called before weights are read or written, to bring sharded weights back to their shards.
        written: called after they are written, before any rank gathers them.
    """

    def __init__(
        self,
        store: DeltaStore,
        parts: Mapping[str, WeightPart],
        settle: Callable[[], None] = lambda: None,
        written: Callable[[], None] = lambda: None,
    ):
        self.store, self.parts, self.settle, self.written = store, parts, settle, written
        self._where: dict[str, slice] = {}  # the entries of each delta in this process's part
        self._base: dict[str, Tensor] = {}
        self.settle()
        for delta in store:
            _refuse_packed(delta, self.parts[delta.name])
            self.adopt(delta)

    def adopt(self, delta: SparseDelta) -> None:
        """Save the base values of one weight's entries; the weight holds them until the next `write`."""
        part, indices = self.parts[delta.name], delta.indices
        self._where[delta.name] = part.slice_of(indices)
        entries, local = part.entries(), self._local(delta, indices)
        self._base[delta.name] = read_entries(entries, local)

    def _local(self, delta: SparseDelta, indices: Tensor) -> Tensor:
        """Compute the places of the entries in this process's part, counted from its start."""
        part = self.parts[delta.name]
        local = indices[self._where[delta.name]]
        return (local - part.start if part.start else local).to(part.entries().device)

    def write(self) -> None:
        """Write the effective value of every active entry into its weight."""
        self.settle()
        for delta in self.store:
            base = self._base[delta.name]
            values = effective_values(base, delta.deltas[self._where[delta.name]].to(base.device))
            write_entries(self.parts[delta.name].entries(), self._local(delta, delta.indices), values)
        self.written()

    def held(self, name: str) -> tuple[Tensor, Tensor, int, int]:
        """Describe what this process holds of one weight; call it after `settle`.

        Returns:
            Its part, 1-D, in place; base values [E] of the active entries there; the flat index of the part's first
            entry; how many active entries come before it.
        """
        part = self.parts[name]
        return part.entries(), self._base[name], part.start, self._where[name].start

    def release(self, delta: SparseDelta) -> None:
        """Write the base values back to one weight's entries, before these change."""
        write_entries(self.parts[delta.name].entries(), self._local(delta, delta.indices), self._base[delta.name])

    def base_values(self, name: str) -> Tensor:
        """Return the base values of one weight's active entries that this process holds: [E] in the base's dtype."""
        return self._base[name]

    def overwrite(self, delta: SparseDelta, base: Tensor) -> None:
        """Write base values [K] at one weight's entries, regardless of their present values; before `adopt`."""
        part = self.parts[delta.name]
        where, entries = part.slice_of(delta.indices), part.entries()
        local = (delta.indices[where] - part.start).to(entries.device)
        write_entries(entries, local, base[where].to(entries.device))

    def misplaced(self) -> str | None:
        """Name a weight that does not hold its effective values any more, bit for bit; None if all do. O(K)."""
        self.settle()
        for delta in self.store:
            base, entries = self._base[delta.name], self.parts[delta.name].entries()
            if entries.device != base.device or entries.dtype is not base.dtype:
                return delta.name
            values = effective_values(base, delta.deltas[self._where[delta.name]].to(base.device))
            bits = _BITS[base.element_size()]
            found = read_entries(entries, self._local(delta, delta.indices))
            if not torch.equal(found.view(bits), values.view(bits)):
                return delta.name
        return None

    @contextmanager
    def without(self) -> Iterator[None]:
        """Give the weights their base values for the length of the block."""
        self.restore()
        try:
            yield
        finally:
            self.write()

    def restore(self) -> None:
        """Give every weight its original bytes back."""
        self.settle()
        for delta in self.store:
            self.release(delta)
        self.written()

    @property
    def bytes(self) -> int:
        """Bytes of the base values."""
        return sum(base.nbytes for base in self._base.values())


def _refuse_packed(delta: SparseDelta, part: WeightPart) -> None:
    """Raise UserError for packed bytes: a delta cannot be written into them, and its indices are not their places."""
    entries = part.entries()
    if not entries.is_floating_point():
        raise UserError(
            f"weight '{delta.name}' is quantised (packed {str(entries.dtype).removeprefix('torch.')}): a resident "
            "delta cannot be written into it; use TransientDeltas"
        )
