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

from scale_sft.config.options import ModelConfig
from scale_sft.errors import UserError, first_line
from scale_sft.files import write_json
from scale_sft.model.empty import empty_model
from scale_sft.model.experts import parse_slice
from scale_sft.model.loading import base_location, load_model_config

from .format import Adapter
from .safetensors_writer import TensorReader, TensorWriter
from .stored_names import (
    Source,
    check_conversion,
    converted_back,
    expert_sources,
    sources_of,
    tied_names,
    with_copies,
)

INDEX_FILE = "model.safetensors.index.json"
_SMALL_FILES = (".json", ".jinja", ".model", ".txt", ".py")
Specs = dict[str, tuple[torch.dtype, tuple[int, ...]]]
"""(dtype, shape) of the tensors of a file, by their names in it."""
Sources = dict[str, Source]
"""What the weights of an adapter are stored as, by weight name."""
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

    def sources_of(self, shapes: Mapping[str, tuple[int, int]], model: Any = None) -> Sources:
        """Find the tensors that weights of the model are stored as.

        Args:
            shapes: of the weights, by name.
            model: of this base, on the meta device; default: built from config.json, as far as transformers knows it.

        Raises:
            UserError: a weight is missing, of another shape, or stored in a way that a merge could not write again.
        """
        model = self._known_model() if model is None else model
        known = sources_of(model, self._file_of) if hasattr(model, "base_model_prefix") else {}
        others = {} if model is None else tied_names(model)
        by_parameter: dict[str, list[Source]] = {}
        found: dict[str, Source] = {}
        for name in shapes:
            parameter, number = parse_slice(name) or (name, 0)
            if parameter not in by_parameter:
                source = known.get(parameter)
                if source is None and (stored := self.find(parameter)) is not None:
                    source = Source([stored], parameter)
                copies = [known[other] for other in others.get(parameter, ()) if other in known]
                source = with_copies(source, parameter, copies)
                if source is None:
                    raise UserError(f"base: the files of '{self.folder}' hold no tensor for '{name}'")
                by_parameter[parameter] = [source] if parameter == name else expert_sources(source)
            found[name] = by_parameter[parameter][min(number, len(by_parameter[parameter]) - 1)]
        checked = set()
        for source, names in _grouped(found):
            wanted = {name: shapes[name] for name in names}
            stored_shapes = {name: self._file_of[name].shape(name) for name in source.stored}
            alike = id(source.conversion), *stored_shapes.values(), *wanted.values()
            if source.expert is not None and alike in checked:  # thousands of experts are alike
                continue
            checked.add(alike)
            if wrong := check_conversion(source, stored_shapes, wanted):
                raise UserError(
                    f"base: '{source.stored[0]}' of '{self.folder}' does not fit '{next(iter(wanted))}': {wrong}"
                )
        return found

    def _known_model(self) -> Any:
        """Build the model of these files on the meta device; None where transformers does not know its code."""
        try:
            return empty_model(load_model_config(ModelConfig(base=str(self.folder))))
        except UserError:
            return None

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

    def weight(self, source: Source, name: str, dtype: torch.dtype) -> Tensor:
        """Read one weight, flattened [N], in `dtype`."""
        tensors = {stored: self.tensor(stored) for stored in source.stored}
        part = source.part(source.to_memory(tensors), name)
        assert part is not None, "sources_of has checked it"
        return part.to(dtype).contiguous().view(-1)

    def bytes_rewritten(self, sources: Sources, adapter: Adapter) -> int:
        """Compute the size of what `rewrite` will write, without headers."""
        dtypes = _dtypes(sources, adapter)
        return sum(bytes_of(_new_specs(reader, dtypes)) for reader in self.readers.values())

    def rewrite(self, target: Path, sources: Sources, adapter: Adapter, change: Change) -> dict[str, tuple[int, int]]:
        """Write all files again into `target`, tensor by tensor; those that are not in `sources` keep their bytes.

        Args:
            target: folder.
            sources: of the adapter's weights, see `sources_of`.
            adapter: knows the dtypes.
            change: called for each of the adapter's weights, in the dtype it was trained in.

        Returns:
            The fingerprints by weight name.
        """
        dtypes = _dtypes(sources, adapter)
        prints: dict[str, tuple[int, int]] = {}
        group_of = {stored: group for group in _grouped(sources) for stored in _written(group[0])}
        ready: dict[str, Tensor] = {}  # tensors of a conversion that are changed and wait for their turn
        for file, reader in self.readers.items():
            specs = _new_specs(reader, dtypes)
            with TensorWriter(target / file, specs, reader.metadata, start=reader.start) as writer:
                for stored, (dtype, shape) in specs.items():
                    if stored in group_of and stored not in ready:
                        changed, found = self._changed(*group_of[stored], dtype, change)
                        ready |= changed
                        prints |= found
                    tensor = ready.pop(stored) if stored in group_of else reader.tensor(stored)
                    writer.write(stored, tensor.reshape(shape))
        return prints

    def _changed(
        self, source: Source, names: list[str], dtype: torch.dtype, change: Change
    ) -> tuple[dict[str, Tensor], dict[str, tuple[int, int]]]:
        """Change the weights of one source; returns its tensors by stored name, and fingerprints by weight name."""
        tensors = {stored: self.tensor(stored).to(dtype) for stored in source.stored}
        weights = {name: weight.contiguous() for name, weight in source.to_memory(tensors).items()}
        copies = {stored: self.tensor(stored).to(dtype) for stored in source.copies}
        tied = [stored for stored, copy in copies.items() if torch.equal(copy, tensors[source.stored[0]])]
        if source.conversion is not None:
            converted_back(source, tensors, weights, self.folder)
            weights = {name: weight.clone() for name, weight in weights.items()}
        parts = {name: source.part(weights, name) for name in names}
        prints = {name: change(name, part.view(-1)) for name, part in parts.items() if part is not None}
        written = source.to_files(weights)
        # a copy that differs is none: transformers does not tie them either
        return written | copies | dict.fromkeys(tied, written[source.stored[0]]), prints

    def copy_small_files(self, target: Path, dtype: str) -> None:
        """Copy configuration and tokenizer; config.json names the dtype that the adapter was trained in."""
        for path in self.folder.iterdir():
            if path.is_file() and path.suffix in _SMALL_FILES:
                shutil.copyfile(path, target / path.name)
        config = {key: value for key, value in self._config.items() if key != "torch_dtype"}
        write_json(target / "config.json", {**config, "dtype": dtype})


def require_mergeable(config: ModelConfig, model: Any, shapes: Mapping[str, tuple[int, int]], *, loaded: bool) -> None:
    """Prove before training that its result can be merged: the files have every target, in a way that can be written.

    Args:
        config: of the base.
        model: the base on the meta device.
        shapes: of the targets, by name.
        loaded: a base of the hub is on this machine; before, only local folders are checked.

    Raises:
        UserError: see `BaseFiles.sources_of`.
    """
    location = base_location(config.base)
    folder = Path(location)
    if not folder.is_dir():
        if not loaded:
            return
        from transformers.utils import cached_file

        for name in (INDEX_FILE, "model.safetensors"):
            found = cached_file(location, name, revision=config.revision, _raise_exceptions_for_missing_entries=False)
            if found:
                break
        else:
            raise UserError(f"base: '{location}' has no .safetensors files, which a merge needs")
        folder = Path(found).parent
    with BaseFiles(folder) as files:
        files.sources_of(shapes, model)


def bytes_of(specs: Specs) -> int:
    """Add up the sizes of tensors of these dtypes and shapes."""
    return sum(math.prod(shape) * dtype.itemsize for dtype, shape in specs.values())


def _grouped(sources: Sources) -> list[tuple[Source, list[str]]]:
    """List each source once, with the names of its weights."""
    groups: dict[int, tuple[Source, list[str]]] = {}
    for name, source in sources.items():
        groups.setdefault(id(source), (source, []))[1].append(name)
    return list(groups.values())


def _dtypes(sources: Sources, adapter: Adapter) -> dict[str, torch.dtype]:
    """List the dtypes of the tensors that change, by stored name."""
    return {stored: adapter.dtype_of(name) for name, source in sources.items() for stored in _written(source)}


def _written(source: Source) -> list[str]:
    """List the tensors of the files that change with the weights of a source."""
    return [*source.stored, *source.copies]


def _new_specs(reader: TensorReader, dtypes: Mapping[str, torch.dtype]) -> Specs:
    return {stored: (dtypes.get(stored, reader.dtype(stored)), reader.shape(stored)) for stored in reader.names}


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
