"""Remarks on the data that are not errors, given once however many processes meet them."""

from __future__ import annotations

import hashlib
from pathlib import Path


class Notes:
    """Notes of all processes that share a folder; without a folder, those of this one."""

    def __init__(self, folder: Path | None = None):
        self._folder = folder
        self._said: set[str] = set()

    def add(self, text: str) -> None:
        """Add a note, unless it is there."""
        if text in self._said:
            return
        self._said.add(text)
        if self._folder is not None:
            self._folder.mkdir(parents=True, exist_ok=True)
            name = hashlib.sha256(text.encode()).hexdigest()[:32]
            (self._folder / name).write_text(text, encoding="utf-8")

    def all(self) -> list[str]:
        """Return all notes, sorted."""
        written = set() if self._folder is None or not self._folder.exists() else set(self._folder.iterdir())
        return sorted(self._said | {file.read_text(encoding="utf-8") for file in written})
