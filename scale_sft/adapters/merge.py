"""The base with an adapter merged in, as a plain transformers folder; and back.

One tensor is in memory at a time, so a model far larger than the memory can be merged. Beside the weights lies
`base_entries.unmerge` (safetensors, the K overwritten base values of each weight), from which `unmerge` restores the
base bit for bit.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path

import torch
from torch import Tensor

from scale_sft.errors import UserError
from scale_sft.files import new_folder, write_json, write_text
from scale_sft.model.fingerprints import fingerprint
from scale_sft.model.resident import WeightPart, effective_values, read_entries, write_entries

from .apply import require_base
from .format import Adapter
from .safetensors_writer import TensorReader, TensorWriter

UNMERGE_FILE = "base_entries.unmerge"
_SMALL_FILES = (".json", ".jinja", ".model", ".txt", ".py")


def merge(adapter_folder: str | Path, output: str | Path, base: str | None = None) -> Path:
    """Write base + adapter as a plain transformers folder.

    The result has the dtype that the adapter was trained in and the effective values by the one rounding rule, so its
    logits are those of the trained model, bit for bit. A base in 4 or 8 bits is dequantised; see `merge_quantized`.

    Args:
        base: folder or hub id of the base, if not the one that the adapter names.

    Raises:
        UserError: wrong base, unreadable adapter, or an output folder that is not empty. Nothing is left behind.
    """
    from .merge_packed import merge_quantized

    with ExitStack() as stack:
        adapter = stack.enter_context(Adapter.open(adapter_folder))
        if adapter.is_quantized:
            merge_quantized(adapter_folder, output, base)
            return Path(output)
        files = stack.enter_context(BaseFiles(locate_base(adapter, base)))
        names = files.names_of(adapter)
        with new_folder(Path(output), "merge") as work:
            specs = {name: (adapter.dtype, (adapter.active(name),)) for name in adapter.shapes}
            with TensorWriter(work / UNMERGE_FILE, specs, {"base_hash": adapter.info["base_hash"]}) as kept:

                def put_in(name: str, entries: Tensor) -> tuple[int, int]:
                    found = fingerprint(WeightPart(lambda: entries, 0, entries.numel()))
                    indices = adapter.indices[name]
                    values = read_entries(entries, indices)
                    kept.write(name, values)
                    write_entries(entries, indices, effective_values(values, adapter.deltas[name]))
                    return found

                prints = files.rewrite(work, names, adapter, put_in)
            require_base(prints, adapter, f"merge: '{files.folder}' is not the base that the adapter was trained on")
            files.copy_small_files(work, adapter.info["dtype"])
            if adapter.info.get("chat_template"):
                write_text(work / "chat_template.jinja", adapter.info["chat_template"])
    return Path(output)


def unmerge(adapter_folder: str | Path, merged: str | Path, output: str | Path) -> Path:
    """Undo `merge`: write the base that `merged` was made from, in the dtype of the adapter, bit for bit.

    Raises:
        UserError: `merged` was not made by `merge` with this adapter, or is damaged. Nothing is left behind.
    """
    merged = Path(merged)
    if not (merged / UNMERGE_FILE).is_file():
        raise UserError(f"unmerge: {merged} holds no {UNMERGE_FILE}; expected a folder that `scale-sft merge` wrote")
    with (
        Adapter.open(adapter_folder) as adapter,
        BaseFiles(merged) as files,
        TensorReader(merged / UNMERGE_FILE) as kept,
    ):
        names = files.names_of(adapter)
        if kept.metadata.get("base_hash") != adapter.info["base_hash"] or set(kept.names) != set(adapter.shapes):
            raise UserError(f"unmerge: {merged} was not merged with this adapter")
        with new_folder(Path(output), "unmerge") as work:

            def take_out(name: str, entries: Tensor) -> tuple[int, int]:
                indices, values = adapter.indices[name], kept.tensor(name)
                same = read_entries(entries, indices).equal(effective_values(values, adapter.deltas[name]))
                if not same:
                    raise UserError(f"unmerge: '{name}' of {merged} does not hold the deltas of this adapter")
                write_entries(entries, indices, values)
                return fingerprint(WeightPart(lambda: entries, 0, entries.numel()))

            prints = files.rewrite(work, names, adapter, take_out)
            require_base(prints, adapter, f"unmerge: {merged} has changed since it was merged")
            files.copy_small_files(work, adapter.info["dtype"])
    return Path(output)


def locate_base(adapter: Adapter, base: str | None = None) -> Path:
    """The folder of an adapter's base (or of `base` in its place), fetched from the hub where it is not here."""
    from scale_sft.model.loading import base_location

    location = base_location(base or adapter.info["base"])
    if Path(location).is_dir():
        return Path(location)
    from huggingface_hub import snapshot_download

    patterns = [f"*{suffix}" for suffix in (*_SMALL_FILES, ".safetensors")]
    try:
        return Path(snapshot_download(location, revision=adapter.info.get("revision"), allow_patterns=patterns))
    except Exception as error:  # hub errors are many; all mean that the base cannot be had
        raise UserError(f"base: '{location}' is no folder here and the hub did not give it: {error}") from None


class BaseFiles:
    """The weight files of a transformers folder; use it in a `with` block."""

    def __init__(self, folder: Path):
        self.folder = folder
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
        """Adapter's weight name by tensor name in the files; files may lack the prefix that the model class adds.

        Raises:
            UserError: a weight is missing or of another shape.
        """
        found = {}
        for name, shape in adapter.shapes.items():
            tails = [name] + [name.split(".", n)[-1] for n in range(1, name.count("."))]
            match = next((tail for tail in tails if tail in self._file_of), None)
            if match is None:
                raise UserError(f"base: the files of '{self.folder}' hold no tensor for '{name}'")
            if self._file_of[match].shape(match) != shape:
                got = self._file_of[match].shape(match)
                raise UserError(f"base: '{match}' of '{self.folder}' is {got}, the adapter says {shape}")
            found[match] = name
        return found

    def entries(self, stored: str, dtype: torch.dtype) -> Tensor:
        """One weight, flattened [N], in `dtype`."""
        return self._file_of[stored].tensor(stored).to(dtype).view(-1)

    def rewrite(self, target: Path, names: Mapping[str, str], adapter: Adapter, change) -> dict[str, tuple[int, int]]:
        """Write all files anew into `target`, in the adapter's dtype, tensor by tensor.

        Args:
            change: (adapter's name, entries [N]) -> fingerprint of the base; called for the adapter's weights, may
                change the entries in place.

        Returns:
            The fingerprints by weight name.
        """
        prints = {}
        for file, reader in self.readers.items():
            wanted = {}
            for stored in reader.names:
                dtype = reader.dtype(stored)
                wanted[stored] = (adapter.dtype if dtype.is_floating_point else dtype, reader.shape(stored))
            with TensorWriter(target / file, wanted, reader.metadata, start=reader.start) as writer:
                for stored, (dtype, shape) in wanted.items():
                    tensor = reader.tensor(stored).to(dtype)
                    if stored in names:
                        prints[names[stored]] = change(names[stored], tensor.view(-1))
                    writer.write(stored, tensor.view(shape))
        return prints

    def copy_small_files(self, target: Path, dtype: str) -> None:
        """Configuration and tokenizer beside the weights; config.json names the dtype of the weights."""
        for path in self.folder.iterdir():
            if path.is_file() and path.suffix in _SMALL_FILES:
                shutil.copyfile(path, target / path.name)
        config = json.loads((target / "config.json").read_text(encoding="utf-8"))
        config.pop("torch_dtype", None)
        config["dtype"] = dtype
        write_json(target / "config.json", config)


def _weight_files(folder: Path) -> list[Path]:
    """The files that transformers would load: those of the index, or model.safetensors, or whatever there is."""
    index = folder / "model.safetensors.index.json"
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
