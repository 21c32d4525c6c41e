"""Deltas as files: the adapter folder, and the base with an adapter merged in.

An adapter is `adapter_model.safetensors` (for each weight `<name>.indices` [K] int32 or int64, sorted and unique, and
`<name>.deltas` [K] fp32) and `adapter_config.json`. Everything in a file is checked before any weight is touched.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from . import __version__
from .base_weight import ROUNDING_RULE, WeightPart, combine_fingerprints, effective_values, fingerprint
from .errors import UserError
from .files import write_atomically, write_json, write_text

FORMAT = "scale_sft sparse delta 1"
WEIGHTS_FILE = "adapter_model.safetensors"
CONFIG_FILE = "adapter_config.json"


@dataclass(frozen=True)
class Adapter:
    """Sparse deltas of some weights of one base."""

    indices: dict[str, Tensor]  # by weight name: [K] int32 or int64, sorted, unique
    deltas: dict[str, Tensor]  # [K] fp32
    shapes: dict[str, tuple[int, int]]
    info: dict[str, Any]  # the rest of adapter_config.json: base, dtype, base_hash, method ...

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the base that the deltas were trained on."""
        return getattr(torch, self.info["dtype"])


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
    folder = Path(folder)
    for file in (CONFIG_FILE, WEIGHTS_FILE):
        if not (folder / file).is_file():
            raise UserError(f"adapter: {folder} holds no {file}; expected the adapter/ folder of a run")
    try:
        config = json.loads((folder / CONFIG_FILE).read_text(encoding="utf-8"))
        shapes = {name: (int(shape[0]), int(shape[1])) for name, shape in config.pop("shapes").items()}
        if config["format"] != FORMAT:
            raise UserError(f"adapter: {folder / CONFIG_FILE}: format is {config['format']!r}, expected {FORMAT!r}")
        wrong = [key for key in ("base", "base_hash", "dtype") if not isinstance(config[key], str)]
        if wrong or config["dtype"] not in ("float32", "bfloat16", "float16"):
            raise ValueError(f"{(wrong or ['dtype'])[0]} is {config[(wrong or ['dtype'])[0]]!r:.80}")
    except (ValueError, KeyError, TypeError, IndexError, AttributeError, OverflowError, RecursionError) as error:
        raise UserError(f"adapter: {folder / CONFIG_FILE} is damaged: {error!r}") from None
    indices, deltas = {}, {}
    try:
        with safe_open(folder / WEIGHTS_FILE, "pt") as file:
            expected = {f"{name}.{kind}" for name in shapes for kind in ("indices", "deltas")}
            if set(file.keys()) != expected:
                odd = sorted(set(file.keys()) ^ expected)[0]
                raise UserError(f"adapter: {folder}: the two files disagree on '{odd}'")
            for name, shape in shapes.items():
                indices[name] = file.get_tensor(f"{name}.indices")
                deltas[name] = file.get_tensor(f"{name}.deltas")
                _check(name, indices[name], deltas[name], shape)
    except (SafetensorError, OSError) as error:
        raise UserError(f"adapter: {folder / WEIGHTS_FILE} is damaged: {error}") from None
    return Adapter(indices, deltas, shapes, config)


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


def apply_adapter(model: nn.Module, adapter: Adapter) -> dict[str, Tensor]:
    """Write an adapter's effective values into a model's weights, in place, after checking everything.

    Returns:
        The base values that were there, by weight name: [K]; `undo_adapter` puts them back.
    Raises:
        UserError: a weight is missing or of another shape or dtype, or the base is not the adapter's.
    """
    weights = dict(model.named_parameters())
    for name, shape in adapter.shapes.items():
        if name not in weights:
            raise UserError(f"adapter: the model has no weight '{name}'; is it the adapter's base?")
        if tuple(weights[name].shape) != shape or weights[name].dtype != adapter.dtype:
            raise UserError(
                f"adapter: weight '{name}' is {tuple(weights[name].shape)} {weights[name].dtype} in the model, "
                f"{shape} {adapter.dtype} in the adapter"
            )
    check_base({name: WeightPart.whole(weights[name]) for name in adapter.shapes}, adapter)
    kept = {}
    for name, indices in adapter.indices.items():
        entries = weights[name].data.view(-1)
        indices = indices.to(entries.device)
        kept[name] = entries.gather(0, indices)
        entries.scatter_(0, indices, effective_values(kept[name], adapter.deltas[name].to(entries.device)))
    return kept


def undo_adapter(model: nn.Module, adapter: Adapter, kept: Mapping[str, Tensor]) -> None:
    """Give the weights the base values back that `apply_adapter` returned."""
    weights = dict(model.named_parameters())
    for name, values in kept.items():
        entries = weights[name].data.view(-1)
        entries.scatter_(0, adapter.indices[name].to(entries.device), values)


def check_base(parts: Mapping[str, WeightPart], adapter: Adapter) -> None:
    """Raises UserError if the target weights are not those that the adapter was trained on."""
    found = combine_fingerprints({name: fingerprint(part) for name, part in parts.items()}, adapter.shapes)
    if found != adapter.info["base_hash"]:
        raise UserError(
            f"adapter: this base is not the one it was trained on ('{adapter.info.get('base')}'): the hash of the "
            f"target weights is {found[:16]}..., expected {adapter.info['base_hash'][:16]}..."
        )


def merge(adapter_folder: str | Path, output: str | Path, base: str | None = None) -> Path:
    """Write base + adapter as a plain transformers folder, one safetensors file at a time.

    The result has the dtype that the adapter was trained in and the effective values by the one rounding rule, so its
    logits are those of the trained model, bit for bit.

    Args:
        base: folder or hub id of the base, if not the one that the adapter names.
    Raises:
        UserError: wrong base, unreadable adapter, or an output folder that is not empty.
    """
    from .merge_quantized import is_quantized, merge_quantized
    from .model import base_location

    adapter, output = load_adapter(adapter_folder), Path(output)
    if is_quantized(adapter):
        merge_quantized(adapter_folder, output, base)
        return output
    if output.exists() and any(output.iterdir()):
        raise UserError(f"merge: output folder {output} is not empty; choose a new one")
    source = _local_folder(base_location(base or adapter.info["base"]), adapter.info.get("revision"))
    files = sorted(path for path in source.glob("*.safetensors"))
    if not files:
        raise UserError(f"merge: {source} holds no .safetensors files")
    names = _names_in_files(files, adapter)
    prints = {}
    work = output.with_name(f".{output.name}.partial")
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True)
    try:
        for file in files:
            prints |= _merge_file(file, work / file.name, names, adapter)
        found = combine_fingerprints(prints, adapter.shapes)
        if found != adapter.info["base_hash"]:
            raise UserError(
                f"merge: '{source}' is not the base that the adapter was trained on: the hash of the target weights is "
                f"{found[:16]}..., expected {adapter.info['base_hash'][:16]}..."
            )
        _copy_small_files(source, work, adapter.info["dtype"])
        if adapter.info.get("chat_template"):
            write_text(work / "chat_template.jinja", adapter.info["chat_template"])
        if output.exists():
            output.rmdir()
        work.replace(output)
    finally:
        shutil.rmtree(work, ignore_errors=True)
    return output


def _local_folder(location: str, revision: str | None) -> Path:
    if Path(location).is_dir():
        return Path(location)
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(location, revision=revision, allow_patterns=["*.json", "*.safetensors", "*.jinja", "*.model", "*.txt"]))
    except Exception as error:  # hub errors are many; all mean that the base cannot be had
        raise UserError(f"base: '{location}' is no folder here and the hub did not give it: {error}") from None


def _names_in_files(files: list[Path], adapter: Adapter) -> dict[str, str]:
    """Adapter's weight name by tensor name in the files; files may lack the prefix that the model class adds."""
    stored = set()
    for file in files:
        with safe_open(file, "pt") as handle:
            stored |= set(handle.keys())
    found = {}
    for name in adapter.shapes:
        tails = [name] + [name.split(".", n)[-1] for n in range(1, name.count("."))]
        match = next((tail for tail in tails if tail in stored), None)
        if match is None:
            raise UserError(f"merge: the base's files hold no tensor for '{name}'")
        found[match] = name
    return found


def _merge_file(file: Path, target: Path, names: Mapping[str, str], adapter: Adapter) -> dict[str, tuple[int, int]]:
    """Merge one safetensors file; returns the fingerprints of the base weights it held."""
    prints, tensors = {}, {}
    with safe_open(file, "pt") as handle:
        for stored in handle.keys():  # noqa: SIM118 (a safe_open handle is no dict)
            tensor = handle.get_tensor(stored)
            tensor = tensor.to(adapter.dtype) if tensor.is_floating_point() else tensor
            if stored in names:
                name = names[stored]
                if tuple(tensor.shape) != adapter.shapes[name]:
                    raise UserError(f"merge: '{stored}' is {tuple(tensor.shape)}, the adapter says {adapter.shapes[name]}")
                entries = tensor.contiguous().view(-1)
                prints[name] = fingerprint(WeightPart(lambda entries=entries: entries, 0, entries.numel()))
                indices = adapter.indices[name]
                entries.scatter_(0, indices, effective_values(entries.gather(0, indices), adapter.deltas[name]))
                tensor = entries.view(tensor.shape)
            tensors[stored] = tensor
        metadata = handle.metadata() or {"format": "pt"}
    write_atomically(target, lambda path: save_file(tensors, path, metadata=metadata))
    return prints


def _copy_small_files(source: Path, target: Path, dtype: str) -> None:
    """Configuration and tokenizer beside the weights; config.json names the dtype of the merged weights."""
    for path in source.iterdir():
        if path.is_file() and path.suffix in (".json", ".jinja", ".model", ".txt"):
            shutil.copyfile(path, target / path.name)
    config = json.loads((target / "config.json").read_text(encoding="utf-8"))
    config.pop("torch_dtype", None)
    config["dtype"] = dtype
    write_json(target / "config.json", config)
