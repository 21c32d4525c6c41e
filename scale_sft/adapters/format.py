"""Deltas as files: the adapter folder; and in a model, in place.

An adapter is `adapter_model.safetensors` (for each weight `<name>.indices` [K] int32 or int64, sorted and unique, and
`<name>.deltas` [K] fp32) and `adapter_config.json`. Everything in a file is checked before any weight is touched.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from scale_sft.errors import UserError
from scale_sft.files import write_atomically, write_json
from scale_sft.model.resident import ROUNDING_RULE
from scale_sft.version import __version__

from .safetensors_writer import TensorReader

FORMAT = "scale_sft sparse delta 1"
WEIGHTS_FILE = "adapter_model.safetensors"
CONFIG_FILE = "adapter_config.json"


@dataclass(frozen=True)
class Adapter:
    """Sparse deltas of some weights of one base."""

    indices: Mapping[str, Tensor]  # by weight name: [K] int32 or int64, sorted, unique
    deltas: Mapping[str, Tensor]  # [K] fp32
    shapes: dict[str, tuple[int, int]]
    info: dict[str, Any]  # the rest of adapter_config.json: base, dtype, base_hash, method ...

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the base that the deltas were trained on."""
        return getattr(torch, self.info["dtype"])

    @property
    def is_quantized(self) -> bool:
        """Whether the deltas were trained on a base in 4 or 8 bits."""
        return self.info.get("quantization", "none") != "none"


def save_adapter(adapter: Adapter, folder: Path) -> None:
    """Write an adapter folder; files appear whole or not at all. Reads the result back and compares counts."""
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {f"{name}.indices": value.cpu().contiguous() for name, value in adapter.indices.items()}
    tensors |= {f"{name}.deltas": value.cpu().contiguous() for name, value in adapter.deltas.items()}
    write_atomically(folder / WEIGHTS_FILE, lambda path: save_file(tensors, path, metadata={"format": "pt"}))
    config = {
        "format": FORMAT,
        "scale_sft_version": __version__,
        "rounding_rule": ROUNDING_RULE,
        **adapter.info,
        "active_entries": sum(value.numel() for value in adapter.indices.values()),
        "shapes": {name: list(shape) for name, shape in adapter.shapes.items()},
    }
    write_json(folder / CONFIG_FILE, config)
    load_adapter(folder)


def load_adapter(folder: str | Path) -> Adapter:
    """Read and check an adapter folder.

    Raises:
        UserError: a file is missing, damaged or of another format; indices out of range, unsorted or repeated; wrong
            dtypes or lengths; deltas that are not finite.
    """
    with open_adapter(folder) as adapter:
        return replace(adapter, indices=dict(adapter.indices), deltas=dict(adapter.deltas))


@contextmanager
def open_adapter(folder: str | Path) -> Iterator[Adapter]:
    """An adapter whose tensors are read and checked when they are asked for, for as long as the `with` block lasts.

    Raises:
        UserError: see `load_adapter`; what concerns one weight's tensors when they are asked for.
    """
    folder = Path(folder)
    for file in (CONFIG_FILE, WEIGHTS_FILE):
        if not (folder / file).is_file():
            raise UserError(f"adapter: {folder} holds no {file}; expected the adapter/ folder of a run")
    try:
        config = json.loads((folder / CONFIG_FILE).read_text(encoding="utf-8"))
        if config.get("format") != FORMAT:
            raise UserError(f"adapter: {folder / CONFIG_FILE}: format is {config.get('format')!r}, expected {FORMAT!r}")
        wrong = [key for key in ("base", "base_hash", "dtype") if not isinstance(config[key], str)]
        if wrong or config["dtype"] not in ("float32", "bfloat16", "float16"):
            raise ValueError(f"{(wrong or ['dtype'])[0]} is {config[(wrong or ['dtype'])[0]]!r:.80}")
        shapes = {name: (int(shape[0]), int(shape[1])) for name, shape in config.pop("shapes").items()}
    except (ValueError, KeyError, TypeError, IndexError, AttributeError, OverflowError, RecursionError) as error:
        raise UserError(f"adapter: {folder / CONFIG_FILE} is damaged: {error!r}") from None
    with TensorReader(folder / WEIGHTS_FILE) as file:
        odd = set(file.names) ^ {f"{name}.{kind}" for name in shapes for kind in ("indices", "deltas")}
        if odd:
            raise UserError(f"adapter: {folder}: the two files disagree on '{sorted(odd)[0]}'")
        lazy = (StoredTensors(file, shapes, kind) for kind in ("indices", "deltas"))
        yield Adapter(*lazy, shapes, config)


class StoredTensors(Mapping):
    """Indices or deltas by weight name, read from an open file at each access and checked."""

    def __init__(self, file: TensorReader, shapes: Mapping[str, tuple[int, int]], kind: str):
        self._file, self._shapes, self._kind = file, shapes, kind

    def __getitem__(self, name: str) -> Tensor:
        shape = self._shapes[name]
        indices, deltas = self._file.tensor(f"{name}.indices"), self._file.tensor(f"{name}.deltas")
        _check(name, indices, deltas, shape)
        return indices if self._kind == "indices" else deltas

    def __iter__(self) -> Iterator[str]:
        return iter(self._shapes)

    def __len__(self) -> int:
        return len(self._shapes)

    def active(self, name: str) -> int:
        """K of one weight, without reading it."""
        return self._file.shape(f"{name}.{self._kind}")[0]


def _check(name: str, indices: Tensor, deltas: Tensor, shape: tuple[int, int]) -> None:
    wrong = None
    if indices.dtype not in (torch.int32, torch.int64) or deltas.dtype not in (torch.float32, torch.bfloat16):
        wrong = f"dtypes are {indices.dtype} and {deltas.dtype}, expected integers and float32"
    elif indices.dim() != 1 or indices.shape != deltas.shape:
        wrong = f"{tuple(indices.shape)} indices for {tuple(deltas.shape)} deltas"
    elif indices.numel() and (int(indices.min()) < 0 or int(indices.max()) >= shape[0] * shape[1]):
        wrong = f"an index lies outside the weight of shape {shape}"
    elif bool((indices[1:] <= indices[:-1]).any()):
        wrong = "indices are not sorted and unique"
    elif not bool(torch.isfinite(deltas).all()):
        wrong = "a delta is not a finite number"
    if wrong:
        raise UserError(f"adapter: weight '{name}': {wrong}")
