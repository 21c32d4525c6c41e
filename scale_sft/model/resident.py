"""Write deltas into the frozen weights, and take them out again.

Every path follows one rounding rule: effective = (base.float() + delta).to(base.dtype).
A weight is stored whole (replicated base) or as one contiguous flat part per rank (ZeRO-3); the deltas' indices are
sorted, so a part's entries are one slice of them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from scale_sft.errors import UserError
from scale_sft.spiel.deltas import DeltaStore, SparseDelta
from scale_sft.spiel.indices import Part, on_device, piece_entries, pieces

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
    pieces if indices are int32, as a scatter needs int64 ones.
    """
    entries, values = bits_of(entries), bits_of(values)
    if indices.dtype is torch.int64:
        entries.scatter_(0, indices, values)
        return
    for part in pieces(indices.numel(), piece_entries(indices.device)):
        entries.scatter_(0, indices[part].long(), values[part])


@dataclass(frozen=True)
class WeightPart:
    """The part of one flattened weight that this process holds: some consecutive entries of a 1-D storage.

    `storage()` returns that storage, in place; call it each time, as it may move. Slices of one parameter share it.
    """

    storage: Callable[[], Tensor]
    start: int  # flat index of the first entry
    stop: int
    at: int = 0  # where the first entry is in the storage
    alone: bool = True  # the storage holds no other weight

    @classmethod
    def whole(cls, weight: Tensor) -> WeightPart:
        """Describe all of a weight that is stored whole."""
        return cls(lambda: weight.data.view(-1), 0, weight.numel())

    def entries(self) -> Tensor:
        """Return the part's entries as a 1-D view, in place."""
        storage = self.storage()
        return storage if self.alone else storage[self.at : self.at + self.stop - self.start]

    def cut(self, first: int, entries: int) -> WeightPart:
        """Describe what this process holds of so many consecutive entries of the weight, as a weight of their own."""
        start, stop = (min(max(bound - first, 0), entries) for bound in (self.start, self.stop))
        return WeightPart(self.storage, start, stop, self.at + max(0, first - self.start), False)

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
        self._names = store.names
        self.settle()
        for delta in store:
            _refuse_packed(delta, self.parts[delta.name])
        kinds = {(entries.dtype, entries.device) for entries in (part.entries() for part in parts.values())}
        self._alike = len(kinds) == 1 and kinds.pop()[1] == store.device
        self.adopt(*store)

    def adopt(self, *deltas: SparseDelta) -> None:
        """Save the base values of some weights' entries; the weights hold them until the next `write`."""
        for part in self._groups(deltas):
            names = [self._names[number] for number in part.numbers]
            self._find(part, names)
            index, held = self._places(part), [where for _, where in self._held(part)]
            for some, storage in self._storages(names):
                where = _span(held[some])
                values = read_entries(storage, index[where].to(storage.device))
                sizes = [one.stop - one.start for one in held[some]]
                self._base |= dict(zip(names[some], values.split(sizes), strict=True))

    def _find(self, part: Part, names: list[str]) -> None:
        """Find which entries of some whole weights this process holds; waits for the device only if weights are cut."""
        held, counts = [self.parts[name] for name in names], [self.store[name].active for name in names]
        if all(part.start == 0 and part.stop == self.store[name].numel for name, part in zip(names, held, strict=True)):
            self._where |= {name: slice(0, count) for name, count in zip(names, counts, strict=True)}
            return
        places = self.store.places
        offsets, starts = places.rows.offsets(part.weights), places.starts[part.weights]
        bounds = [offset + bound for offset, one in zip(offsets, held, strict=False) for bound in (one.start, one.stop)]
        joined = places.joined(part)
        found = torch.searchsorted(joined, on_device(bounds, joined.dtype, places.device)).tolist()
        for name, start, low, high in zip(names, starts, found[::2], found[1::2], strict=True):
            before = start - part.entries.start
            self._where[name] = slice(low - before, high - before)

    def _groups(self, deltas: Sequence[SparseDelta]) -> Iterator[Part]:
        """Yield whole weights, many at once where they are alike."""
        numbers = [self.store.number_of(delta.name) for delta in deltas]
        yield from self.store.places.groups(numbers, None if self._alike else 1)

    def _parts(self) -> Iterator[Part]:
        """Yield parts of all entries, of many weights at once where they are alike."""
        for part in self.store.places.parts():
            if self._alike or len(part.numbers) == 1:
                yield part
            else:
                yield from self.store.places.groups(part.numbers, 1)

    def _held(self, part: Part) -> list[tuple[slice, slice]]:
        """Of each weight of a part: which of its base values are needed, and the entries they belong to in the part."""
        found = []
        for number in part.numbers:
            where, first = self._where[self._names[number]], self.store.places.starts[number]
            low = max(first + where.start, part.entries.start)
            high = max(low, min(first + where.stop, part.entries.stop))
            saved, start = first + where.start, part.entries.start
            found.append((slice(low - saved, high - saved), slice(low - start, high - start)))
        return found

    def _places(self, part: Part) -> Tensor:
        """Compute the places of a part's entries in the storages of their weights: [n] integers."""
        held = [self.parts[self._names[number]] for number in part.numbers]
        return self.store.places.flat(part, [one.at - one.start for one in held])

    def _put(self, part: Part, deltas: Tensor | None) -> None:
        """Write a part's base values into the weights: plus `deltas` [n], or alone."""
        names, held = [self._names[number] for number in part.numbers], self._held(part)
        values = _joined([self._base[name][saved] for name, (saved, _) in zip(names, held, strict=True)])
        if deltas is not None:
            if values.numel() < part.count:
                deltas = _joined([deltas[where] for _, where in held])
            values = effective_values(values, deltas.to(values.device))
        index, start = self._places(part).to(values.device), 0
        for some, storage in self._storages(names):
            where = [one for _, one in held[some]]
            stop = start + sum(one.stop - one.start for one in where)
            if stop > start:
                write_entries(storage, index[_span(where)], values[start:stop])
            start = stop

    def _storages(self, names: Sequence[str]) -> Iterator[tuple[slice, Tensor]]:
        """Group weights that follow each other in one storage: (slice of `names`, storage)."""
        first = 0
        for last, name in enumerate(names, start=1):
            following = self.parts[names[last]].storage if last < len(names) else None
            if following is not self.parts[name].storage:
                yield slice(first, last), self.parts[name].storage()
                first = last

    def write(self) -> None:
        """Write the effective value of every active entry into its weight."""
        self.settle()
        for part in self._parts():
            self._put(part, self.store.flat[part.entries])
        self.written()

    def held(self, name: str) -> tuple[Tensor, Tensor, int, int]:
        """Describe what this process holds of one weight; call it after `settle`.

        Returns:
            Its part, 1-D, in place; base values [E] of the active entries there; the flat index of the part's first
            entry; how many active entries come before it.
        """
        part = self.parts[name]
        return part.entries(), self._base[name], part.start, self._where[name].start

    def release(self, *deltas: SparseDelta) -> None:
        """Write the base values back to some weights' entries, before these change."""
        for part in self._groups(deltas):
            self._put(part, None)

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
            where, start = self._where[delta.name], self.parts[delta.name].start
            values = effective_values(base, delta.deltas[where].to(base.device))
            found = read_entries(entries, (delta.indices[where] - start).to(entries.device))
            if not torch.equal(bits_of(found), bits_of(values)):
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
        self.release(*self.store)
        self.written()

    @property
    def bytes(self) -> int:
        """Bytes of the base values."""
        return sum(base.nbytes for base in self._base.values())


def _span(slices: Sequence[slice]) -> slice:
    """Join slices of entries that follow each other; empty ones may be anywhere."""
    full = [one for one in slices if one.stop > one.start] or [slice(0, 0)]
    return slice(full[0].start, full[-1].stop)


def _joined(tensors: Sequence[Tensor]) -> Tensor:
    return tensors[0] if len(tensors) == 1 else torch.cat(list(tensors))


def _refuse_packed(delta: SparseDelta, part: WeightPart) -> None:
    """Raise UserError for packed bytes: a delta cannot be written into them, and its indices are not their places."""
    entries = part.entries()
    if not entries.is_floating_point():
        raise UserError(
            f"weight '{delta.name}' is quantised (packed {str(entries.dtype).removeprefix('torch.')}): a resident "
            "delta cannot be written into it; use TransientDeltas"
        )
