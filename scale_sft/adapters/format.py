"""`Adapter`: the sparse deltas of one base, in memory or in a folder.

An adapter folder holds `adapter_model.safetensors` (for each weight `<name>.indices` [K] int32 or int64, sorted and
unique, and `<name>.deltas` [K] fp32) and `adapter_config.json`. Everything in a file is checked before it is used.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from scale_sft.config.options import DEMO
from scale_sft.errors import UserError
from scale_sft.files import write_atomically, write_json
from scale_sft.model.resident import ROUNDING_RULE
from scale_sft.spiel.indices import wrong_with_indices
from scale_sft.version import __version__

from .safetensors_writer import TensorReader

FORMAT = "scale_sft sparse delta 1"
WEIGHTS_FILE = "adapter_model.safetensors"
CONFIG_FILE = "adapter_config.json"
PEFT_TYPE = "SPIEL"
"""Name of the method among PEFT's; see `scale_sft.peft`."""


@dataclass(frozen=True, repr=False)
class Adapter:
    """Sparse deltas of some weights of one base.

        adapter = scale_sft.Adapter.load("runs/demo/adapter")
        adapter                                        # <Adapter: 1,234 entries in 14 weights of 'demo' (float32)>
        adapter.deltas["model.layers.0.mlp.up_proj.weight"]
        adapter.save("copy")

        with scale_sft.Adapter.open("runs/demo/adapter") as adapter:   # one weight in memory at a time
            for name in adapter.shapes:
                print(name, adapter.active(name), adapter.deltas[name].norm())

    Attributes:
        indices: by weight name, flat positions i * I + j of the active entries: [K] int32 or int64, sorted, unique.
        deltas: by weight name, what is added there: [K] fp32.
        shapes: (O, I) by weight name.
        info: the rest of adapter_config.json: base, revision, dtype, base_hash, method and so on.
    """

    indices: Mapping[str, Tensor]
    deltas: Mapping[str, Tensor]
    shapes: dict[str, tuple[int, int]]
    info: dict[str, Any]

    @classmethod
    def load(cls, folder: str | Path) -> Adapter:
        """Read an adapter folder into memory and check all of it.

        Raises:
            UserError: a file is missing, damaged or of another format; indices are out of range, unsorted or repeated;
                dtypes or lengths are wrong; a delta is not finite.
        """
        with cls.open(folder) as adapter:
            return replace(adapter, indices=dict(adapter.indices), deltas=dict(adapter.deltas))

    @classmethod
    @contextmanager
    def open(cls, folder: str | Path) -> Iterator[Adapter]:
        """Open an adapter folder; each access to a weight's tensors reads and checks them, within the `with` block.

        Raises:
            UserError: see `load`; faults of one weight's tensors are raised by the access.
        """
        folder = Path(folder).expanduser()
        shapes, info = _read_config(folder)
        with TensorReader(folder / WEIGHTS_FILE) as file:
            odd = set(file.names) ^ {f"{name}.{kind}" for name in shapes for kind in ("indices", "deltas")}
            if odd:
                raise UserError(f"adapter: {folder}: the two files disagree on '{sorted(odd)[0]}'")
            entries = _Entries(file, shapes)
            yield cls(_Stored(entries, "indices"), _Stored(entries, "deltas"), shapes, info)

    def save(self, folder: str | Path) -> None:
        """Write an adapter folder; each file appears whole or not at all. Reads the result back to check it.

        A base that is a local folder is recorded by its absolute path, so that the adapter is usable from anywhere.
        """
        folder = Path(folder).expanduser()
        folder.mkdir(parents=True, exist_ok=True)
        tensors = {f"{name}.indices": value.cpu().contiguous() for name, value in self.indices.items()}
        tensors |= {f"{name}.deltas": value.cpu().contiguous() for name, value in self.deltas.items()}
        write_atomically(folder / WEIGHTS_FILE, lambda path: save_file(tensors, path, metadata={"format": "pt"}))
        config = {
            "format": FORMAT,
            "scale_sft_version": __version__,
            "rounding_rule": ROUNDING_RULE,
            **self.info,
            "base": absolute_base(self.info["base"]),
            "active_entries": self.active(),
            "shapes": {name: list(shape) for name, shape in self.shapes.items()},
            **self._for_peft(),
        }
        write_json(folder / CONFIG_FILE, config)
        Adapter.load(folder)

    def _for_peft(self) -> dict[str, Any]:
        """Return what PEFT needs to load the folder, once `scale_sft.peft` has been imported."""
        return {
            "peft_type": PEFT_TYPE,
            "task_type": "CAUSAL_LM",
            "base_model_name_or_path": absolute_base(self.info["base"]),
            "inference_mode": True,
            "target_modules": [name.removesuffix(".weight") for name in self.shapes],
            "entries_per_weight": {name: self.active(name) for name in self.shapes},
        }

    def active(self, name: str | None = None) -> int:
        """Count the active entries K of one weight, or of all of them; reads no tensor."""
        if name is None:
            return sum(map(self.active, self.shapes))
        return self.indices.count(name) if isinstance(self.indices, _Stored) else self.indices[name].numel()

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the base that the deltas were trained on."""
        return getattr(torch, self.info["dtype"])

    def dtype_of(self, name: str) -> torch.dtype:
        """Return the dtype of one weight of the base: some models keep a few in another one than the rest."""
        return getattr(torch, self.info.get("dtypes", {}).get(name, self.info["dtype"]))

    @property
    def is_quantized(self) -> bool:
        """True if the deltas were trained on a base in 4 or 8 bits."""
        return self.info.get("quantization", "none") != "none"

    def __repr__(self) -> str:
        base, dtype = self.info.get("base"), self.info.get("dtype")
        return f"<Adapter: {self.active():,} entries in {len(self.shapes)} weights of {base!r} ({dtype})>"


def opened(adapter: str | Path | Adapter) -> AbstractContextManager[Adapter]:
    """Give an adapter to a `with` block: as it is, or read from its folder one weight at a time."""
    return nullcontext(adapter) if isinstance(adapter, Adapter) else Adapter.open(adapter)


def absolute_base(base: str) -> str:
    """Make the path of a base that is a local folder absolute; `demo` and hub ids stay as they are."""
    folder = Path(base).expanduser()
    return os.path.abspath(folder) if base != DEMO and folder.is_dir() else base


def _read_config(folder: Path) -> tuple[dict[str, tuple[int, int]], dict[str, Any]]:
    """Read shapes by weight name and the rest of adapter_config.json."""
    for file in (CONFIG_FILE, WEIGHTS_FILE):
        if not (folder / file).is_file():
            raise UserError(f"adapter: {folder} holds no {file}; expected the adapter/ folder of a run")
    try:
        config = json.loads((folder / CONFIG_FILE).read_text(encoding="utf-8"))
        if config.get("format") != FORMAT:
            raise UserError(f"adapter: {folder / CONFIG_FILE}: format is {config.get('format')!r}, expected {FORMAT!r}")
        if config.get("modules_to_save"):
            raise UserError(
                f"adapter: {folder} also holds whole modules ({', '.join(config['modules_to_save'])}), expected deltas "
                "alone. Fix: load it with peft.PeftModel.from_pretrained after `import scale_sft.peft`"
            )
        wrong = [key for key in ("base", "base_hash", "dtype") if not isinstance(config[key], str)]
        if wrong or config["dtype"] not in ("float32", "bfloat16", "float16"):
            raise ValueError(f"{(wrong or ['dtype'])[0]} is {config[(wrong or ['dtype'])[0]]!r:.80}")
        shapes = {name: (int(shape[0]), int(shape[1])) for name, shape in config.pop("shapes").items()}
    except (ValueError, KeyError, TypeError, IndexError, AttributeError, OverflowError, RecursionError) as error:
        raise UserError(f"adapter: {folder / CONFIG_FILE} is damaged: {error!r}") from None
    return shapes, config


class _Entries:
    """The entries of the weights in an open file, read and checked; those of the last weight are kept."""

    def __init__(self, file: TensorReader, shapes: Mapping[str, tuple[int, int]]):
        self.file, self.shapes = file, shapes
        self._last: tuple[str, Tensor, Tensor] | None = None

    def read(self, name: str) -> tuple[Tensor, Tensor]:
        """Return indices and deltas [K] of one weight."""
        last = self._last
        if last is None or last[0] != name:
            shape = self.shapes[name]
            last = name, self.file.tensor(f"{name}.indices"), self.file.tensor(f"{name}.deltas")
            _check(*last, shape)
            self._last = last
        return last[1], last[2]


class _Stored(Mapping[str, Tensor]):
    """Indices or deltas by weight name, of an open file."""

    def __init__(self, entries: _Entries, kind: str):
        self._entries, self._kind = entries, kind

    def __getitem__(self, name: str) -> Tensor:
        return self._entries.read(name)[self._kind == "deltas"]

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries.shapes)

    def __len__(self) -> int:
        return len(self._entries.shapes)

    def count(self, name: str) -> int:
        """Return K of one weight without reading it."""
        return self._entries.file.shape(f"{name}.{self._kind}")[0]


def _check(name: str, indices: Tensor, deltas: Tensor, shape: tuple[int, int]) -> None:
    wrong = wrong_with_indices(indices, shape)
    if deltas.dtype not in (torch.float32, torch.bfloat16):
        wrong = f"deltas are {deltas.dtype}, expected float32"
    elif indices.shape != deltas.shape:
        wrong = wrong or f"{tuple(indices.shape)} indices for {tuple(deltas.shape)} deltas"
    elif not bool(torch.isfinite(deltas).all()):
        wrong = wrong or "a delta is not a finite number"
    if wrong:
        raise UserError(f"adapter: weight '{name}': {wrong}")
