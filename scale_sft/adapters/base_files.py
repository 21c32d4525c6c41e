"""The base of an adapter as files: find its folder, read its tensors, write them again with some changed."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from scale_sft.errors import UserError, first_line
from scale_sft.files import write_json
from scale_sft.model.loading import base_location

from .format import Adapter
from .safetensors_writer import TensorReader, TensorWriter

INDEX_FILE = "model.safetensors.index.json"
_SMALL_FILES = (".json", ".jinja", ".model", ".txt", ".py")
Specs = dict[str, tuple[torch.dtype, tuple[int, ...]]]
"""(dtype, shape) of the tensors of a file, by their names in it."""
Change = Callable[[str, Tensor], tuple[int, int]]
"""(adapter's weight name, entries [N] to change in place) -> fingerprint of the base's entries."""


def locate_base(adapter: Adapter, base: str | None = None) -> Path:
    """Find the folder of an adapter's base (or of `base` instead); a hub model that is not here is downloaded."""
    location = base_location(base or adapter.info["base"])
    folder = Path(location).expanduser()
    if folder.is_dir():
        return folder
    from huggingface_hub import snapshot_download

    patterns = [f"*{suffix}" for suffix in (*_SMALL_FILES, ".safetensors")]
    try:
        return Path(snapshot_download(location, revision=adapter.info.get("revision"), allow_patterns=patterns))
    except Exception as error:  # hub errors are many; all mean that the base is out of reach
        reason = first_line(error).rstrip(".")
        raise UserError(
            f"base: '{location}' is not a folder here, and the hub did not give it: {reason}. "
            "Fix: say where the base is (--base)"
        ) from None


class BaseFiles:
    """The weight files of a transformers folder; use it in a `with` block."""

    def __init__(self, folder: Path):
        self.folder = folder
        self._config = _read_config(folder)
        self._stack = ExitStack()
        with ExitStack() as stack:
            self.readers = {path.name: stack.enter_context(TensorReader(path)) for path in _weight_files(folder)}
            self._stack = stack.pop_all()
        self._file_of = {name: reader for reader in self.readers.values() for name in reader.names}

    def __enter__(self) -> BaseFiles:
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def names_of(self, adapter: Adapter) -> dict[str, str]:
        """Map tensor names of the files to the adapter's weight names; files may lack the model class's prefix.

        Raises:
            UserError: a weight is missing or of another shape.
        """
        found = {}
        for name, shape in adapter.shapes.items():
            match = self.find(name)
            if match is None:
                raise UserError(f"base: the files of '{self.folder}' hold no tensor for '{name}'")
            if self._file_of[match].shape(match) != shape:
                got = self._file_of[match].shape(match)
                raise UserError(f"base: '{match}' of '{self.folder}' is {got}, the adapter says {shape}")
            found[match] = name
        return found

    def find(self, name: str) -> str | None:
        """Find the name in the files of a weight or buffer, with or without the prefix of the model class."""
        tails = [name] + [name.split(".", n)[-1] for n in range(1, name.count("."))]
        return next((tail for tail in tails if tail in self._file_of), None)

    def dtype(self, stored: str) -> torch.dtype:
        """Return the dtype of one tensor in its file."""
        return self._file_of[stored].dtype(stored)

    def tensor(self, stored: str) -> Tensor:
        """Read a copy of one tensor as it is stored."""
        return self._file_of[stored].tensor(stored)

    def entries(self, stored: str, dtype: torch.dtype) -> Tensor:
        """Read one weight, flattened [N], in `dtype`."""
        return self.tensor(stored).to(dtype).view(-1)

    def bytes_rewritten(self, names: Mapping[str, str], adapter: Adapter) -> int:
        """Compute the size of what `rewrite` will write, without headers."""
        return sum(bytes_of(_new_specs(reader, names, adapter)) for reader in self.readers.values())

    def rewrite(
        self, target: Path, names: Mapping[str, str], adapter: Adapter, change: Change
    ) -> dict[str, tuple[int, int]]:
        """Write all files again into `target`, tensor by tensor; weights not in `names` keep their bytes.

        Args:
            names: the adapter's weight name by tensor name, see `names_of`.
            change: called for each of the adapter's weights, in the adapter's dtype.

        Returns:
            The fingerprints by weight name.
        """
        prints = {}
        for file, reader in self.readers.items():
            specs = _new_specs(reader, names, adapter)
            with TensorWriter(target / file, specs, reader.metadata, start=reader.start) as writer:
                for stored, (dtype, shape) in specs.items():
                    tensor = reader.tensor(stored)
                    if stored in names:
                        tensor = tensor.to(dtype)
                        prints[names[stored]] = change(names[stored], tensor.view(-1))
                    writer.write(stored, tensor.view(shape))
        return prints

    def copy_small_files(self, target: Path, dtype: str) -> None:
        """Copy configuration and tokenizer; config.json names the dtype that the adapter was trained in."""
        for path in self.folder.iterdir():
            if path.is_file() and path.suffix in _SMALL_FILES:
                shutil.copyfile(path, target / path.name)
        config = {key: value for key, value in self._config.items() if key != "torch_dtype"}
        write_json(target / "config.json", {**config, "dtype": dtype})


def bytes_of(specs: Specs) -> int:
    """Add up the sizes of tensors of these dtypes and shapes."""
    return sum(math.prod(shape) * dtype.itemsize for dtype, shape in specs.values())


def _new_specs(reader: TensorReader, names: Mapping[str, str], adapter: Adapter) -> Specs:
    dtype_of = lambda stored: adapter.dtype if stored in names else reader.dtype(stored)
    return {stored: (dtype_of(stored), reader.shape(stored)) for stored in reader.names}


def _read_config(folder: Path) -> dict[str, Any]:
    file = folder / "config.json"
    if not file.is_file():
        raise UserError(f"base: {folder} holds no config.json; expected a transformers model folder")
    try:
        return dict(json.loads(file.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError) as error:
        raise UserError(f"base: {file} is damaged: {error}") from None


def _weight_files(folder: Path) -> list[Path]:
    """List the files that transformers would load: those of the index, or model.safetensors, or all there are."""
    index = folder / INDEX_FILE
    if index.is_file():
        try:
            files = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
        except (ValueError, KeyError, AttributeError) as error:
            raise UserError(f"base: {index} is damaged: {error!r}") from None
        return [folder / file for file in files]
    if (folder / "model.safetensors").is_file():
        return [folder / "model.safetensors"]
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise UserError(f"base: {folder} holds no .safetensors files; save it with save_pretrained first")
    return files
