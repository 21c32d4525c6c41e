"""Files that are never half written: a temporary name in the same folder, flushed to disk, then renamed."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from scale_sft.errors import UserError

PACKAGE = Path(__file__).parent
ASSETS = PACKAGE / "assets"
"""Data that ship with the package: the demo, model shapes, chat templates, benchmark tasks."""
_CARRIED = ASSETS / "launch_files"
LAUNCH_FILES = _CARRIED if _CARRIED.is_dir() else PACKAGE.parent
"""The folder of launch/ and ds_configs/: inside an installed wheel, otherwise the clone."""


def write_atomically(path: Path, write: Callable[[Path], None]) -> None:
    """Let `write(temporary path)` produce the file, then give it its name. Nothing is left behind on failure."""
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
    write_atomically(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))


def write_bytes(path: Path, content: bytes) -> None:
    write_atomically(path, lambda temporary: temporary.write_bytes(content))


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    write_text(path, json.dumps(content, indent=2, ensure_ascii=False) + "\n")


def sync_folder(folder: Path) -> None:
    """Flush a folder's entries to disk, so that a rename survives a power cut."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextmanager
def new_folder(output: Path, what: str) -> Iterator[Path]:
    """A working folder that becomes `output` when all is well, and otherwise vanishes.

    Raises:
        UserError: `output` is there already and not empty; `what` names the command.
    """
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise UserError(f"{what}: output folder {output} is not empty; choose a new one")
    work = output.with_name(f".{output.name}.partial")
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True)
    try:
        yield work
        if output.exists():
            output.rmdir()
        work.replace(output)
        sync_folder(output.parent)
    finally:
        shutil.rmtree(work, ignore_errors=True)
