"""The base with an adapter merged in, as a plain transformers folder; and back.

One tensor is in memory at a time, so a model far larger than the memory can be merged. Only the adapter's weights are
rewritten, in the dtype that the adapter was trained in; every other tensor keeps its stored bytes. The file
`base_entries.unmerge` next to the weights (safetensors: the K overwritten base values of each weight) lets `unmerge`
restore the base bit for bit.
"""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from pathlib import Path

import torch
from torch import Tensor

from scale_sft.data.turn_ends import write_taught_end
from scale_sft.errors import UserError
from scale_sft.files import new_folder, require_free_bytes, write_json, write_text
from scale_sft.model.fingerprints import fingerprint
from scale_sft.model.resident import WeightPart, effective_values, read_entries, write_entries

from .apply import require_base
from .format import Adapter, opened
from .safetensors_writer import TensorReader, TensorWriter

UNMERGE_FILE = "base_entries.unmerge"
INDEX_FILE = "model.safetensors.index.json"
_SMALL_FILES = (".json", ".jinja", ".model", ".txt", ".py")
Specs = dict[str, tuple[torch.dtype, tuple[int, ...]]]
"""(dtype, shape) of the tensors of a file, by their names in it."""
Change = Callable[[str, Tensor], tuple[int, int]]
"""(adapter's weight name, entries [N] to change in place) -> fingerprint of the base's entries."""


def merge(
    adapter: str | Path | Adapter, output: str | Path, base: str | None = None, *, licence: str | None = None
) -> Path:
    """Write base + adapter as a plain transformers folder with a model card.

        scale_sft.merge("runs/demo/adapter", "merged")
        model = AutoModelForCausalLM.from_pretrained("merged")

    The adapter's weights get their effective values by the one rounding rule, so the logits are those of the trained
    model, bit for bit. A base in 4 or 8 bits is dequantised; see `merge_quantized`.

    Args:
        adapter: the adapter/ folder of a run, or an adapter in memory.
        output: a new folder, or an empty one.
        base: folder or hub id of the base, if it is not where the adapter says.
        licence: for the model card, as the hub knows it ("apache-2.0"); default: that of the base where it is known.

    Returns:
        The folder written.

    Raises:
        UserError: the base is another one, the adapter is unreadable, or `output` is not empty or cannot be written.
            Nothing is left behind.
    """
    from .merge_packed import merge_quantized
    from .model_card import write_card

    target = Path(output).expanduser()
    with opened(adapter) as source, new_folder(target, "merge") as work:
        if source.is_quantized:
            merge_quantized(source, work, base)
        else:
            _merge_files(source, work, base)
        write_taught_end(work, source.info)
        if source.info.get("chat_template"):
            write_text(work / "chat_template.jinja", source.info["chat_template"])
        write_card(adapter, work, form="merged", name=target.resolve().name, licence=licence)
    return target


def _merge_files(adapter: Adapter, work: Path, base: str | None) -> None:
    """Write the merged weights, the base values that they replace, and the base's small files into `work`."""
    with BaseFiles(locate_base(adapter, base)) as files:
        names = files.names_of(adapter)
        kept_specs: Specs = {name: (adapter.dtype, (adapter.active(name),)) for name in adapter.shapes}
        require_free_bytes(work, files.bytes_rewritten(names, adapter) + bytes_of(kept_specs), "merge")
        with TensorWriter(work / UNMERGE_FILE, kept_specs, {"base_hash": adapter.info["base_hash"]}) as kept:

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


def unmerge(adapter: str | Path | Adapter, merged: str | Path, output: str | Path) -> Path:
    """Undo `merge`: write the base that `merged` was made from, bit for bit.

    Weights that the adapter changed are written in the adapter's dtype.

    Raises:
        UserError: `merged` was not made by `merge` with this adapter, or is damaged. Nothing is left behind.
    """
    merged, target = Path(merged).expanduser(), Path(output).expanduser()
    if not (merged / UNMERGE_FILE).is_file():
        raise UserError(f"unmerge: {merged} holds no {UNMERGE_FILE}; expected a folder that `scale-sft merge` wrote")
    with (
        opened(adapter) as source,
        BaseFiles(merged) as files,
        TensorReader(merged / UNMERGE_FILE) as kept,
        new_folder(target, "unmerge") as work,
    ):
        names = files.names_of(source)
        if kept.metadata.get("base_hash") != source.info["base_hash"] or set(kept.names) != set(source.shapes):
            raise UserError(f"unmerge: {merged} was not merged with this adapter")
        require_free_bytes(work, files.bytes_rewritten(names, source), "unmerge")

        def take_out(name: str, entries: Tensor) -> tuple[int, int]:
            indices, values = source.indices[name], kept.tensor(name)
            same = read_entries(entries, indices).equal(effective_values(values, source.deltas[name]))
            if not same:
                raise UserError(f"unmerge: '{name}' of {merged} does not hold the deltas of this adapter")
            write_entries(entries, indices, values)
            return fingerprint(WeightPart(lambda: entries, 0, entries.numel()))

        prints = files.rewrite(work, names, source, take_out)
        require_base(prints, source, f"unmerge: {merged} has changed since it was merged")
        files.copy_small_files(work, source.info["dtype"])
    return target


def locate_base(adapter: Adapter, base: str | None = None) -> Path:
    """Find the folder of an adapter's base (or of `base` instead); a hub model that is not here is downloaded."""
    from scale_sft.model.loading import base_location

    location = base_location(base or adapter.info["base"])
    folder = Path(location).expanduser()
    if folder.is_dir():
        return folder
    from huggingface_hub import snapshot_download

    patterns = [f"*{suffix}" for suffix in (*_SMALL_FILES, ".safetensors")]
    try:
        return Path(snapshot_download(location, revision=adapter.info.get("revision"), allow_patterns=patterns))
    except Exception as error:  # hub errors are many; all mean that the base is out of reach
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise UserError(
            f"base: '{location}' is not a folder here, and the hub did not give it: {reason}. "
            "Fix: say where the base is (--base)"
        ) from None


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
        """The name in the files of a model's weight or buffer, with or without the prefix of the model class."""
        tails = [name] + [name.split(".", n)[-1] for n in range(1, name.count("."))]
        return next((tail for tail in tails if tail in self._file_of), None)

    def dtype(self, stored: str) -> torch.dtype:
        """The dtype of one tensor in its file."""
        return self._file_of[stored].dtype(stored)

    def tensor(self, stored: str) -> Tensor:
        """A copy of one tensor as it is stored."""
        return self._file_of[stored].tensor(stored)

    def entries(self, stored: str, dtype: torch.dtype) -> Tensor:
        """One weight, flattened [N], in `dtype`."""
        return self.tensor(stored).to(dtype).view(-1)

    def bytes_rewritten(self, names: Mapping[str, str], adapter: Adapter) -> int:
        """Size of what `rewrite` will write, without headers."""
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
        config = json.loads((target / "config.json").read_text(encoding="utf-8"))
        config.pop("torch_dtype", None)
        config["dtype"] = dtype
        write_json(target / "config.json", config)


def bytes_of(specs: Specs) -> int:
    """Size of the data of tensors of these dtypes and shapes."""
    return sum(math.prod(shape) * dtype.itemsize for dtype, shape in specs.values())


def _new_specs(reader: TensorReader, names: Mapping[str, str], adapter: Adapter) -> Specs:
    dtype_of = lambda stored: adapter.dtype if stored in names else reader.dtype(stored)
    return {stored: (dtype_of(stored), reader.shape(stored)) for stored in reader.names}


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
