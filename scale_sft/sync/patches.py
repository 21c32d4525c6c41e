"""`Patches`: the entries of a model that changed, as values to write, with proof of the state before and after.

As bytes they are a safetensors file: for each changed weight `<name>.indices` [K] int32 (int64 where the weight has
2^31 entries or more) and `<name>.values` [K] in the base's dtype. The file's metadata holds the rest.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load
from torch import Tensor

from scale_sft.errors import UserError
from scale_sft.model.resident import bits_of
from scale_sft.spiel.indices import index_dtype, wrong_with_indices

from .source import TrainedWeight

Prints = Mapping[str, tuple[int, int]]
"""Fingerprints of weights by name: see `scale_sft.model.fingerprints`."""
FORMAT = "scale_sft sparse sync 1"
_VALUES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}
_DTYPES = {torch.int32: "I32", torch.int64: "I64", **_VALUES}
_HEX = re.compile("[0-9a-f]+")


class SyncError(UserError):
    """Patches that do not fit what the receiver holds; no weight was written. Send it `sync.full(model)` instead."""


@dataclass(frozen=True)
class Snapshot:
    """A version of a model: what a receiver of it holds."""

    stream: str
    version: int
    prints: Prints  # by name in the checkpoint's files
    weights: Mapping[str, TrainedWeight]  # by name in the model; none: the base
    digest: str


@dataclass(frozen=True)
class WeightPatch:
    """The changed entries of one weight: `weight.view(-1)[indices] = values`.

    Attributes:
        name: in the checkpoint's files.
        shape: (O, I) there.
        indices: [K] flat, sorted, unique; int32, or int64 where O * I >= 2^31.
        values: [K] effective values, not differences, in the dtype of the base.
    """

    name: str
    shape: tuple[int, int]
    indices: Tensor
    values: Tensor

    def to(self, device: torch.device | str) -> WeightPatch:
        """Copy to a device; returns itself if it is there."""
        return replace(self, indices=self.indices.to(device), values=self.values.to(device))


@dataclass(frozen=True, repr=False)
class Patches:
    """What brings a receiver from one version of a model to another. Made by `sync.changed` and `sync.full`.

        for patch in patches:
            patch.name, patch.shape, patch.indices, patch.values

    Attributes:
        weights: the changed weights; others are not listed.
        shapes: (O, I) of every weight that is trained, by its name in the checkpoint's files.
        stream: 16 hex digits that one trainer process draws for one model; versions count within it.
        version: of the receiver afterwards, counted from 1.
        since: version that the receiver must have; 0: the base, so this is a full set, for a receiver in any state.
        before: digest of the trained weights at `since`, 64 hex digits: see `digest` in docs/sync.md.
        after: digest of them at `version`.
        snapshot: for `sync.changed(model, since=...)`; stays with the trainer.
    """

    weights: tuple[WeightPatch, ...]
    shapes: Mapping[str, tuple[int, int]]
    stream: str
    version: int
    since: int
    before: str
    after: str
    snapshot: Snapshot | None = field(default=None, compare=False)

    @property
    def full(self) -> bool:
        """True if these are all entries that differ from the base."""
        return self.since == 0

    @property
    def entries(self) -> int:
        """The number of changed entries."""
        return sum(patch.indices.numel() for patch in self.weights)

    @property
    def nbytes(self) -> int:
        """Bytes of all indices and values."""
        return sum(patch.indices.nbytes + patch.values.nbytes for patch in self.weights)

    def __iter__(self) -> Iterator[WeightPatch]:
        return iter(self.weights)

    def __len__(self) -> int:
        return len(self.weights)

    def to(self, device: torch.device | str) -> Patches:
        """Copy the tensors to a device."""
        return replace(self, weights=tuple(patch.to(device) for patch in self.weights))

    def to_bytes(self) -> bytes:
        """Write a safetensors file into memory."""
        facts = {name: getattr(self, name) for name in ("shapes", "stream", "version", "since", "before", "after")}
        header: dict[str, Any] = {"__metadata__": {"format": FORMAT, "sync": json.dumps(facts)}}
        parts = [(f"{patch.name}.indices", patch.indices) for patch in self.weights]
        parts += [(f"{patch.name}.values", patch.values) for patch in self.weights]
        start, data = 0, []
        for name, tensor in sorted(parts, key=lambda part: -part[1].itemsize):  # the format aligns wide dtypes so
            raw = bits_of(tensor.cpu().contiguous()).numpy().data
            offsets = [start, start := start + tensor.nbytes]
            header[name] = {"dtype": _DTYPES[tensor.dtype], "shape": [*tensor.shape], "data_offsets": offsets}
            data.append(raw)
        text = json.dumps(header).encode()
        text += b" " * (-len(text) % 8)
        return b"".join((len(text).to_bytes(8, "little"), text, *data))

    @classmethod
    def from_bytes(cls, data: bytes) -> Patches:
        """Read what `to_bytes` wrote, and check all of it.

        Raises:
            SyncError: the bytes are cut short or damaged; indices are out of range, unsorted or repeated; dtypes or
                lengths are wrong. Values are proven later, by the digest.
        """
        try:
            facts, tensors = _facts(data), load(bytes(data))
            shapes = {str(name): (_whole(o), _whole(i)) for name, (o, i) in facts["shapes"].items()}
            names = [name.removesuffix(".indices") for name in tensors if name.endswith(".indices")]
            if odd := set(tensors) ^ {f"{name}.{kind}" for name in names for kind in ("indices", "values")}:
                raise ValueError(f"unexpected or missing tensor: {min(odd)[:80]}")
            weights = tuple(
                _checked(name, shapes[name], tensors[f"{name}.indices"], tensors[f"{name}.values"])
                for name in sorted(names)
            )
            version, since = _whole(facts["version"]), _whole(facts["since"])
            if version <= since:
                raise ValueError(f"version {version} since {since}")
            return cls(
                weights,
                shapes,
                stream=_hex(facts["stream"], 16),
                version=version,
                since=since,
                before=_hex(facts["before"], 64),
                after=_hex(facts["after"], 64),
            )
        except _FAULTS as error:
            reason = " ".join(str(error).split())[:160] or type(error).__name__
            raise SyncError(
                f"patches: got {len(data):,} damaged bytes ({reason}), expected those of Patches.to_bytes(). "
                "Fix: send them again, or a full set (sync.full)"
            ) from None

    def __repr__(self) -> str:
        kind = "full" if self.full else f"since {self.since}"
        return (
            f"<Patches: version {self.version} {kind}, {self.entries:,} entries in {len(self)} of {len(self.shapes)} "
            f"weights, {self.nbytes:,} bytes>"
        )


_FAULTS = (
    SafetensorError, ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError, RuntimeError,
    MemoryError,
)  # fmt: skip


def _facts(data: bytes) -> dict[str, Any]:
    """Read the metadata of a safetensors file."""
    length = int.from_bytes(data[:8], "little")
    if not 0 < length <= len(data) - 8:
        raise ValueError("the header is cut short")
    metadata = json.loads(data[8 : 8 + length])["__metadata__"]
    if metadata["format"] != FORMAT:
        raise ValueError(f"format {metadata['format']!r:.60}, expected {FORMAT!r}")
    return dict(json.loads(metadata["sync"]))


def _checked(name: str, shape: tuple[int, int], indices: Tensor, values: Tensor) -> WeightPatch:
    wide = index_dtype(shape[0] * shape[1])
    wrong = wrong_with_indices(indices, shape)
    if indices.dtype is not wide:
        wrong = f"indices are {indices.dtype}, expected {wide}"
    elif values.dtype not in _VALUES or values.shape != indices.shape:
        wrong = wrong or f"values are {tuple(values.shape)} {values.dtype} for {tuple(indices.shape)} indices"
    if wrong:
        raise ValueError(f"'{name[:80]}': {wrong}")
    return WeightPatch(name, shape, indices, values)


def _whole(value: Any) -> int:
    if type(value) is not int or value < 0:
        raise ValueError(f"got {value!r:.40}, expected a whole number")
    return value


def _hex(value: Any, digits: int) -> str:
    if not isinstance(value, str) or len(value) != digits or not _HEX.fullmatch(value):
        raise ValueError(f"got {value!r:.80}, expected {digits} hex digits")
    return value
