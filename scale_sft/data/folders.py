"""Files of examples: which endings are read, what of a folder is passed over, and how compressed files are opened.

A folder is read with its sub-folders, in the order of its paths. Passed over, and said: hidden files, files of other
endings, texts such as README.txt that describe the data, and folders that hold a model.
"""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from scale_sft.errors import UserError

KINDS = {".json": "json", ".jsonl": "json", ".csv": "csv", ".parquet": "parquet", ".txt": "text"}
"""What is read, by ending; upper case is the same."""
COMPRESSED = (".gz", ".zst", ".bz2", ".xz")
SAVED = "saved"
"""Kind of a folder that `Dataset.save_to_disk` wrote."""
_ABOUT_THE_DATA = ("readme", "license", "licence", "copying", "notice", "authors", "changelog", "citation", "about")
_SPLITS = {"train": "train", "test": "test", "valid": "test", "validation": "test", "dev": "test", "eval": "test"}


@dataclass(frozen=True)
class Finding:
    """The files (and saved data sets) of a file or folder, in their order, and what a user should know of the rest."""

    files: tuple[Path, ...]
    notes: tuple[str, ...] = ()

    @property
    def identity(self) -> list[Path]:
        """All files that the rows depend on."""
        return [file for path in self.files for file in (sorted(path.rglob("*.*")) if path.is_dir() else [path])]


def kind_of(path: Path) -> str | None:
    """Tell how to read a file: a value of KINDS, SAVED, or None if it is not read."""
    if path.is_dir():
        return SAVED if _is_saved(path) else None
    suffixes = [suffix.lower() for suffix in path.suffixes]
    inner = suffixes[:-1] if suffixes and suffixes[-1] in COMPRESSED else suffixes
    kind = KINDS.get(inner[-1]) if inner else None
    return None if kind == "parquet" and inner != suffixes else kind


def is_data_file(path: Path) -> bool:
    """Return True if files with this ending are read."""
    return not path.is_dir() and kind_of(path) is not None


def find_files(path: Path) -> Finding:
    """Find the files of a path.

    Raises:
        UserError: there are none, or one is there twice: packed and unpacked.
    """
    expected = f"expected {', '.join(KINDS)}"
    if not path.exists():
        raise UserError(f"data: no such file: {path}")
    if path.is_dir() and not _is_saved(path):
        return _find_in_folder(path, expected)
    if kind_of(path) is None:
        more = f", any of them compressed ({', '.join(COMPRESSED)}; not parquet), a folder, or a hub data set"
        raise UserError(f"data: {path}: {expected}{more}")
    if path.is_file() and not path.stat().st_size:
        raise UserError(f"data: {path} is empty; expected one example per line")
    return Finding((path,))


def _find_in_folder(root: Path, expected: str) -> Finding:
    files: list[Path] = []
    passed: list[str] = []
    for folder, inner, names in os.walk(root):
        here = Path(folder)
        for name in sorted(inner):
            path = here / name
            if _is_passed_over(path):
                passed.append(f"{path.relative_to(root)}/")
            elif _is_saved(path):
                files.append(path)
        inner[:] = [name for name in inner if not _is_passed_over(here / name) and not _is_saved(here / name)]
        for name in names:
            path = here / name
            about = path.suffix.lower() == ".txt" and name.lower().startswith(_ABOUT_THE_DATA)
            if name.startswith(".") or about or kind_of(path) is None or not path.is_file():
                passed.append(str(path.relative_to(root)))
            else:
                files.append(path)
    if not files:
        told = f" (passed over: {_some(sorted(passed))})" if passed else ""
        raise UserError(f"data: folder {root} holds no data files; {expected}{told}")
    files.sort(key=lambda path: path.relative_to(root).parts)
    _refuse_doubles(root, files)
    notes = [f"data: {root}: passed over {_some(sorted(passed))}"] if passed else []
    kinds = {_SPLITS.get(part.split(".")[0].split("-")[0].lower()) for f in files for part in f.relative_to(root).parts}
    if {"train", "test"} <= kinds:
        read = _some([str(file.relative_to(root)) for file in files])
        notes.append(f"data: {root}: all of {read} are read; name one of them to use it alone")
    return Finding(tuple(files), tuple(notes))


def _refuse_doubles(root: Path, files: list[Path]) -> None:
    """Raises UserError if a file stands next to its own compressed form."""
    there = {str(file) for file in files}
    for file in files:
        if file.suffix.lower() in COMPRESSED and str(file.with_suffix("")) in there:
            plain = file.with_suffix("").relative_to(root)
            raise UserError(
                f"data: folder {root} holds {plain} and {file.relative_to(root)}, the same data twice; remove one"
            )


def _is_saved(path: Path) -> bool:
    """Return True if `save_to_disk` wrote this folder, of a data set or of several splits."""
    return (path / "dataset_dict.json").is_file() or all(
        (path / name).is_file() for name in ("dataset_info.json", "state.json")
    )


def _is_passed_over(folder: Path) -> bool:
    """Return True if a folder is hidden, a link, or holds a model."""
    return folder.name.startswith(".") or folder.is_symlink() or (folder / "config.json").is_file()


def _some(names: list[str]) -> str:
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")


@contextmanager
def opened(path: Path) -> Iterator[BinaryIO]:
    """Open a file for reading its bytes, unpacked."""
    openers: dict[str, Callable[[Path], Any]] = {
        ".gz": gzip.open,
        ".bz2": bz2.open,
        ".xz": lzma.open,
        ".zst": _open_zst,
    }
    opener = openers.get(path.suffix.lower())
    stream: BinaryIO = opener(path) if opener else path.open("rb", buffering=1 << 20)
    try:
        yield stream
    finally:
        stream.close()


def _open_zst(path: Path) -> io.BufferedReader:
    import pyarrow

    return io.BufferedReader(pyarrow.input_stream(str(path), compression="zstd"))
