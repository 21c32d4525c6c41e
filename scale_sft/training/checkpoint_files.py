"""Checkpoints as files: each appears whole or not at all, and a damaged one is recognised and named.

    checkpoints/step_000120/
      tensors_00001.safetensors ...   for each weight `<name>/<kind>`; several files where they are large
      state.json                      everything that is not a tensor
      manifest.json                   sizes and SHA-256 of the others and of itself; written last

A checkpoint is written under a temporary name in `checkpoints/`, flushed to disk, and renamed. Only safetensors and
JSON are ever read; file names come from the list above, never from the content of a file.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from scale_sft.errors import UserError
from scale_sft.files import sync_folder
from scale_sft.version import __version__

FORMAT = "scale_sft checkpoint 1"
MANIFEST = "manifest.json"
STATE = "state.json"
SHARD_BYTES = 2 << 30
_FOLDER = re.compile(r"step_(\d{6,12})")
_FILE = re.compile(r"state\.json|tensors_\d{5}\.safetensors")
_MANIFEST_KEYS = {"format", "step", "saved_at", "scale_sft_version", "torch_version", "active_entries", "files"}


class Damaged(UserError):
    """An incomplete checkpoint, or one that is not what was written; the message names the file and the reason."""


class SaveFailed(UserError):
    """A failed save; earlier checkpoints are intact."""


@dataclass(frozen=True)
class Checkpoint:
    """A folder `step_...` as it was found, with the problem that makes it useless, if any."""

    path: Path
    step: int
    manifest: Mapping[str, Any] | None = None
    problem: str | None = None

    @property
    def files(self) -> Mapping[str, Mapping[str, Any]]:
        """The listed files by name, with `bytes` and `sha256`; none where the manifest is not to be trusted."""
        return self.manifest["files"] if self.manifest else {}

    @property
    def bytes(self) -> int:
        """Size of the listed files."""
        return sum(entry["bytes"] for entry in self.files.values())


def write_checkpoint(
    folder: Path,
    step: int,
    weights: Iterable[tuple[str, Mapping[str, Tensor]]],
    state: Mapping[str, Any],
    active_entries: int,
    shard_bytes: int = SHARD_BYTES,
) -> Checkpoint:
    """Write `folder/step_...`; an older one of the same step is replaced.

    Args:
        weights: (name, tensors by kind) of each weight; consumed one at a time.
        state: JSON content next to the tensors.
        shard_bytes: close a file once it holds this much.

    Raises:
        SaveFailed: the disk is full or not writable; nothing of this checkpoint is left.
    """
    path = folder / f"step_{step:06d}"
    work = folder / f".{path.name}.{os.getpid()}.tmp"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        sweep(folder)
        work.mkdir()
        for number, tensors in enumerate(_shards(weights, shard_bytes), start=1):
            file = work / f"tensors_{number:05d}.safetensors"
            save_file(tensors, file, metadata={"format": "pt"})
            _flush(file)
        _write_json(work / STATE, state)
        _write_json(work / MANIFEST, _manifest(work, step, active_entries))
        sync_folder(work)
        if path.exists():  # damaged, or of a run that resumed from an older checkpoint
            os.rename(path, folder / f".{path.name}.{os.getpid()}.replaced.tmp")
        os.rename(work, path)
        sync_folder(folder)
        sweep(folder)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(work, ignore_errors=True)
        raise SaveFailed(
            f"checkpoint: {path} could not be written: {error}. Earlier checkpoints are intact. Fix: free some "
            "space, or choose another output_dir"
        ) from None
    return inspect(path)


def _shards(weights: Iterable[tuple[str, Mapping[str, Tensor]]], limit: int) -> Iterable[dict[str, Tensor]]:
    """Group whole weights, on the CPU, into about `limit` bytes each; only one group is in memory at a time."""
    group: dict[str, Tensor] = {}
    for name, tensors in weights:
        group |= {f"{name}/{kind}": tensor.detach().cpu().contiguous() for kind, tensor in tensors.items()}
        if sum(tensor.nbytes for tensor in group.values()) >= limit:
            yield group
            group = {}
    if group:
        yield group


def _flush(file: Path) -> None:
    with file.open("rb") as handle:
        os.fsync(handle.fileno())


def _write_json(file: Path, content: Mapping[str, Any]) -> None:
    file.write_text(json.dumps(content, indent=1, sort_keys=True, ensure_ascii=False) + "\n", encoding="utf-8")
    _flush(file)


def _manifest(folder: Path, step: int, active_entries: int) -> dict[str, Any]:
    files = {file.name: {"bytes": file.stat().st_size, "sha256": _sha256(file)} for file in sorted(folder.iterdir())}
    manifest = {
        "format": FORMAT,
        "step": step,
        "saved_at": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "scale_sft_version": __version__,
        "torch_version": torch.__version__,
        "active_entries": active_entries,
        "files": files,
    }
    return {**manifest, "sha256": _seal(manifest)}


def _seal(manifest: Mapping[str, Any]) -> str:
    """Compute the SHA-256 of a manifest's content without the seal itself."""
    content = {key: value for key, value in manifest.items() if key != "sha256"}
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _sha256(file: Path) -> str:
    sha = hashlib.sha256()
    with file.open("rb") as handle:
        while chunk := handle.read(1 << 22):
            sha.update(chunk)
    return sha.hexdigest()


# --- what is there ------------------------------------------------------------------------------------------------


def find_checkpoints(folder: Path) -> list[Checkpoint]:
    """List all checkpoints in a `checkpoints/` folder, newest first; sizes are checked, checksums are not."""
    if not folder.is_dir():
        return []
    found = [path for path in folder.iterdir() if _FOLDER.fullmatch(path.name)]
    return sorted(map(inspect, found), key=lambda checkpoint: -checkpoint.step)


def inspect(path: Path) -> Checkpoint:
    """Inspect the manifest and sizes of one checkpoint; a problem is recorded in the result, not raised."""
    match = _FOLDER.fullmatch(path.name)
    step = int(match[1]) if match else -1
    try:
        return Checkpoint(path, step, manifest=_checked_manifest(path, step))
    except Damaged as problem:
        return Checkpoint(path, step, problem=str(problem))


def verify(path: Path) -> Checkpoint:
    """Check all of one checkpoint: manifest, sizes, checksums, and that the tensor files open.

    Raises:
        Damaged: names the first file that is missing or not what was written.
    """
    checkpoint = inspect(path)
    if checkpoint.problem:
        raise Damaged(checkpoint.problem)
    for name, entry in checkpoint.files.items():
        try:
            if _sha256(path / name) != entry["sha256"]:
                raise Damaged(f"{path / name}: its checksum is not that of the manifest")
        except OSError as error:
            raise Damaged(f"{path / name} is not readable: {error}") from None
    TensorFiles(checkpoint)
    return checkpoint


def _checked_manifest(path: Path, step: int) -> dict[str, Any]:
    """Read the manifest of a checkpoint and check everything that does not need the other files' content."""
    if not path.is_dir() or path.is_symlink():
        raise Damaged(f"{path} is not a folder")
    if not any(path.iterdir()):
        raise Damaged(f"{path} is empty")
    file = path / MANIFEST
    if not file.is_file():
        raise Damaged(f"{file} is missing")
    try:
        manifest = read_json(file)
        if set(manifest) != _MANIFEST_KEYS | {"sha256"} or manifest["sha256"] != _seal(manifest):
            raise Damaged(f"{file} is not what was written")
        if manifest["format"] != FORMAT:
            raise Damaged(f"{file}: format is {manifest['format']!r}, expected {FORMAT!r}")
        if manifest["step"] != step or type(manifest["active_entries"]) is not int:
            raise Damaged(f"{file} is of step {manifest['step']!r}")
        listed = {name: entry["bytes"] for name, entry in manifest["files"].items()}
    except (KeyError, TypeError, AttributeError) as error:
        raise Damaged(f"{file} is damaged: {error!r}") from None
    if STATE not in listed or len(listed) < 2:
        raise Damaged(f"{file} lists no {STATE} or no tensors")
    for name, size in listed.items():
        if not _FILE.fullmatch(name):
            raise Damaged(f"{file}: '{name}' is not a file of a checkpoint")
        if not (path / name).is_file() or (path / name).is_symlink():
            raise Damaged(f"{path / name} is missing")
        if (path / name).stat().st_size != size:
            raise Damaged(f"{path / name} has {(path / name).stat().st_size} bytes, expected {size}")
    return manifest


def read_json(file: Path) -> dict[str, Any]:
    """Read the object in a JSON file.

    Raises:
        Damaged: it is not readable, not JSON, or not an object.
    """
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise Damaged(f"{file} is damaged: {str(error)[:200]}") from None
    if not isinstance(content, dict):
        raise Damaged(f"{file} is damaged: it holds {type(content).__name__}, expected an object")
    return content


class TensorFiles:
    """The tensors of a verified checkpoint, read one at a time.

    Raises:
        Damaged: a file is not in safetensors format, or two hold the same tensor.
    """

    def __init__(self, checkpoint: Checkpoint):
        self.path = checkpoint.path
        self.kinds: dict[str, list[str]] = {}  # of tensors, by weight name
        self._handles: dict[str, Any] = {}
        for name in checkpoint.files:
            if name == STATE:
                continue
            try:
                handle = safe_open(self.path / name, "pt")
                keys = list(handle.keys())
            except (SafetensorError, OSError) as error:
                raise Damaged(f"{self.path / name} is damaged: {error}") from None
            if not self._handles.keys().isdisjoint(keys):
                raise Damaged(f"{self.path / name} repeats a tensor of another file")
            self._handles |= dict.fromkeys(keys, handle)
        for key in sorted(self._handles):
            weight, _, kind = key.rpartition("/")
            self.kinds.setdefault(weight, []).append(kind)

    def read(self, name: str) -> dict[str, Tensor]:
        """Read all tensors of one weight by kind, to the CPU."""
        try:
            return {kind: self._handles[f"{name}/{kind}"].get_tensor(f"{name}/{kind}") for kind in self.kinds[name]}
        except (SafetensorError, OSError) as error:
            raise Damaged(f"{self.path}: the tensors of '{name}' are damaged: {error}") from None


# --- tidying ------------------------------------------------------------------------------------------------------


def prune(folder: Path, keep_last: int) -> None:
    """Remove everything older than the `keep_last` newest complete checkpoints."""
    found = find_checkpoints(folder)
    complete = [checkpoint.step for checkpoint in found if not checkpoint.problem]
    if len(complete) < keep_last:
        return
    for checkpoint in found:
        if checkpoint.step < complete[keep_last - 1]:
            doomed = folder / f".{checkpoint.path.name}.{os.getpid()}.removed.tmp"
            os.rename(checkpoint.path, doomed)  # first, so that a half-removed one is never taken for a checkpoint
    sweep(folder)


def sweep(folder: Path) -> None:
    """Remove what killed processes left under temporary names; only while the run is locked."""
    for path in folder.glob(".step_*.tmp"):
        shutil.rmtree(path, ignore_errors=True)
