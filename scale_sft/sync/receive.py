"""The receiver's side: check patches against what a model holds, then write them.

A receiver remembers the version, the fingerprints of the trained weights, and the base values of all entries that
differ from the base (6 bytes per entry in bf16), so that a full set brings it forward from any state in O(K). The whole
weights are read once, at the first patches, to prove that they are the trainer's base. K entries of a patch.
"""

from __future__ import annotations

import weakref
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from scale_sft.errors import UserError
from scale_sft.model.fingerprints import combine_fingerprints
from scale_sft.model.resident import bits_of
from scale_sft.spiel.indices import find_places, merge_places

from .compose import merged, moved
from .names import unwrapped
from .patches import Patches, SyncError, WeightPatch
from .places import Place, Places


@dataclass
class _Received:
    """What a model holds."""

    shapes: dict[str, tuple[int, int]]
    base: dict[str, tuple[int, int]]  # fingerprints; none where this process holds parts of weights
    prints: dict[str, tuple[int, int]]
    digest: str
    stream: str = ""
    version: int = 0
    kept: dict[str, tuple[Tensor, Tensor]] = field(default_factory=dict)  # indices [K] sorted, base values [K]

    @property
    def whole(self) -> bool:
        """False where no digest can be computed, as with tensor parallelism: then versions alone are compared."""
        return bool(self.base)


_received: weakref.WeakKeyDictionary[nn.Module, _Received] = weakref.WeakKeyDictionary()
_FULL = "Fix: ask the trainer for a full set: sync.full(model)"


@torch.inference_mode()  # weights made under inference mode may be written there only; others anywhere
def apply(model: nn.Module, patches: Patches | bytes) -> int:
    """Write patches into a model's weights, after proving that they belong to the state it is in.

        version = sync.apply(model, data)

    The model is one of transformers, or has `load_weights` as those of vLLM and SGLang have. It has the base's weights
    when the first patches arrive. Call this between forward passes.

    Args:
        model: in memory, in the dtype of the base.
        patches: or their bytes.

    Returns:
        The model's version now.

    Raises:
        SyncError: patches were lost, repeated, reordered or damaged, or are of another base; no weight was written.
        UserError: `patches` is neither.
    """
    if isinstance(patches, bytes | bytearray | memoryview):
        patches = Patches.from_bytes(patches)
    if not isinstance(patches, Patches):
        raise UserError(
            f"patches: got {patches!r:.80}, expected what sync.changed or sync.full returned, or its to_bytes(). Fix: "
            "read a file first, as Path(...).read_bytes()"
        )
    model = unwrapped(model)
    state = _received.get(model) or _Received({}, {}, {}, "")
    _require_next(patches, state)
    finder = Places(model)
    if state.shapes != dict(patches.shapes):
        state = _first(finder, patches)
    places = finder.find({name: patches.shapes[name] for name in _names(patches, state)})
    _require_dtype(patches, places)
    held = [patch.to(places[patch.name].device) for patch in patches if patch.name in places]
    old = [_old_values(patch, places[patch.name], state, patches.full) for patch in held] if state.whole else []
    prints = _proven(patches, state, held, old)
    _wait(places)
    if patches.full:
        for name, (indices, base) in state.kept.items():
            places[name].write(indices, base)
        state.kept = {}
    for number, patch in enumerate(held):
        place = places[patch.name]
        _keep(state, patch, old[number] if old else place.read(patch.indices))
        place.write(patch.indices, patch.values)
    _wait(places)
    state.prints, state.digest, state.stream, state.version = prints, patches.after, patches.stream, patches.version
    _received[model] = state
    return patches.version


def version(model: nn.Module) -> int:
    """Return the version that a model holds; 0: the base, or nothing was applied yet."""
    state = _received.get(unwrapped(model))
    return state.version if state else 0


def verify(model: nn.Module) -> None:
    """Prove in one pass over the trained weights that a model holds its version bit for bit: O(N).

    Raises:
        SyncError: something else has written to the weights, or nothing was applied yet.
    """
    model = unwrapped(model)
    state = _received.get(model)
    if state is None:
        raise SyncError("verify: got a model without patches, expected one after sync.apply")
    found = _prints_of(Places(model).find(state.shapes))
    wrong = [name for name, print_ in state.prints.items() if found.get(name) != print_]
    if wrong:
        raise SyncError(
            f"verify: '{wrong[0]}' is not what version {state.version} holds: something else has written to it. "
            "Fix: load the base again, then apply sync.full(model)"
        )


def forget(model: nn.Module) -> None:
    """Forget what a model holds, after its base was loaded again; the next patches must be a full set."""
    _received.pop(unwrapped(model), None)


def _require_next(patches: Patches, state: _Received) -> None:
    """Raise SyncError unless the patches follow on what the model holds."""
    same = patches.stream == state.stream
    if patches.full and not (same and patches.version <= state.version):
        return
    if patches.full or (same and patches.version <= state.version):
        raise SyncError(
            f"sync: got version {patches.version} {'again' if patches.version == state.version else 'late'}, the model "
            f"has version {state.version}. Fix: leave it out; if in doubt, ask the trainer for sync.full(model)"
        )
    if not same:
        has = f"version {state.version} of {state.stream}" if state.stream else "the base only"
        raise SyncError(
            f"sync: got version {patches.version} of {patches.stream}, which follows on version {patches.since}; the "
            f"model has {has}. {_FULL}"
        )
    if patches.since != state.version or patches.before != state.digest:
        raise SyncError(
            f"sync: got version {patches.version}, which follows on version {patches.since} "
            f"({patches.before[:16]}...); the model has version {state.version} ({state.digest[:16]}...): patches were "
            f"lost or reordered. {_FULL}"
        )


def _first(finder: Places, patches: Patches) -> _Received:
    """Read the whole weights of a model that has its base, and prove that it is the trainer's."""
    shapes = dict(patches.shapes)
    places = finder.find(shapes)
    if not places or not all(place.whole for place in places.values()) or set(places) != set(shapes):
        return _Received(shapes, {}, {}, "")
    _require_dtype(patches, places)
    prints = _prints_of(places)
    digest = combine_fingerprints(prints, shapes)
    if digest != patches.before:
        raise SyncError(
            f"sync: got patches for a base of digest {patches.before[:16]}..., the model has {digest[:16]}...: its "
            "weights are not those that training started from. Fix: load that base, in the dtype it is trained in"
        )
    return _Received(shapes, prints, dict(prints), digest)


def _prints_of(places: dict[str, Place]) -> dict[str, tuple[int, int]]:
    return {name: place.fingerprint() for name, place in places.items()}


def _names(patches: Patches, state: _Received) -> set[str]:
    return {patch.name for patch in patches} | (set(state.kept) if patches.full else set())


def _require_dtype(patches: Patches, places: dict[str, Place]) -> None:
    for patch in patches:
        place = places.get(patch.name)
        if place is not None and place.dtype is not patch.values.dtype:
            raise SyncError(
                f"sync: got values in {patch.values.dtype} for '{patch.name}', the model holds it in {place.dtype}; "
                "expected the same. Fix: load the receiving model in the dtype of the trained one"
            )


def _old_values(patch: WeightPatch, place: Place, state: _Received, full: bool) -> Tensor:
    """Give the values [K] that a patch replaces: the weight's, or for a full set the base's."""
    old = place.read(patch.indices)
    if full and patch.name in state.kept:
        indices, base = state.kept[patch.name]
        where, known = find_places(indices, patch.indices)
        old = torch.where(known, base[where], old)
    return old


def _proven(
    patches: Patches, state: _Received, held: list[WeightPatch], old: list[Tensor]
) -> dict[str, tuple[int, int]]:
    """Compute the fingerprints after the patches, and raise SyncError if they are not those of the trainer."""
    if not state.whole:
        return {}
    changes = [(patch.indices, patch.values, values) for patch, values in zip(held, old, strict=True)]
    prints = moved(state.base if patches.full else state.prints, [patch.name for patch in held], changes)
    digest = combine_fingerprints(prints, state.shapes)
    if digest != patches.after:
        base = "; if this was one, load the base again first" if patches.full else ""
        raise SyncError(
            f"sync: got version {patches.version}, whose digest would be {digest[:16]}..., expected "
            f"{patches.after[:16]}...: it is damaged, or something else has written to the weights. {_FULL}{base}"
        )
    return prints


def _keep(state: _Received, patch: WeightPatch, old: Tensor) -> None:
    """Remember the base values of a patch's entries that had them until now; forget those that have them again."""
    indices, base = state.kept.get(patch.name, (patch.indices[:0], old[:0]))
    if not indices.numel():
        state.kept[patch.name] = patch.indices, old
        return
    where, known = find_places(indices, patch.indices)
    back = where[(known & (bits_of(patch.values) == bits_of(base[where]))).nonzero().squeeze(1)]
    if back.numel():
        stay = torch.ones_like(indices, dtype=torch.bool)
        stay[back] = False
        indices, base = indices[stay], base[stay]
    new = (~known).nonzero().squeeze(1)
    if new.numel():
        places = merge_places(indices, patch.indices[new])
        indices, base = merged(places, indices, patch.indices[new]), merged(places, base, old[new])
    if indices.numel():
        state.kept[patch.name] = indices, base
    else:
        state.kept.pop(patch.name, None)


def _wait(places: dict[str, Place]) -> None:
    """Wait for GPUs: forward passes may run on other streams, and a write comes after those under way."""
    for device in {place.device for place in places.values()}:
        if device.type == "cuda":
            torch.cuda.synchronize(device)
