"""From examples to batches: an order that depends on nothing but seed and step, cut into ranks and micro-batches.

Shapes: B sequences of a micro-batch, L their padded length in tokens.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .spiel.delta import seeded_generator

IGNORED = -100
"""Label of a token that does not count."""


class Examples:
    """Tokenised examples over a `datasets.Dataset` that stays on disk; only their lengths are in memory.

    Args:
        rows: columns input_ids, spans (start, stop, start, stop ... of the tokens that count), length (before it was
            cut to max_length) and targets (how many tokens count; rows with 0 are left out).
        source: where they come from, for messages.
    """

    def __init__(self, rows: Any, source: str):
        self.source = source
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
        """Input ids and labels (IGNORED where a token does not count) of one example: two [length] integers."""
        row = self._rows[int(self._kept[n])]
        ids = np.asarray(row["input_ids"])
        labels = np.full(len(ids), IGNORED, dtype=np.int64)
        for start, stop in np.asarray(row["spans"], dtype=np.int64).reshape(-1, 2):
            labels[start:stop] = ids[start:stop]
        return ids, labels

    def subset(self, members: Sequence[int]) -> Examples:
        """Some of these examples, in the order given."""
        return Examples(self._data.select(self._kept[np.asarray(members, dtype=np.int64)]), self.source)

    def digest(self) -> str:
        """SHA-256 over all tokens and spans: 64 hex digits."""
        sha = hashlib.sha256()
        for name in ("input_ids", "spans"):
            for lists in _columns(self._data, name):
                sha.update(lists.value_lengths().fill_null(0).to_numpy(zero_copy_only=False).astype(np.int64))
                sha.update(lists.flatten().to_numpy(zero_copy_only=False).astype(np.int64))
        return sha.hexdigest()

    def target_tokens(self, members: Sequence[int]) -> int:
        """How many tokens of these examples count; the first of a sequence is never predicted."""
        return int(self._targets[np.asarray(members, dtype=np.int64)].sum())

    def all_tokens(self, members: Sequence[int]) -> int:
        """How many tokens these examples have."""
        return int(self.lengths[np.asarray(members, dtype=np.int64)].sum())


def _columns(rows: Any, name: str) -> Iterator[Any]:
    """A column of lists as Arrow arrays, a piece at a time."""
    return (batch[name].combine_chunks() for batch in rows.with_format("arrow").iter(batch_size=100_000))


def _list_lengths(rows: Any, name: str) -> np.ndarray:
    """Length of the list in each row, without reading the lists: [rows] int64."""
    pieces = (lists.value_lengths().to_numpy(zero_copy_only=False) for lists in _columns(rows, name))
    return np.concatenate([np.zeros(0, dtype=np.int64), *pieces]).astype(np.int64)


def _spans(labels: Sequence[int]) -> list[int]:
    """Where labels are not IGNORED: start, stop, start, stop ..."""
    counts = np.concatenate([[0], np.asarray(labels) != IGNORED, [0]]).astype(np.int8)
    return np.flatnonzero(np.diff(counts)).tolist()


@dataclass(frozen=True)
class BatchOrder:
    """Which examples make up each global batch: epochs, each shuffled by (seed, epoch), one after the other.

    A batch may run over the end of an epoch; only the last batch of a run of whole epochs can be smaller.
    """

    examples: int
    global_batch_size: int
    seed: int
    total_examples: int | None = None  # where the run stops, in examples seen; None: never

    def steps(self) -> int:
        """Optimizer steps until `total_examples` have been seen."""
        return math.ceil(self.total_examples / self.global_batch_size)

    def batch(self, step: int) -> list[int]:
        """Examples of global batch `step` (counted from 1)."""
        first = (step - 1) * self.global_batch_size
        last = first + self.global_batch_size
        if self.total_examples is not None:
            last = min(last, self.total_examples)
        return [int(self._epoch(place // self.examples)[place % self.examples]) for place in range(first, last)]

    def _epoch(self, epoch: int) -> Tensor:
        if self._cache.get("epoch") != epoch:
            order = torch.randperm(self.examples, generator=seeded_generator(self.seed, "data order", str(epoch)))
            self._cache.update(epoch=epoch, order=order)
        return self._cache["order"]

    def __post_init__(self):
        object.__setattr__(self, "_cache", {})


def micro_batches(
    batch: Sequence[int], rank: int, world_size: int, micro_batch_size: int | None, first: int | None = None
) -> list[list[int | None]]:
    """The share of one rank in a global batch, cut into micro-batches; as many on every rank.

    Sequence n goes to rank n % world_size, so that the first sequences are spread evenly. Where the batch does not
    divide, None stands for a sequence that does not count. `first`: sequences, over all ranks, of the first
    micro-step (where they propose candidates), instead of micro_batch_size per rank.
    """
    sections = [(batch, micro_batch_size)]
    if first:
        sections = [(batch[:first], math.ceil(first / world_size)), (batch[first:], micro_batch_size)]
    cuts = []
    for members, size in sections:
        share: list[int | None] = list(members[rank::world_size])
        share += [None] * (math.ceil(len(members) / world_size) - len(share))
        size = size or len(share) or 1
        cuts += [share[start : start + size] for start in range(0, len(share), size)]
    return cuts


def collate(examples: Examples, members: Sequence[int | None], pad_id: int, device: torch.device) -> dict[str, Tensor]:
    """A micro-batch, padded on the right: input_ids, attention_mask, labels, each [B, L] int64.

    A member None becomes a short sequence of which no token counts.
    """
    nothing = (np.full(2, pad_id), np.full(2, IGNORED))
    rows = [nothing if n is None else examples.tokens(n) for n in members]
    length = max(len(ids) for ids, _ in rows)
    input_ids = torch.full((len(rows), length), pad_id, dtype=torch.int64)
    labels = torch.full((len(rows), length), IGNORED, dtype=torch.int64)
    mask = torch.zeros((len(rows), length), dtype=torch.int64)
    for row, (ids, wanted) in enumerate(rows):
        input_ids[row, : len(ids)] = torch.from_numpy(ids.astype(np.int64))
        labels[row, : len(wanted)] = torch.from_numpy(wanted.astype(np.int64))
        mask[row, : len(ids)] = 1
    batch = {"input_ids": input_ids, "attention_mask": mask, "labels": labels}
    return {key: value.to(device, non_blocking=True) for key, value in batch.items()}


def longest_first(examples: Examples, members: Sequence[int]) -> list[int]:
    """The same examples, longest first: neighbours have similar lengths, so that little is padded."""
    return sorted(members, key=lambda n: (-examples.lengths[n], n))


def by_length(examples: Examples, size: int) -> Iterator[list[int]]:
    """All examples in groups of `size`, longest first; the order does not depend on ranks."""
    order = longest_first(examples, range(len(examples)))
    for start in range(0, len(order), size):
        yield order[start : start + size]
