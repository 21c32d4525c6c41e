"""Transient deltas (section 3.4): the effective weight exists for one product at a time.

Dequantising makes a dense copy anyway; the delta is added to that copy in place, by the same rounding rule as in
`resident`, without another copy. The packed base is only read. Unquantised bases have `ResidentDeltas`.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from functools import partial

import torch
from torch import Tensor, nn

from scale_sft.spiel.deltas import DeltaStore, SparseDelta
from scale_sft.spiel.taps import Materialize, Needed, Record, RecordMany, WeightTap, attach

from .embeddings import attach_embedding_taps
from .expert_taps import RouterTap, attach_expert_taps
from .experts import FusedWeight
from .packed_weights import PackedWeight, PlainWeight, packed_weights
from .resident import effective_values, read_entries, write_entries
from .routers import is_free_router
from .targets import Target


def add_delta_(weight: Tensor, indices: Tensor, deltas: Tensor) -> None:
    """Write effective values into a dequantised weight, in place: indices [K] flat, deltas [K]."""
    entries = weight.view(-1)
    write_entries(entries, indices, effective_values(read_entries(entries, indices), deltas))


class TransientDeltas:
    """Deltas of a quantised base, added to each weight on demand.

    Args:
        store: the deltas, the only copy of their values.
        packed: all quantised weights of the model by name, even those without a delta; and any other target.
        materialize: yields the whole packed parameter, even if it is stored in shards.
    """

    bytes = 0  # of state in addition to the deltas: none

    def __init__(
        self,
        store: DeltaStore,
        packed: Mapping[str, PackedWeight | PlainWeight],
        materialize: Materialize = nullcontext,
    ):
        self.packed, self.materialize = packed, materialize
        self._fused: dict[str, tuple[FusedWeight, list[str]]] = {}  # fused parameters, and their slices with deltas
        for name, weight in packed.items():
            if weight.fused is not None:
                self._fused.setdefault(weight.fused.name, (weight.fused, []))[1].append(name)
        self.follow(store)

    def follow(self, store: DeltaStore) -> None:
        """Carry the deltas of another store from now on."""
        self._store: DeltaStore | None = store
        self._deltas = {delta.name: delta for delta in store}

    def effective_weight(self, name: str) -> Tensor:
        """Compute an effective weight: a new tensor [O, I] in the compute dtype, which the caller frees after use."""
        packed, delta = self.packed[name], self._deltas.get(name)
        with self.materialize(packed.weight) as stored:
            weight = packed.dequantize(stored.data)
        if delta is not None:
            add_delta_(weight, delta.indices, delta.deltas)
        return weight

    def effective_experts(self, parameter: str) -> Tensor:
        """Compute all effective slices of a fused parameter: a new tensor [E, R, C], which the caller frees after use.

        Args:
            parameter: its name.
        """
        fused, slices = self._fused[parameter]
        with self.materialize(fused.weight) as stored:
            weight = stored.detach().clone()
        if self._store is None:
            for name in slices:
                if name in self._deltas:
                    add_delta_(weight[self.packed[name].number], self._deltas[name].indices, self._deltas[name].deltas)
            return weight
        places, size = self._store.places, weight[0].numel()
        numbers = [self._store.number_of(name) for name in slices]
        shifts = {at: self.packed[name].number * size for at, name in zip(numbers, slices, strict=True)}
        for part in places.groups(numbers):
            index = places.flat(part, [shifts[at] for at in part.numbers])
            add_delta_(weight, index, self._store.flat[part.entries])
        return weight

    def effective_rows(self, name: str, ids: Tensor) -> Tensor:
        """Look up effective rows [..., I] of an unquantised weight by number [...], without a copy of the rest."""
        found, delta = ids.reshape(-1).long(), self._deltas.get(name)
        with self.materialize(self.packed[name].module.weight) as stored:
            met = torch.zeros(len(stored), dtype=torch.bool, device=ids.device).index_fill_(0, found, True)
            rows = stored.detach()[met]
        place = met.cumsum(0).sub_(1)
        if delta is not None:
            indices = delta.indices.long()
            row = torch.div(indices, delta.shape[1], rounding_mode="floor")
            inside = met.index_select(0, row).nonzero().squeeze(1)
            row, indices = row[inside], indices[inside]
            add_delta_(rows, indices + (place[row] - row) * delta.shape[1], delta.deltas[inside])
        return rows.index_select(0, place.index_select(0, found)).view(*ids.shape, -1)

    def settle(self) -> None:
        """Do nothing: weights are never written, so their location does not matter."""

    def write(self) -> None:
        """Do nothing: the next effective weight reads the new values."""

    def release(self, *deltas: SparseDelta) -> None:
        """Do nothing: weights hold only the base."""

    def adopt(self, *deltas: SparseDelta) -> None:
        """Do nothing: the next effective weight reads the new indices."""

    def overwrite(self, delta: SparseDelta, base: Tensor) -> None:
        """Do nothing: weights hold only the base."""

    def restore(self) -> None:
        """Do nothing: the packed base was never changed."""

    def misplaced(self) -> None:
        """Return None: weights hold only the base."""

    @contextmanager
    def without(self, instead: Iterable[SparseDelta] = ()) -> Iterator[None]:
        """Leave the deltas out of effective weights inside the block; `instead`, if given, takes their place."""
        before = self._store, self._deltas
        self._store, self._deltas = None, {delta.name: delta for delta in instead}
        try:
            yield
        finally:
            self._store, self._deltas = before

    def with_states(self, prints: Mapping[str, tuple[int, int]]) -> dict[str, tuple[int, int]]:
        """Compute fingerprints of whole weights from those of their packed bytes."""
        return {name: self.packed[name].with_state(value) for name, value in prints.items()}


def weights_used(
    model: nn.Module, targets: Iterable[Target], dtype: torch.dtype, device: torch.device
) -> dict[str, PackedWeight | PlainWeight]:
    """Collect all quantised weights, and targets that are not, by name, before the packed ones are cut into shards."""
    packed: dict[str, PackedWeight | PlainWeight] = {}
    packed |= packed_weights(model, dtype, device)
    packed |= {
        t.name: PlainWeight(t.module, t.transposed, fused=t.fused, number=t.number, output=t.output)
        for t in targets
        if t.name not in packed
    }
    return packed


def attach_transient_taps(
    deltas: TransientDeltas,
    trained: Collection[str],
    record: Record,
    needed: Needed | None = None,
    record_many: RecordMany | None = None,
) -> None:
    """Route every quantised layer through a tap, even those without a delta.

    The model then computes with dequantised weights everywhere, in training and in evaluation. bitsandbytes' own
    forward passes differ: in 8 bits they quantise the activations, and CPUs with AVX512-bf16 repack weights.
    """
    experts: dict[int, tuple[str, nn.Module]] = {}
    for name, packed in deltas.packed.items():
        if packed.fused is not None:
            experts[id(packed.module)] = (packed.fused.path, packed.module)
            continue
        if isinstance(packed, PlainWeight) and isinstance(packed.module, nn.Embedding):
            attach_embedding_taps(
                packed.module,
                packed.output,
                name,
                record,
                materialize=deltas.materialize,
                look_up=partial(deltas.effective_rows, name),
                effective_weight=partial(deltas.effective_weight, name),
            )
            continue
        effective_weight, receive = partial(deltas.effective_weight, name), record if name in trained else None
        if is_free_router(packed.module):
            attach(RouterTap(packed.module, name, receive, effective_weight))
            continue
        tap = WeightTap(
            packed.module,
            name,
            receive,
            transposed=packed.transposed,
            materialize=deltas.materialize,
            effective_weight=effective_weight,
            needed=needed,
        )
        attach(tap)
    attach_expert_taps(experts.values(), trained, record, deltas.materialize, deltas.effective_experts, record_many)
