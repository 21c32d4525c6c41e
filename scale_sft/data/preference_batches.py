"""Micro-batches of preferences: several answers in one forward pass, each with its place in it.

    padded       every sequence has a row of its own
    side by side packed rows; position ids restart with each sequence, as in `packing`
    shared       packed rows; both sides of a pair follow their common prompt, which is computed once. An attention mask
                 [R, 1, L, L] hides each side from the other:

                     prompt ... | last prompt token, chosen | last prompt token, rejected

Shapes: R rows of a micro-batch, L their padded length in tokens, T target tokens of all its sequences.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from copy import copy
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from scale_sft.model.loss import IGNORED

from .micro_batches import longest_first, micro_batches
from .packing import packed_micro_batches
from .preferences import Preferences


@dataclass(frozen=True)
class SequenceBatch:
    """Sequences in one forward pass."""

    inputs: dict[str, Tensor]
    """Of the model: input_ids [R, L], and attention_mask or position_ids or both."""
    places: Tensor
    """[T] int64 on the CPU: which of the R * L tokens predict, without repetition, sequence by sequence."""
    targets: Tensor
    """[T] int64 on the CPU: the tokens to predict."""
    sequences: list[int]
    """Numbers of the sequences."""
    counts: list[int]
    """Target tokens of each sequence; they add up to T."""

    @property
    def positions(self) -> int:
        """Tokens that the forward pass computes, padding included."""
        return self.inputs["input_ids"].numel()


@dataclass(frozen=True)
class Layout:
    """How sequences are laid out in rows."""

    row_tokens: int | None = None
    """Pack into rows of so many tokens; None: a row per sequence."""
    shared: bool = False
    """Compute the common prompt of a pair once; only in packed rows."""
    flat: bool = False
    """Put all rows into a single one, as flash attention wants; never with `shared`."""
    additive_mask: torch.dtype | None = None
    """Dtype of an attention mask that is added (eager attention); None: a mask of booleans."""


@dataclass(frozen=True)
class Block:
    """Consecutive tokens of a row: one sequence, or a pair whose common prompt comes once.

    All arrays are over its tokens.
    """

    ids: np.ndarray
    positions: np.ndarray
    parts: np.ndarray
    """0: the common prompt; 1, 2: a side, which sees the prompt and itself."""
    predicts: list[tuple[np.ndarray, np.ndarray]]
    """For each sequence, places that predict and the tokens that they predict."""

    @classmethod
    def of(cls, sequences: Sequence[tuple[np.ndarray, np.ndarray]], shared: int = 0) -> Block:
        """Lay out sequences that begin with the same `shared` tokens, none of which, nor the next, counts."""
        ids, positions, parts, predicts = [sequences[0][0][:shared]], [np.arange(shared)], [np.zeros(shared, int)], []
        start = shared
        for number, (tokens, labels) in enumerate(sequences, start=1):
            wanted = np.flatnonzero(labels[1:] != IGNORED)  # places in the sequence; its first token is never predicted
            predicts.append((wanted - shared + start, tokens[wanted + 1]))
            ids.append(tokens[shared:])
            positions.append(np.arange(shared, len(tokens)))
            parts.append(np.full(len(tokens) - shared, number))
            start += len(tokens) - shared
        return cls(np.concatenate(ids), np.concatenate(positions), np.concatenate(parts), predicts)


@dataclass(frozen=True)
class _Measured:
    """Lengths of some examples as they are laid out, by number."""

    lengths: Any


class PreferenceBatches:
    """Cuts micro-batches from preferences.

    Args:
        examples: what they are cut from.
        layout: of the rows.
        pad_id: token of padding.
        device: where the inputs of the model go.
    """

    def __init__(self, examples: Preferences, layout: Layout, pad_id: int, device: torch.device):
        self.examples, self.layout, self.pad_id, self.device = examples, layout, pad_id, device
        self.sides = examples.trained
        """Which of the two sequences of an example are laid out."""
        self.lengths = examples.lengths
        """Tokens that each example takes in a row, [N] int64."""
        if layout.shared:
            shared = [examples.shared_tokens(n) for n in range(len(examples))]
            self.lengths = self.lengths - np.asarray(shared, dtype=np.int64)

    def mismatched(self) -> PreferenceBatches:
        """Return batches of the other sequence of each example in place of its answers: for kto."""
        made = copy(self)
        made.sides = (1,)
        return made

    def answers(self, example: int) -> list[int]:
        """Return the sequences of an example that are laid out."""
        return [2 * example + side for side in self.sides]

    def of_rank(
        self,
        batch: Sequence[int],
        *,
        rank: int,
        world_size: int,
        micro_batch_size: int | None,
        first: int | None = None,
        keep_order: bool = False,
    ) -> Iterator[SequenceBatch]:
        """Yield the micro-batches of one rank in a global batch; see `batches_of_rank`.

        `micro_batch_size` counts examples, or packed rows.
        """
        if self.layout.row_tokens:
            for rows in packed_micro_batches(
                self if self.sides == self.examples.trained else self._measured(batch),
                batch,
                row_tokens=self.layout.row_tokens,
                rank=rank,
                world_size=world_size,
                micro_batch_size=micro_batch_size,
                first=first,
            ):
                yield self.packed(rows)
            return
        order = batch if keep_order or first else longest_first(self, batch)
        for members in micro_batches(order, rank, world_size, micro_batch_size, first):
            yield self.padded([s for n in members if n is not None for s in self.answers(n)])

    def _measured(self, batch: Sequence[int]) -> _Measured:
        """Take the lengths of mismatched answers, which only their tokens tell."""
        return _Measured({n: sum(len(self.examples.sequence(s)[0]) for s in self.answers(n)) for n in batch})

    def padded(self, sequences: Sequence[int]) -> SequenceBatch:
        """Give each sequence a row of its own, padded on the right."""
        rows = [[Block.of([self.examples.sequence(number)])] for number in sequences]
        batch = self._batch(rows, list(sequences))
        lengths = torch.tensor([len(row[0].ids) for row in rows] or [2])
        mask = torch.arange(batch.inputs["input_ids"].shape[1])[None] < lengths[:, None]
        on_device = mask.long().to(self.device, non_blocking=True)
        return replace(batch, inputs={"input_ids": batch.inputs["input_ids"], "attention_mask": on_device})

    def packed(self, rows: Sequence[Sequence[int]]) -> SequenceBatch:
        """Lay out rows of examples."""
        examples, shared = self.examples, self.layout.shared
        if self.layout.flat:
            rows = [[n for row in rows for n in row]]
        laid, numbers = [], []
        for row in rows:
            blocks = []
            for n in row:
                answers = self.answers(n)
                tokens = [examples.sequence(number) for number in answers]
                blocks += [Block.of(tokens, examples.shared_tokens(n))] if shared else [Block.of([t]) for t in tokens]
                numbers += answers
            laid.append(blocks)
        return self._batch(laid, numbers)

    def _batch(self, rows: Sequence[Sequence[Block]], sequences: list[int]) -> SequenceBatch:
        """Put blocks into padded rows; without any, a short row that counts nowhere."""
        rows = rows or [[]]
        length = max(2, *(sum(len(block.ids) for block in row) for row in rows))
        ids = np.full((len(rows), length), self.pad_id, dtype=np.int64)
        positions, blocks, parts = (np.zeros((len(rows), length), dtype=np.int64) for _ in range(3))
        places, targets = [np.zeros(0, dtype=np.int64)], [np.zeros(0, dtype=np.int64)]
        counts = []
        for r, row in enumerate(rows):
            start = 0
            for number, block in enumerate(row, start=1):
                stop = start + len(block.ids)
                ids[r, start:stop], positions[r, start:stop] = block.ids, block.positions
                blocks[r, start:stop], parts[r, start:stop] = number, block.parts
                for where, what in block.predicts:
                    places.append(r * length + start + where)
                    targets.append(what)
                    counts.append(len(what))
                start = stop
            positions[r, start:] = np.arange(length - start)  # padding is a sequence of its own
        on_device = {"input_ids": torch.from_numpy(ids), "position_ids": torch.from_numpy(positions)}
        inputs = {key: value.to(self.device, non_blocking=True) for key, value in on_device.items()}
        if self.layout.shared:
            of_rows = [torch.from_numpy(values).to(self.device, non_blocking=True) for values in (blocks, parts)]
            inputs["attention_mask"] = block_mask(*of_rows, additive=self.layout.additive_mask)
        predict, predicted = (torch.from_numpy(np.concatenate(values).astype(np.int64)) for values in (places, targets))
        return SequenceBatch(inputs, predict, predicted, sequences, counts)


def block_mask(blocks: Tensor, parts: Tensor, *, additive: torch.dtype | None = None) -> Tensor:
    """Make the attention mask of rows of blocks: a token sees what comes before it in the prompt and in its own side.

    Args:
        blocks: [R, L] int64, number of the block in its row; 0: padding.
        parts: [R, L] int64, 0 for the common prompt, otherwise the side.
        additive: dtype of a mask to be added to attention scores; None: booleans, True where a token is seen.

    Returns:
        [R, 1, L, L].
    """
    length = blocks.shape[1]
    seen = torch.ones(length, length, dtype=torch.bool, device=blocks.device).tril()
    seen = seen & (blocks[:, :, None] == blocks[:, None, :])
    seen &= (parts[:, None, :] == 0) | (parts[:, :, None] == parts[:, None, :])
    if additive is None:
        return seen[:, None]
    hidden = torch.zeros(seen.shape, dtype=additive, device=seen.device)
    return hidden.masked_fill_(~seen, torch.finfo(additive).min)[:, None]
