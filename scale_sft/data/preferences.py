"""Examples of preferences: pairs of answers to one prompt, or single answers with a mark.

Every example has two sequences, 2n and 2n + 1. Of a pair they are the chosen and the rejected side. Of a marked answer
they are the answer, and that of the nearest example before it with another prompt, under this prompt: its
log-probability estimates the KL divergence of KTO (section 4.1 of Ethayarajh et al., 2024).
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any

import numpy as np

from scale_sft.errors import UserError
from scale_sft.model.loss import IGNORED

from .examples import Examples
from .preference_formats import DROPPED

Tokens = tuple[np.ndarray, np.ndarray]
"""Input ids and labels (IGNORED where a token does not count)."""
_REACH = 64
"""Examples that are searched for another prompt."""


class Preferences(Examples):
    """Examples of two sequences each, over rows that stay on disk."""

    sequence_lengths: np.ndarray
    """Tokens of each sequence, [2N] int64."""
    target_counts: np.ndarray
    """Target tokens of each sequence, [2N] int64."""
    trained: tuple[int, ...]
    """Which of the two sequences have a gradient."""
    drops: dict[str, int]
    """How many examples were left out, by reason."""

    @property
    def sequences(self) -> int:
        """Count the sequences, 2N."""
        return 2 * len(self)

    def sequence(self, number: int) -> Tokens:
        """Return input ids and labels of one sequence."""
        raise NotImplementedError

    def shared_tokens(self, example: int) -> int:
        """Count the tokens at the beginning of both answers that can be computed once.

        They are the same in both, and neither they nor the token after them, which each side repeats, count.
        """
        return 0


class Pairs(Preferences):
    """Pairs of answers: `tokens` gives the chosen side, lengths and counts are those of both."""

    trained = (0, 1)

    def __init__(self, rows: Any, source: str, notes: tuple[str, ...] = ()):
        super().__init__(rows, source, notes)
        self.sequence_lengths, self.target_counts = self.lengths, self._targets
        self.lengths = self.sequence_lengths.reshape(-1, 2).sum(1)
        self._targets = self.target_counts.reshape(-1, 2).sum(1)
        self.dropped //= 2
        self.drops = _drops(rows, "dropped_for", 2)
        numbers = np.asarray(rows.with_format("numpy")["shared"][:], dtype=np.int64)
        self._shared = numbers[self._kept][::2]

    def __len__(self) -> int:
        return len(self._kept) // 2

    def sequence(self, number: int) -> Tokens:
        """Return the chosen (2n) or the rejected side (2n + 1) of pair n."""
        return super().tokens(number)

    def tokens(self, n: int) -> Tokens:
        """Return input ids and labels of the chosen side."""
        return self.sequence(2 * n)

    def shared_tokens(self, example: int) -> int:
        """Count the tokens of the common prompt but its last: that one predicts the first token of each side."""
        return int(self._shared[example])

    def subset(self, members: Sequence[int]) -> Pairs:
        """Return some of these pairs, in the order given."""
        places = np.asarray([2 * n + side for n in members for side in (0, 1)], dtype=np.int64)
        return Pairs(self._data.select(self._kept[places]), self.source, self.notes)


class Marked(Preferences):
    """Single answers, each marked as good or bad."""

    trained = (0,)

    def __init__(self, rows: Any, source: str, notes: tuple[str, ...] = ()):
        super().__init__(rows, source, notes)
        self.drops = _drops(rows, "dropped_for", 1)
        labels = np.asarray(rows.with_format("numpy")["label"][:], dtype=np.int64)
        self.good = labels[self._kept] == 1
        """Whether each answer is good, [N]."""
        if len(self) == 1:
            raise UserError(f"data: {source}: got 1 example, expected at least 2 for objective kto. Fix: add more")
        self.sequence_lengths = np.repeat(self.lengths, 2)  # of a mismatched one, about: enough to sort by
        self.target_counts = np.repeat(self._targets, 2)  # of its own answers; nobody asks for the others'
        self._longest = int(self.lengths.max(initial=0))  # as the data are cut
        self._partners: dict[int, int] = {}  # found so far: see `_of_another_prompt`

    def sequence(self, number: int) -> Tokens:
        """Return the answer of an example (2n), or a mismatched one under its prompt (2n + 1)."""
        example, mismatched = divmod(number, 2)
        if not mismatched:
            return self.tokens(example)
        prompt = _prompt(self.tokens(example))
        if example not in self._partners:
            self._partners[example] = self._of_another_prompt(example, prompt)
        others, wanted = self.tokens(self._partners[example])
        start = _first_target(wanted)
        ids = np.concatenate([prompt, others[start:]])[: self._longest]
        return ids, np.concatenate([np.full(len(prompt), IGNORED), wanted[start:]])[: self._longest]

    def _of_another_prompt(self, example: int, prompt: np.ndarray) -> int:
        """Find the nearest example before one whose prompt differs; the one before it if none in reach does.

        Answers to one prompt often follow each other, and an answer to the same prompt would not be mismatched.
        """
        for back in range(1, min(len(self), _REACH + 1)):
            other = (example - back) % len(self)
            if not np.array_equal(_prompt(self.tokens(other)), prompt):
                return other
        return (example - 1) % len(self)

    def digest(self) -> str:
        """Hash all tokens, spans and marks with SHA-256: 64 hex digits."""
        return hashlib.sha256(super().digest().encode() + self.good.tobytes()).hexdigest()

    def right_answers(self) -> Examples:
        """Return the good answers; all if none is good."""
        kept = self._kept[self.good] if self.good.any() else self._kept
        return Examples(self._data.select(kept), self.source, self.notes)

    def subset(self, members: Sequence[int]) -> Marked:
        """Return some of these examples, in the order given."""
        return Marked(self._data.select(self._kept[np.asarray(members, dtype=np.int64)]), self.source, self.notes)


def _prompt(tokens: Tokens) -> np.ndarray:
    ids, labels = tokens
    return ids[: _first_target(labels)]


def _first_target(labels: np.ndarray) -> int:
    return int(np.flatnonzero(labels != IGNORED)[0])


def _drops(rows: Any, column: str, per_example: int) -> dict[str, int]:
    """Count the examples that were left out by reason."""
    reasons = np.asarray(rows.with_format("numpy")[column][:], dtype=np.int64)
    counts = np.bincount(reasons, minlength=len(DROPPED)) // per_example
    return {reason: int(count) for reason, count in zip(DROPPED, counts, strict=True) if reason and count}


KINDS: dict[str, type[Examples]] = {"sft": Examples, "pairs": Pairs, "marked": Marked}
"""Classes of examples by the kind that an objective learns from."""


def kind_of(objective: str) -> str:
    """Return the kind of examples that an objective learns from."""
    return {"sft": "sft", "kto": "marked"}.get(objective, "pairs")
