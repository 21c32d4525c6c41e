"""Where the weights of a checkpoint are in a running model: read and write single entries, whatever the layout.

A transformers model has them under the names of its files, or under names that its class maps to them. Inference
servers fuse them (q, k and v become `qkv_proj`), cut them for tensor parallelism, and have a method `load_weights`
that knows how. Here that method is asked: it loads weights without data, and each copy it makes tells by its strides
which entries of the checkpoint end up where. So a write costs O(K), and no layout is written down twice.

Shapes: O rows, I columns of a weight in the checkpoint; K entries.
"""

from __future__ import annotations

import weakref
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from scale_sft.model.experts import fused_weights, slice_name
from scale_sft.model.fingerprints import CHUNK_ENTRIES, add_sums, entry_sums, fingerprint
from scale_sft.model.held import Held, held_weight
from scale_sft.model.resident import WeightPart, read_entries, write_entries

from .names import expert_pieces, name_on_disk
from .patches import SyncError

Shapes = Mapping[str, tuple[int, int]]


class Place(Protocol):
    """One weight of the checkpoint in a running model, or the part of it that this process holds."""

    whole: bool

    @property
    def dtype(self) -> torch.dtype: ...

    @property
    def device(self) -> torch.device: ...

    def read(self, indices: Tensor) -> Tensor:
        """Read the values [K] at flat indices [K]; of a whole weight only."""

    def write(self, indices: Tensor, values: Tensor) -> None:
        """Write values [K] at flat indices [K], those of them that this process holds."""

    def fingerprint(self) -> tuple[int, int]:
        """Compute the fingerprint of a whole weight, in the checkpoint's coordinates: O(N)."""


@dataclass(frozen=True)
class Plain:
    """A weight that a model holds as it is: a parameter, an expert's slice of one, or consecutive rows of either."""

    weight: Held
    first: int  # of the entries of the weight that the checkpoint's tensor has
    last: int
    whole = True

    @property
    def dtype(self) -> torch.dtype:
        return self.weight.dtype

    @property
    def device(self) -> torch.device:
        return self.weight.device

    def read(self, indices: Tensor) -> Tensor:
        return read_entries(self.entries(), indices)

    def write(self, indices: Tensor, values: Tensor) -> None:
        write_entries(self.entries(), indices, values)

    def entries(self) -> Tensor:
        """Return the entries as a 1-D view, in place."""
        return self.weight.entries[self.first : self.last]

    def fingerprint(self) -> tuple[int, int]:
        return fingerprint(WeightPart(self.entries, 0, self.last - self.first))


@dataclass(frozen=True)
class _Copy:
    """A rectangle of a checkpoint's weight, and the view of a parameter that it was loaded into: [n, m] each."""

    to: Tensor
    first_row: int
    first_column: int
    transposed: bool

    def entries_of(self, indices: Tensor, width: int) -> tuple[Tensor, Tensor]:
        """Find which of the flat indices [K] are in the rectangle, and their places in the parameter's storage."""
        rows = torch.div(indices, width, rounding_mode="floor")
        columns = indices - rows * width
        rows, columns = rows.long() - self.first_row, columns.long() - self.first_column
        if self.transposed:
            rows, columns = columns, rows
        inside = ((rows >= 0) & (rows < self.to.shape[0]) & (columns >= 0) & (columns < self.to.shape[1])).nonzero()
        inside = inside.squeeze(1)
        down, across = self.to.stride()
        return inside, int(self.to.storage_offset()) + rows[inside] * down + columns[inside] * across

    @property
    def storage(self) -> Tensor:
        """All entries of the parameter's storage, 1-D, in place."""
        count = self.to.untyped_storage().nbytes() // self.to.element_size()
        return self.to.as_strided((count,), (1,), 0)


@dataclass
class Loaded:
    """A weight that a model's `load_weights` distributes over views of its parameters."""

    shape: tuple[int, int]
    copies: list[_Copy] = field(default_factory=list)

    @property
    def whole(self) -> bool:
        """True if every entry is here; with tensor parallelism a process holds some."""
        return sum(copy.to.numel() for copy in self.copies) == self.shape[0] * self.shape[1]

    @property
    def dtype(self) -> torch.dtype:
        return self.copies[0].to.dtype

    @property
    def device(self) -> torch.device:
        return self.copies[0].to.device

    def read(self, indices: Tensor) -> Tensor:
        values = torch.empty(indices.shape, dtype=self.dtype, device=self.device)
        for copy in self.copies:
            inside, places = copy.entries_of(indices, self.shape[1])
            write_entries(values, inside, read_entries(copy.storage, places))
        return values

    def write(self, indices: Tensor, values: Tensor) -> None:
        for copy in self.copies:
            inside, places = copy.entries_of(indices, self.shape[1])
            write_entries(copy.storage, places, values[inside])

    def fingerprint(self) -> tuple[int, int]:
        total = torch.zeros(2, dtype=torch.int64, device=self.device)
        count = self.shape[0] * self.shape[1]
        for first in range(0, count, CHUNK_ENTRIES):
            indices = torch.arange(first, min(first + CHUNK_ENTRIES, count), device=self.device)
            total += entry_sums(indices, self.read(indices))
        return add_sums((0, 0), total.tolist())


_Names = dict[str, tuple[str, int]]
"""By name on disk: the weight in the model, and which entry of it is the first on disk."""
_renamed: weakref.WeakKeyDictionary[nn.Module, tuple[frozenset[str], _Names]] = weakref.WeakKeyDictionary()
"""By model: the names of its weights, and what they are on disk."""


class Places:
    """Finds the places of a model's weights by their names in the checkpoint's files."""

    def __init__(self, model: nn.Module):
        self._model = model

    def find(self, shapes: Shapes) -> dict[str, Place]:
        """Find some weights as they are in memory now. One that another process holds all of is left out.

        Raises:
            SyncError: there is no such weight, or it is of another shape or not in memory.
        """
        if not shapes:
            return {}
        load = getattr(self._model, "load_weights", None)
        if callable(load):
            return _ask(load, shapes)
        weights = dict(self._model.named_parameters(remove_duplicate=False))
        renames = {} if shapes.keys() <= weights.keys() else self._renames(weights)
        found: dict[str, Place] = {}
        for name, shape in shapes.items():
            target, first = (name, 0) if name in weights else renames.get(name, ("", 0))
            held, last = held_weight(weights, target), first + shape[0] * shape[1]
            cut = held is not None and held.number is not None  # `_renames` has found the rows of an expert
            fits = held is not None and (cut or held.shape == shape) and held.shape[1:] == shape[1:]
            if held is None or not fits or held.parameter.is_meta or not held.parameter.is_contiguous():
                has = "none" if held is None else f"{held.shape} {held.dtype} on {held.device}"
                raise SyncError(
                    f"sync: got '{name}' of shape {shape}, the receiving model has {has}; expected the model that is "
                    "trained, whole and in memory"
                )
            found[name] = Plain(held, first, last)
        return found

    def _renames(self, weights: Mapping[str, nn.Parameter]) -> _Names:
        """Map names on disk to names in the model and the first entry that they hold of it.

        Found once, and again where a model has other weights by then.
        """
        known, names = _renamed.get(self._model, (None, {}))
        if known != weights.keys():
            names = {}
            fused = {one.name for one in fused_weights(self._model)}
            for name, weight in weights.items():
                if name in fused:
                    for number, pieces in expert_pieces(self._model, name).items():
                        names |= {piece.name: (slice_name(name, number), piece.first) for piece in pieces}
                elif (stored := name_on_disk(self._model, name, tuple(weight.shape))) is not None:
                    names[stored] = name, 0
            _renamed[self._model] = frozenset(weights), names
        return names


class _Watch(TorchFunctionMode):
    """Notes copies from tensors without data and leaves them out.

    Args:
        probes: a tensor on the meta device [O, I] for each weight, by name.
    """

    def __init__(self, probes: Mapping[str, Tensor]):
        super().__init__()
        self._owner = {probe.untyped_storage()._cdata: name for name, probe in probes.items()}
        self.found = {name: Loaded((probe.shape[0], probe.shape[1])) for name, probe in probes.items()}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is not torch.Tensor.copy_ or not args[1].is_meta:
            return func(*args, **(kwargs or {}))
        to, source = args[0], args[1]
        name = self._owner.get(source.untyped_storage()._cdata)
        if name is None or to.shape != source.shape:
            raise SyncError(
                f"sync: the receiving model's load_weights computes with '{name or 'a weight'}' before it stores it "
                "(quantised weights?); expected it to store entries as they are"
            )
        self.found[name].copies.append(_rectangle(name, self.found[name].shape, to, source))
        return to


def _rectangle(name: str, shape: tuple[int, int], to: Tensor, source: Tensor) -> _Copy:
    row, column = divmod(int(source.storage_offset()), shape[1])
    for transposed, strides in ((False, (shape[1], 1)), (True, (1, shape[1]))):
        rows = source.shape[1] if transposed and source.dim() == 2 else source.shape[0]
        inside = source.dim() == 2 and row + rows <= shape[0]
        if inside and all(
            size == 1 or has == want for size, has, want in zip(source.shape, source.stride(), strides, strict=True)
        ):
            return _Copy(to.detach(), row, column, transposed)
    raise SyncError(f"sync: the receiving model stores '{name}' in a layout of {source.stride()}, expected rows of it")


def _ask(load: Any, shapes: Shapes) -> dict[str, Place]:
    """Let a model's own `load_weights` show where it would store weights of these shapes."""
    probes = {name: torch.empty(shape, device="meta") for name, shape in shapes.items()}
    with _Watch(probes) as watch:
        try:
            load(list(probes.items()))
        except SyncError:
            raise
        except Exception as error:  # whatever a loader meets that cannot do without data
            raise SyncError(
                f"sync: the receiving model's load_weights cannot tell where weights go ({type(error).__name__}: "
                f"{str(error).splitlines()[0][:120] if str(error) else ''}). Fix: use the server's own sparse engine"
            ) from error
    return {name: place for name, place in watch.found.items() if place.copies}
