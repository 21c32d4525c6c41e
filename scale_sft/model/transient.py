"""Transient deltas (section 3.4): the effective weight is made for one product at a time and discarded after it.

Dequantising makes a dense copy anyway; the delta is added in place on that copy, by the one rounding rule, and nothing
else is made. The packed base is only ever read. Bases that are not quantised have `ResidentDeltas` instead.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from functools import partial

from torch import Tensor

from scale_sft.spiel.deltas import DeltaStore, SparseDelta
from scale_sft.spiel.taps import Materialize, Record, WeightTap, attach

from .packed_weights import PackedWeight, PlainWeight
from .resident import effective_values, read_entries, write_entries


def add_delta_(weight: Tensor, indices: Tensor, deltas: Tensor) -> None:
    """Write effective values into a dequantised weight [O, I], in place: indices [K] flat, deltas [K]."""
    entries = weight.view(-1)
    write_entries(entries, indices, effective_values(read_entries(entries, indices), deltas))


class TransientDeltas:
    """Makes effective weights of a quantised base from the present deltas, whenever one is asked for.

    Args:
        store: the deltas; none of their values is kept elsewhere.
        packed: all quantised weights of the model by name, those without a delta too; and any other target.
        materialize: gives the whole packed parameter, wherever it is kept.
    """

    bytes = 0  # of state other than the deltas: none

    def __init__(
        self,
        store: DeltaStore,
        packed: Mapping[str, PackedWeight | PlainWeight],
        materialize: Materialize = nullcontext,
    ):
        self.packed, self.materialize = packed, materialize
        self._deltas = {delta.name: delta for delta in store}

    def effective_weight(self, name: str) -> Tensor:
        """A new tensor [O, I] in the compute dtype; the caller lets go of it after use."""
        packed, delta = self.packed[name], self._deltas.get(name)
        with self.materialize(packed.module.weight) as stored:
            weight = packed.dequantize(stored.data)
        if delta is not None:
            add_delta_(weight, delta.indices, delta.deltas)
        return weight

    def settle(self) -> None:
        """Nothing is written into weights, so they may lie wherever they are."""

    def write(self) -> None:
        """The next effective weight reads the new values by itself."""

    def release(self, delta: SparseDelta) -> None:
        """No weight holds a delta."""

    def adopt(self, delta: SparseDelta) -> None:
        """The next effective weight reads the new indices by itself."""

    def overwrite(self, delta: SparseDelta, base: Tensor) -> None:
        """Do nothing: no weight holds a delta."""

    def restore(self) -> None:
        """Do nothing: the packed base was never changed."""

    @contextmanager
    def without(self) -> Iterator[None]:
        """Effective weights are those of the base for the length of the block."""
        deltas, self._deltas = self._deltas, {}
        try:
            yield
        finally:
            self._deltas = deltas

    def with_states(self, prints: Mapping[str, tuple[int, int]]) -> dict[str, tuple[int, int]]:
        """Fingerprints of whole weights from those of their packed bytes."""
        return {name: self.packed[name].with_state(value) for name, value in prints.items()}


def attach_transient_taps(deltas: TransientDeltas, trained: Collection[str], record: Record) -> None:
    """Route every quantised layer through a tap, the ones without a delta too.

    So the model computes with its dequantised weights everywhere, in training and in evaluation; bitsandbytes' own
    forward passes differ from that (8 bits quantise the activations, processors with AVX512-bf16 repack weights).
    """
    for name, packed in deltas.packed.items():
        tap = WeightTap(
            packed.module,
            name,
            record if name in trained else None,
            transposed=packed.transposed,
            materialize=deltas.materialize,
            effective_weight=partial(deltas.effective_weight, name),
        )
        attach(tap)
