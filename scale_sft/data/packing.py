"""Pack several examples into one row, so that none sees another.

Position ids restart with each example, and the attention mask is left out. From the restarts, transformers' mask
functions (sdpa, eager, flex) make attention block-diagonal, and flash attention cuts its sequences there.

Shapes: R rows of a micro-batch, L their padded length in tokens, V vocabulary.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor, nn

from scale_sft.errors import UserError
from scale_sft.model.loss import IGNORED

from .examples import Examples
from .micro_batches import Sized, longest_first, micro_batches

Row = list[int]
"""Examples that share a row, in their order."""


def pack(examples: Sized, members: Sequence[int], row_tokens: int) -> list[Row]:
    """Pack rows of at most `row_tokens` tokens, by best fit of the longest first; the same on every rank.

    Rows are in the order of their first member in the batch, so that the first rows are not selected by length.
    """
    from bisect import bisect_left, insort

    rows: list[Row] = []
    open_rows: list[tuple[int, int]] = []  # (free tokens, row), sorted
    for n in longest_first(examples, members):
        length = int(examples.lengths[n])
        place = bisect_left(open_rows, (length, -1))
        free, row = open_rows.pop(place) if place < len(open_rows) else (row_tokens, len(rows))
        if row == len(rows):
            rows.append([])
        rows[row].append(n)
        insort(open_rows, (free - length, row))
    place_of = {n: place for place, n in enumerate(members)}
    return sorted(rows, key=lambda row: min(place_of[n] for n in row))


def packed_micro_batches(
    examples: Sized,
    batch: Sequence[int],
    *,
    row_tokens: int,
    rank: int,
    world_size: int,
    micro_batch_size: int | None,
    first: int | None = None,
) -> list[list[Row]]:
    """Cut the share of one rank in a global batch into micro-batches of packed rows, equally many on every rank.

    `micro_batch_size` counts rows; `first` as in `micro_batches`: the first sequences, packed by themselves, make up
    the first micro-step of all ranks. An empty row stands where the rows do not divide.
    """
    sections = [(batch, micro_batch_size)]
    if first:
        sections = [(batch[:first], None), (batch[first:], micro_batch_size)]
    cuts = []
    for members, size in sections:
        rows = pack(examples, members, row_tokens)
        for places in micro_batches(range(len(rows)), rank, world_size, size):
            cuts.append([[] if place is None else rows[place] for place in places])
    return cuts


def collate_packed(
    examples: Examples, rows: Sequence[Row], pad_id: int, device: torch.device, *, flat: bool = False
) -> dict[str, Tensor]:
    """Packed rows: input_ids, position_ids, labels, each [R, L] int64. No token predicts the start of the next example.

    Args:
        flat: put all rows one after the other into a single one ([1, R * L] without padding), as flash attention wants.
    """
    rows = [[n for row in rows for n in row]] if flat else rows
    pieces = [[examples.tokens(n) for n in row] for row in rows]
    length = max(2, *(sum(len(ids) for ids, _ in row) for row in pieces))
    input_ids = np.full((len(rows), length), pad_id, dtype=np.int64)
    labels = np.full((len(rows), length), IGNORED, dtype=np.int64)
    positions = np.zeros((len(rows), length), dtype=np.int64)
    for row, members in enumerate(pieces):
        start = 0
        for ids, wanted in members:
            stop = start + len(ids)
            input_ids[row, start:stop] = ids
            labels[row, start + 1 : stop] = wanted[1:]
            positions[row, start:stop] = np.arange(len(ids))
            start = stop
        positions[row, start:] = np.arange(length - start)  # padding is a sequence of its own
    on_device = {"input_ids": input_ids, "position_ids": positions}
    batch = {key: torch.from_numpy(value).to(device, non_blocking=True) for key, value in on_device.items()}
    return {**batch, "labels": torch.from_numpy(labels)}


def refuse_unpackable(model: nn.Module) -> None:
    """Refuse a base that cannot tell packed examples apart, as far as its class shows; it needs no weights.

    Raises:
        UserError: its forward pass takes no position_ids, or carries a state from token to token.
    """
    takes = inspect.signature(model.forward).parameters.values()
    follows = any(p.name == "position_ids" or p.kind is p.VAR_KEYWORD for p in takes)
    if follows and not getattr(model, "_is_stateful", False):
        return
    why = "carries a state from each token to the next" if follows else "takes no position_ids"
    raise UserError(
        f"packing: got true, expected false, as {type(model).__name__} {why}, so packed examples would see each other. "
        "Fix: leave it out"
    )


@torch.no_grad()
def refuse_leaks(model: nn.Module, vocabulary: int, device: torch.device, *, flat: bool) -> None:
    """Prove on the loaded model that packed examples do not see each other; a forward pass of a few tokens.

    Raises:
        UserError: the logits of an example change with its neighbour in the row.
    """
    length = 8
    ids = torch.arange(2 * length, device=device).remainder(vocabulary)
    other = torch.cat([ids[:length].flip(0), ids[length:]])
    positions = torch.arange(length, device=device).repeat(2)
    rows = [row[None] if flat else row[None].repeat(2, 1) for row in (ids, other)]
    logits = [
        model(input_ids=row, position_ids=positions.expand_as(row), use_cache=False).logits[:, length:].float()
        for row in rows
    ]
    difference = float((logits[0] - logits[1]).abs().max())
    scale = float(logits[0].abs().max())
    if not math.isfinite(difference) or difference > 1e-3 * max(scale, 1e-6):
        raise UserError(
            f"packing: in this base examples that share a row see each other (logits change by {difference:.2g}); "
            "its attention does not follow position_ids: set packing false, or another attention"
        )
