"""Cut a global batch into ranks and micro-batches; pad sequences of similar length together.

Shapes: B sequences of a micro-batch, L their padded length in tokens.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from scale_sft.model.loss import IGNORED

from .examples import Examples


def micro_batches(
    batch: Sequence[int], rank: int, world_size: int, micro_batch_size: int | None, first: int | None = None
) -> list[list[int | None]]:
    """Cut the share of one rank in a global batch into micro-batches, equally many on every rank.

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
    """Collate a micro-batch, padded on the right: input_ids, attention_mask, labels, each [B, L] int64.

    The labels stay on the CPU, which finds the targets among them. A member None becomes a short sequence without
    target tokens.
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
    on_device = {"input_ids": input_ids, "attention_mask": mask}
    return {**{key: value.to(device, non_blocking=True) for key, value in on_device.items()}, "labels": labels}


class Sized(Protocol):
    """Examples of known lengths in tokens, [N] int64."""

    @property
    def lengths(self) -> np.ndarray: ...


def longest_first(examples: Sized, members: Sequence[int]) -> list[int]:
    """Sort examples, longest first: neighbours then have similar lengths, which saves padding."""
    return sorted(members, key=lambda n: (-examples.lengths[n], n))


def by_length(examples: Examples, size: int) -> Iterator[list[int]]:
    """Yield all examples in groups of `size`, longest first; the order does not depend on ranks."""
    order = longest_first(examples, range(len(examples)))
    for start in range(0, len(order), size):
        yield order[start : start + size]
