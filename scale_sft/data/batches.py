"""From examples to batches: an order that depends on nothing but seed and step, cut into ranks and micro-batches.

Shapes: B sequences of a micro-batch, L their padded length in tokens.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from scale_sft.spiel.seeding import seeded_generator

from .examples import Examples
from .micro_batches import collate, longest_first, micro_batches
from .packing import collate_packed, packed_micro_batches


@dataclass(frozen=True)
class BatchOrder:
    """The examples of each global batch: epochs one after the other, each shuffled by (seed, epoch).

    A batch may run over the end of an epoch; only the last batch of a run of whole epochs can be smaller.
    """

    examples: int
    global_batch_size: int
    seed: int
    total_examples: int | None = None  # where the run stops, in examples seen; None: never
    _orders: dict[int, Tensor] = field(default_factory=dict, init=False, repr=False, compare=False)  # the last epoch's

    def steps(self) -> int:
        """Count the optimizer steps until `total_examples` have been seen."""
        assert self.total_examples is not None, "a run without an end has no number of steps"
        return math.ceil(self.total_examples / self.global_batch_size)

    def batch(self, step: int) -> list[int]:
        """Return the examples of global batch `step` (counted from 1)."""
        first = (step - 1) * self.global_batch_size
        last = first + self.global_batch_size
        if self.total_examples is not None:
            last = min(last, self.total_examples)
        return [int(self._epoch(place // self.examples)[place % self.examples]) for place in range(first, last)]

    def _epoch(self, epoch: int) -> Tensor:
        if epoch not in self._orders:
            order = torch.randperm(self.examples, generator=seeded_generator(self.seed, "data order", str(epoch)))
            self._orders.clear()
            self._orders[epoch] = order
        return self._orders[epoch]


def batches_of_rank(
    examples: Examples,
    batch: Sequence[int],
    *,
    rank: int,
    world_size: int,
    micro_batch_size: int | None,
    first: int | None,
    keep_order: bool,
    row_tokens: int | None,
    flat: bool,
    pad_id: int,
    device: torch.device,
) -> Iterator[dict[str, Tensor]]:
    """Yield the micro-batches of one rank in a global batch, ready for the model.

    Args:
        first: sequences, over all ranks, of the first micro-step; None: as many as in any other.
        keep_order: leave the sequences in the order of the batch; otherwise those of similar length meet in a
            micro-batch. Only the order inside the global batch changes, which the loss does not depend on.
        row_tokens: pack into rows of so many tokens; None: one sequence per row.
    """
    if row_tokens:
        for rows in packed_micro_batches(
            examples,
            batch,
            row_tokens=row_tokens,
            rank=rank,
            world_size=world_size,
            micro_batch_size=micro_batch_size,
            first=first,
        ):
            yield collate_packed(examples, rows, pad_id, device, flat=flat)
        return
    order = batch if keep_order or first else longest_first(examples, batch)
    for members in micro_batches(order, rank, world_size, micro_batch_size, first):
        yield collate(examples, members, pad_id, device)
