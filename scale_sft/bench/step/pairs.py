"""Define the common ground of a race on pairs: random pairs of answers, the same for all contestants.

Every side of a pair has as many tokens as a sequence of the case: the first half is the prompt of both sides, the rest
is an answer that ends with the end of a text. Nothing is padded.
"""

from __future__ import annotations

import datasets
import torch
from torch import Tensor

from scale_sft.data.examples import Examples
from scale_sft.data.micro_batches import collate
from scale_sft.data.preferences import Pairs
from scale_sft.model.loss import IGNORED
from scale_sft.spiel.seeding import seeded_generator

from ..workload import Case

SHORTEST = 4
"""Tokens of a side, at least: two of the prompt, one of the answer, and the end."""


class PairBatches:
    """Micro-batches of random pairs, and of the same sequences as examples of sft.

    Args:
        vocabulary: tokens of the model; the last two end a text and pad.
        distinct: micro-batches before they repeat.
    """

    def __init__(self, case: Case, vocabulary: int, device: torch.device, distinct: int = 4):
        self.device, self.distinct, self.size = device, distinct, case.micro_batch // 2
        self.prompt_tokens, self.pad, self.end = case.length // 2, vocabulary - 2, vocabulary - 1
        answer_tokens = case.length - self.prompt_tokens - 1
        generator, pairs = seeded_generator(case.seed, "benchmark of pairs"), distinct * self.size
        draw = lambda tokens, count: torch.randint(self.pad, (pairs, count, tokens), generator=generator).tolist()
        prompts, answers = draw(self.prompt_tokens, 1), draw(answer_tokens, 2)
        for chosen, rejected in answers:  # a prompt ends where the sides differ
            rejected[0] = (rejected[0] + (rejected[0] == chosen[0])) % self.pad
        self.texts = [(prompt, *sides) for (prompt,), sides in zip(prompts, answers, strict=True)]
        """Prompt, chosen and rejected answer of each pair, without the end."""
        tokens = [[*prompt, *side, self.end] for (prompt, *sides) in self.texts for side in sides]
        labels = [[IGNORED] * self.prompt_tokens + row[self.prompt_tokens :] for row in tokens]
        self.sequences = Examples.from_lists(tokens, labels, "random pairs")
        self.pairs = _pairs(tokens, self.prompt_tokens)

    def members(self, number: int) -> list[int]:
        """Return the pairs of micro-batch `number`."""
        first = number % self.distinct * self.size
        return list(range(first, first + self.size))

    def take(self, number: int) -> dict[str, Tensor]:
        """Return micro-batch `number` as sequences of sft: input_ids, attention_mask, labels, each [B, L] int64."""
        first = 2 * self.members(number)[0]
        return collate(self.sequences, range(first, first + 2 * self.size), self.pad, self.device)

    @property
    def target_tokens(self) -> int:
        """The target tokens of one micro-batch: those of all answers."""
        return self.sequences.target_tokens(range(2 * self.size))


def _pairs(tokens: list[list[int]], prompt_tokens: int) -> Pairs:
    """Make pairs from sequences, chosen and rejected in turn; the last token of the prompt is not shared."""
    count, length = len(tokens), len(tokens[0])
    columns = {
        "input_ids": tokens,
        "spans": [[prompt_tokens, length]] * count,
        "targets": [length - prompt_tokens] * count,
        "length": [length] * count,
        "dropped_for": [0] * count,
        "shared": [prompt_tokens - 1] * count,
    }
    return Pairs(datasets.Dataset.from_dict(columns), "random pairs")
