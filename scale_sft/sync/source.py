"""What a trained model gives to `compose`: a small interface, to which `SparseModel` is adapted here.

K active entries of a weight.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from scale_sft.errors import UserError
from scale_sft.model.resident import ResidentDeltas, bits_of, effective_values, read_entries
from scale_sft.model.sparse_model import SparseModel

from .names import Piece


@dataclass(frozen=True)
class TrainedWeight:
    """The active entries of one weight, which may be all that ever differs from the base.

    Attributes:
        name: in the model's state dict.
        indices: [K] flat, sorted, unique, int32 or int64.
        values: [K] effective values, as the model has them now.
        base: [K] values of the base, of the same dtype.
    """

    name: str
    indices: Tensor
    values: Tensor
    base: Tensor


class Source(Protocol):
    """A model with sparse deltas. Every rank that trains it makes the same calls."""

    @property
    def model(self) -> nn.Module:
        """The model whose state dict has the names; wrappers are taken off."""

    @property
    def shapes(self) -> Mapping[str, tuple[int, int]]:
        """(O, I) of each trained weight."""

    def base_prints(self, pieces: Pieces) -> Mapping[str, tuple[int, int]]:
        """Fingerprint the base's weights as the files hold them, by name there: see `scale_sft.model.fingerprints`."""

    def weights(self) -> Iterator[TrainedWeight]:
        """Yield each trained weight as it is now.

        Raises:
            UserError: the model does not hold its deltas at present.
        """


Pieces = Mapping[str, tuple[Piece, ...]]
"""The tensors in the files that hold each trained weight, by its name in the model."""
Adapt = Callable[[Any], Source | None]
"""Gives the source of a model of one kind; None for other models."""
_kinds: list[Adapt] = []


def register(adapt: Adapt) -> Adapt:
    """Make `sync` accept another kind of trained model."""
    _kinds.append(adapt)
    return adapt


def source_of(model: Any) -> Source:
    """Find the source of a trained model.

    Raises:
        UserError: it carries no sparse deltas, or its base is quantised.
    """
    for adapt in _kinds:
        source = adapt(model)
        if source is not None:
            return source
    raise UserError(
        f"sync: got {type(model).__name__}, expected a model with sparse deltas. Fix: give what scale_sft.attach "
        "returned, or a PEFT model with a SpielConfig"
    )


@register
def _of_sparse_model(model: Any) -> Source | None:
    return SparseSource(model) if isinstance(model, SparseModel) else None


class SparseSource:
    """A `SparseModel` as a source.

    Deltas and indices are on every rank. Where the base is in shards, the ranks' base values are added up in one
    all-reduce of 4 bytes per entry; then every rank composes the same patches.
    """

    def __init__(self, sparse: SparseModel):
        sparse.require_attached("sync")
        if not isinstance(sparse.carrier, ResidentDeltas):
            raise UserError(
                f"sync: got a base in {sparse.settings.quantization}, whose weights never hold effective values; "
                "expected a plain base. Fix: send the adapter (sparse.save), or train without quantization"
            )
        self._sparse, self._carrier = sparse, sparse.carrier

    @property
    def model(self) -> nn.Module:
        return self._sparse.model

    @property
    def shapes(self) -> Mapping[str, tuple[int, int]]:
        return self._sparse.shapes

    def base_prints(self, pieces: Pieces) -> Mapping[str, tuple[int, int]]:
        sparse = self._sparse
        found = {several[0].name: sparse.prints[name] for name, several in pieces.items() if len(several) == 1}
        cut = {
            piece.name: sparse.parts[name].cut(piece.first, piece.last - piece.first)
            for name, several in pieces.items()
            for piece in several
            if len(several) > 1
        }
        if cut:
            with self._carrier.without():
                found |= sparse.group.fingerprints(cut)
        return found

    def weights(self) -> Iterator[TrainedWeight]:
        sparse, store = self._sparse, self._sparse.tuning.store
        sparse.require_attached("sync")
        whole = all(part.stop - part.start == store[name].numel for name, part in sparse.parts.items())
        if not whole:  # a rank that raised alone would leave the others waiting
            lost = next(filter(None, sparse.group.gather_objects(self._carrier.misplaced())), None)
            if lost:
                raise UserError(f"sync: weight '{lost}' does not hold its deltas on every rank; expected it to")
        if sparse.overwritten:
            sparse.require_intact("sync")
        gathered = None if whole else self._gather_base()
        self._carrier.settle()
        start = 0
        for delta in store:
            base = self._carrier.base_values(delta.name)
            indices = delta.indices.to(base.device)
            if gathered is not None:
                base = gathered[start : start + delta.active].to(bits_of(base).dtype).view(base.dtype)
                start += delta.active
            values = effective_values(base, delta.deltas.to(base.device))
            if whole and not self._holds(delta.name, indices, values):
                sparse.require_intact("sync")
            yield TrainedWeight(delta.name, indices, values, base)

    def _holds(self, name: str, indices: Tensor, values: Tensor) -> bool:
        """Compare the entries [K] of a whole weight with their effective values [K], bit for bit."""
        entries = self._sparse.parts[name].entries()
        if entries.device != values.device or entries.dtype is not values.dtype:
            return False
        return torch.equal(bits_of(read_entries(entries, indices)), bits_of(values))

    def _gather_base(self) -> Tensor:
        """Collect the base values of all entries from the ranks that hold them: bits [sum of K] int32."""
        store = self._sparse.tuning.store
        bits = torch.zeros(store.active, dtype=torch.int32, device=self._sparse.group.device)
        start = 0
        for delta in store:
            _, base, _, before = self._carrier.held(delta.name)
            first = start + before
            bits[first : first + base.numel()] = bits_of(base).to(bits.device, torch.int32)
            start += delta.active
        self._sparse.group.sum_(bits, "sync")
        return bits
