"""Tokenised examples that stay on disk."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from scale_sft.model.loss import IGNORED


class Examples:
    """Tokenised examples over a `datasets.Dataset` that stays on disk; only their lengths are in memory.

    Args:
        rows: columns input_ids, spans (start, stop, start, stop ... of the tokens that count), length (before it was
            cut to max_length) and targets (how many tokens count; rows with 0 are left out).
        source: where they come from, for messages.
        notes: what a user should know of the data.
    """

    def __init__(self, rows: Any, source: str, notes: tuple[str, ...] = ()):
        self.source, self.notes = source, notes
        self._data = rows
        numbers = rows.with_format("numpy")
        targets, whole = (np.asarray(numbers[name][:], dtype=np.int64) for name in ("targets", "length"))
        self._kept = np.flatnonzero(targets)
        self._rows = numbers.with_format("numpy", columns=["input_ids", "spans"])
        self._targets = targets[self._kept]
        self.lengths = _list_lengths(rows, "input_ids")[self._kept]
        """Tokens of each example, [N] int64."""
        self.dropped = int((targets == 0).sum())
        """Rows of which no target token was left within max_length."""
        self._digest: str | None = None
        self.truncated = int((self.lengths < whole[self._kept]).sum())
        """Examples that were cut to max_length."""

    @classmethod
    def from_lists(cls, input_ids: Sequence[Sequence[int]], labels: Sequence[Sequence[int]], source: str) -> Examples:
        """Examples from token ids and, parallel to them, labels (IGNORED where a token does not count)."""
        import datasets

        spans = [_spans(row) for row in labels]
        targets = [sum(label != IGNORED for label in row[1:]) for row in labels]
        columns = {"input_ids": [list(row) for row in input_ids], "spans": spans, "targets": targets}
        return cls(datasets.Dataset.from_dict({**columns, "length": [len(row) for row in input_ids]}), source)

    def __len__(self) -> int:
        return len(self._kept)

    def tokens(self, n: int) -> tuple[np.ndarray, np.ndarray]:
        """Return input ids and labels (IGNORED where a token does not count) of one example: two [length] integers."""
        row = self._rows[int(self._kept[n])]
        ids = np.asarray(row["input_ids"])
        labels = np.full(len(ids), IGNORED, dtype=np.int64)
        for start, stop in np.asarray(row["spans"], dtype=np.int64).reshape(-1, 2):
            labels[start:stop] = ids[start:stop]
        return ids, labels

    def subset(self, members: Sequence[int]) -> Examples:
        """Return some of these examples, in the order given."""
        return Examples(self._data.select(self._kept[np.asarray(members, dtype=np.int64)]), self.source, self.notes)

    def right_answers(self) -> Examples:
        """Return the examples whose answers a generated one should match."""
        return self

    def digest(self) -> str:
        """Hash all tokens and spans with SHA-256: 64 hex digits; the first call reads all of them."""
        if self._digest is not None:
            return self._digest
        sha = hashlib.sha256()
        for name in ("input_ids", "spans"):
            for lists in _columns(self._data, name):
                sha.update(lists.value_lengths().fill_null(0).to_numpy(zero_copy_only=False).astype(np.int64))
                sha.update(lists.flatten().to_numpy(zero_copy_only=False).astype(np.int64))
        self._digest = sha.hexdigest()
        return self._digest

    def largest_token(self) -> int:
        """Return the largest token id; -1 without tokens."""
        import pyarrow.compute

        largest = (pyarrow.compute.max(lists.flatten()).as_py() for lists in _columns(self._data, "input_ids"))
        return max((token for token in largest if token is not None), default=-1)

    def target_tokens(self, members: Sequence[int]) -> int:
        """Count the target tokens of these examples; the first of a sequence is never predicted."""
        return int(self._targets[np.asarray(members, dtype=np.int64)].sum())

    def all_tokens(self, members: Sequence[int]) -> int:
        """Count all tokens of these examples."""
        return int(self.lengths[np.asarray(members, dtype=np.int64)].sum())


def _columns(rows: Any, name: str) -> Iterator[Any]:
    """Yield a column of lists as Arrow arrays, a piece at a time."""
    return (batch[name].combine_chunks() for batch in rows.with_format("arrow").iter(batch_size=100_000))


def _list_lengths(rows: Any, name: str) -> np.ndarray:
    """Measure the list in each row without reading the lists: [rows] int64."""
    pieces = (lists.value_lengths().to_numpy(zero_copy_only=False) for lists in _columns(rows, name))
    return np.concatenate([np.zeros(0, dtype=np.int64), *pieces]).astype(np.int64)


def _spans(labels: Sequence[int]) -> list[int]:
    """Find the spans of labels that are not IGNORED: start, stop, start, stop ..."""
    counts = np.concatenate([[0], np.asarray(labels) != IGNORED, [0]]).astype(np.int8)
    return np.flatnonzero(np.diff(counts)).tolist()
