"""The trainer's side: compose patches from what has changed since a version.

A trainer remembers what it sent last: indices, values and base values of the active entries, 8 bytes per entry on a
bf16 base. Nothing compares whole weights: the trained entries are known. K active entries of a weight.
"""

from __future__ import annotations

import uuid
import weakref
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from scale_sft.errors import UserError
from scale_sft.model.fingerprints import add_sums, change_sums, combine_fingerprints
from scale_sft.model.resident import bits_of
from scale_sft.spiel.indices import find_places, merge_places

from .names import Piece, pieces_on_disk, unwrapped
from .patches import Patches, Prints, Snapshot, WeightPatch
from .source import Source, TrainedWeight, source_of

Change = tuple[Tensor, Tensor, Tensor]
"""Entries of one weight that change: sorted indices [C], values [C], and the values [C] that the receiver has."""


@dataclass
class _Stream:
    """The versions of one model that this process has composed."""

    pieces: dict[str, tuple[Piece, ...]]  # in the files, by name in the model
    shapes: dict[str, tuple[int, int]]  # of these pieces, by name in the files
    base: Snapshot
    last: Snapshot = field(init=False)

    def __post_init__(self) -> None:
        self.last = self.base


_streams: weakref.WeakKeyDictionary[Any, _Stream] = weakref.WeakKeyDictionary()


def changed(model: Any, since: Snapshot | None = None) -> Patches:
    """Compose the patches that bring a receiver from an earlier version of a model to the present one.

        patches = sync.changed(sparse)
        send(patches.to_bytes())

    An entry is sent if its effective value, as the model has it now, differs in its bits from what the receiver has:
    a delta too small for bf16 costs nothing, a dropped entry returns to its base value. On several ranks, every rank
    calls this and gets the same patches; send those of one.

    Args:
        model: what `scale_sft.attach` returned, or a PEFT model with a SpielConfig.
        since: `patches.snapshot` of the last patches that the receiver has applied; None: of the last patches composed
            for this model, and the base before the first, which makes a full set.

    Raises:
        UserError: the model carries no deltas at present, its base is quantised, or `since` is of another model.
    """
    source = source_of(model)
    stream = _stream_of(model, source)
    before = stream.last if since is None else since
    if before.stream != stream.base.stream:
        raise UserError(
            "since: got a snapshot of another model or process, expected one of this model. Fix: use sync.full(model)"
        )
    now: dict[str, TrainedWeight] = {}
    patches: list[WeightPatch] = []
    changes: list[Change] = []
    for weight in source.weights():
        now[weight.name] = weight
        whole = _difference(before.weights.get(weight.name), weight)
        for piece, change in _cut(whole, stream.pieces[weight.name]):
            indices, values, _ = change
            if indices.numel():
                patches.append(WeightPatch(piece.name, piece.shape, indices, values))
                changes.append(change)
    prints = moved(before.prints, [patch.name for patch in patches], changes)
    digest = combine_fingerprints(prints, stream.shapes)
    after = Snapshot(stream.base.stream, stream.last.version + 1, prints, now, digest)
    stream.last = after
    return Patches(
        weights=tuple(sorted(patches, key=lambda patch: patch.name)),
        shapes=stream.shapes,
        stream=after.stream,
        version=after.version,
        since=before.version,
        before=before.digest,
        after=after.digest,
        snapshot=after,
    )


def full(model: Any) -> Patches:
    """Compose all entries that differ from the base, for a receiver that has only the base, or has lost track.

    Raises:
        UserError: see `changed`.
    """
    return changed(model, since=_stream_of(model, source_of(model)).base)


def moved(prints: Prints, names: Sequence[str], changes: Sequence[Change]) -> dict[str, tuple[int, int]]:
    """Compute fingerprints after changes of some weights: see `change_sums`."""
    added = zip(names, change_sums(changes), strict=True)
    return {**prints, **{name: add_sums(prints[name], sums) for name, sums in added}}


def _stream_of(model: Any, source: Source) -> _Stream:
    if model not in _streams or set(_streams[model].pieces) != set(source.shapes):  # new, or another adapter's targets
        pieces = pieces_on_disk(unwrapped(source.model), source.shapes)
        prints = dict(source.base_prints(pieces))
        shapes = {piece.name: piece.shape for several in pieces.values() for piece in several}
        digest = combine_fingerprints(prints, shapes)
        stream = uuid.uuid4().hex[:16]  # leaves the generators of random and torch alone
        _streams[model] = _Stream(pieces, shapes, Snapshot(stream, 0, prints, {}, digest))
    return _streams[model]


def _cut(change: Change, pieces: tuple[Piece, ...]) -> Iterator[tuple[Piece, Change]]:
    """Cut what changes in a weight into the changes of its tensors in the files, with indices in these."""
    indices, values, previous = change
    if len(pieces) == 1 or not indices.numel():
        yield pieces[0], change
        return
    bounds = torch.tensor([bound for piece in pieces for bound in (piece.first, piece.last)])
    places = torch.searchsorted(indices, bounds.to(indices)).tolist()
    for piece, low, high in zip(pieces, places[::2], places[1::2], strict=True):
        yield piece, (indices[low:high] - piece.first, values[low:high], previous[low:high])


def _difference(old: TrainedWeight | None, new: TrainedWeight) -> Change:
    """Find the entries of a weight that a receiver of `old` has otherwise than `new`; None: it has the base."""
    if old is None or not old.indices.numel():
        return _where_different(new.indices, new.values, new.base)
    if old.indices is new.indices or torch.equal(old.indices, new.indices):
        return _where_different(new.indices, new.values, old.values)
    place, kept = find_places(old.indices, new.indices)
    stayed = _where_different(new.indices, new.values, torch.where(kept, old.values[place], new.base))
    gone = torch.ones_like(old.indices, dtype=torch.bool)
    gone[place[kept]] = False
    dropped = _where_different(old.indices[gone], old.base[gone], old.values[gone])
    places = merge_places(stayed[0], dropped[0])
    indices, values, previous = (merged(places, *both) for both in zip(stayed, dropped, strict=True))
    return indices, values, previous


def merged(places: tuple[Tensor, Tensor], first: Tensor, second: Tensor) -> Tensor:
    """Put two tensors [K] and [M] together in the order of `merge_places`: [K + M]."""
    both = first.new_empty(first.numel() + second.numel())
    both[places[0]], both[places[1]] = first, second
    return both


def _where_different(indices: Tensor, values: Tensor, previous: Tensor) -> Change:
    found = (bits_of(values) != bits_of(previous)).nonzero().squeeze(1)
    return indices[found], values[found], previous[found]
