"""The frozen weights that carry the deltas: where their bytes lie, how a delta is written in and taken out again.

One rounding rule on every path: effective = (base.float() + delta).to(base.dtype).
A weight is kept whole (replicated base) or as one contiguous flat part per rank (ZeRO-3); the deltas' indices are
sorted, so the entries of a part are one slice of them.
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
    """The one rounding rule: base [K] in its dtype, deltas [K] fp32 -> [K] in base's dtype."""
    return (base.float() + deltas).to(base.dtype)


def read_entries(entries: Tensor, indices: Tensor) -> Tensor:
    """Entries [N], indices [K] int32 or int64 -> their values [K]."""
    return entries.index_select(0, indices)


def write_entries(entries: Tensor, indices: Tensor, values: Tensor) -> None:
    """entries[indices] = values, in place: entries [N], indices [K] distinct, values [K] of the same dtype.

    Written as bits: on a CPU a scatter of bfloat16 would take the whole weight to fp32 and back. In pieces: a scatter
    needs int64 indices, and they are widened only so many at a time.
    """
    bits = _BITS[entries.element_size()]
    entries, values = entries.view(bits), values.view(bits)
    for part in pieces(indices.numel()):
        entries.scatter_(0, indices[part].long(), values[part])


@dataclass(frozen=True)
class WeightPart:
    """The part of one flattened weight that this process holds.

    `entries()` gives a 1-D view of it, in place; it is called each time because the storage may move.
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
        self._where: dict[str, slice] = {}  # which entries of each delta lie in this process's part
        self._base: dict[str, Tensor] = {}
        self.settle()
        for delta in store:
            _refuse_packed(delta, self.parts[delta.name])
            self.adopt(delta)

    def adopt(self, delta: SparseDelta) -> None:
        """Put the base values of one weight's entries aside; the weight holds them until the next `write`."""
        part, indices = self.parts[delta.name], delta.indices
        self._where[delta.name] = part.slice_of(indices)
        entries, local = part.entries(), self._local(delta, indices)
        self._base[delta.name] = read_entries(entries, local)

    def _local(self, delta: SparseDelta, indices: Tensor) -> Tensor:
        """Places of the entries of this process's part, counted from its start."""
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
        """The base returns to one weight's entries; before they change."""
        write_entries(self.parts[delta.name].entries(), self._local(delta, delta.indices), self._base[delta.name])

    def base_values(self, name: str) -> Tensor:
        """Values of the base at the active entries of one weight that this process holds: [E] in the base's dtype."""
        return self._base[name]

    def overwrite(self, delta: SparseDelta, base: Tensor) -> None:
        """Write values of the base [K] at one weight's entries, whatever it holds there; before `adopt`."""
        part = self.parts[delta.name]
        where, entries = part.slice_of(delta.indices), part.entries()
        local = (delta.indices[where] - part.start).to(entries.device)
        write_entries(entries, local, base[where].to(entries.device))

    @contextmanager
    def without(self) -> Iterator[None]:
        """The weights are the base's for the length of the block."""
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
        """Memory of the base values."""
        return sum(base.nbytes for base in self._base.values())


def _refuse_packed(delta: SparseDelta, part: WeightPart) -> None:
    """Raises UserError for packed bytes: a delta cannot be written into them, and their places are not its indices."""
    entries = part.entries()
    if not entries.is_floating_point():
        raise UserError(
            f"weight '{delta.name}' is quantised (packed {str(entries.dtype).removeprefix('torch.')}): a resident "
            "delta cannot be written into it; use TransientDeltas"
        )
