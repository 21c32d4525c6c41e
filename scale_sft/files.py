"""Files that are never half written: a temporary name in the same folder, flushed to disk, then renamed."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from scale_sft.errors import UserError

PACKAGE = Path(__file__).parent
ASSETS = PACKAGE / "assets"
"""Data that ship with the package: the demo, model shapes, chat templates, benchmark tasks."""
_CARRIED = ASSETS / "launch_files"
LAUNCH_FILES = _CARRIED if _CARRIED.is_dir() else PACKAGE.parent
"""The folder of launch/ and ds_configs/: inside an installed wheel, otherwise the clone."""


def write_atomically(path: Path, write: Callable[[Path], object]) -> None:
    """Call `write(temporary path)` to produce the file, then rename it. Nothing is left behind on failure."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        write(temporary)
        with temporary.open("rb") as handle:
            os.fsync(handle.fileno())
        os.replace(temporary, path)
        sync_folder(path.parent)
    except BaseException:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise


def write_text(path: Path, text: str) -> None:
    """Write a UTF-8 file, whole or not at all."""
    write_atomically(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))


def write_bytes(path: Path, content: bytes) -> None:
    """Write a file, whole or not at all."""
    write_atomically(path, lambda temporary: temporary.write_bytes(content))


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write an object as indented JSON, whole or not at all."""
    write_text(path, json.dumps(content, indent=2, ensure_ascii=False) + "\n")


def sync_folder(folder: Path) -> None:
    """Flush a folder's entries to disk, so that a rename survives a power cut."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


_PARTIAL = ".scale_sft.partial"
_IGNORED = (_PARTIAL, "lost+found")  # what a killed process left, and what a fresh file system has


@contextmanager
def new_folder(output: str | Path, what: str) -> Iterator[Path]:
    """Yield a working folder whose content becomes `output` if the `with` block ends well, and vanishes otherwise.

    `output` may be a new name, an empty folder, `.`, a mount point, or a link to one of these. A new name appears with
    all its content at once; a folder that exists is filled, `config.json` last. `~` is expanded.

    Args:
        what: the command, for messages.

    Raises:
        UserError: `output` is a file or is not empty, or it cannot be written; or the block meets any other OSError.
    """
    path = Path(output).expanduser()
    with disk_errors_in_one_line(what, path):
        path = Path(os.path.realpath(path))
        exists = path.exists()
        work = path / _PARTIAL if exists else path.with_name(f".{path.name}.partial")
        if path.is_symlink() or (exists and not path.is_dir()):
            raise UserError(f"{what}: output {output} is not a folder; choose a new one")
        if exists and any(entry.name not in _IGNORED for entry in path.iterdir()):
            raise UserError(f"{what}: output folder {output} is not empty; choose a new one")
        shutil.rmtree(work, ignore_errors=True)
        work.mkdir(parents=True)
        try:
            yield work
            if exists:
                for entry in sorted(work.iterdir(), key=lambda entry: entry.name == "config.json"):
                    entry.replace(path / entry.name)
            else:
                work.replace(path)
            sync_folder(path if exists else path.parent)
        finally:
            shutil.rmtree(work, ignore_errors=True)


def require_free_bytes(folder: Path, needed_bytes: int, what: str) -> None:
    """Raise UserError if the disk of `folder` has less space left than `what` is about to write there."""
    free_bytes = shutil.disk_usage(folder).free
    if free_bytes < needed_bytes:
        raise UserError(
            f"{what}: {needed_bytes:,} bytes are needed, {free_bytes:,} are free on the disk of {folder.parent}. "
            "Fix: free some space, or choose a folder on another disk"
        )


@contextmanager
def disk_errors_in_one_line(what: str, output: Path) -> Iterator[None]:
    """Turn an OSError of the `with` block, or its like from the safetensors library, into a UserError of one line."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        raise UserError(f"{what}: {output} was not written: {' '.join(str(error).split())}") from error
