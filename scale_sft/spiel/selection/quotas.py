"""Choose entries under caps for each row and column, so that they stay spread.

Shapes: O rows, I columns of a weight, N = O * I; K entries to choose.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..topk import top_k_sorted


def choose_within(keys: Tensor, count: int, in_row: int, in_column: int) -> Tensor:
    """Choose `count` entries with large keys, at most `in_row` in a row and `in_column` in a column.

    In rounds: in each row, the best entries that still fit; of these, in each column the best that still fit; of
    these, the best of all until `count` is reached. Rounds repeat on what is left. With one cap this is the best choice
    possible; with two it is a good one. Ties go to the smaller index; NaN ranks below any number.

    Args:
        keys: [O, I] fp32, not negative.
        count: K.
        in_row, in_column: at least 1.

    Returns:
        [K] int64 flat indices, sorted.

    Raises:
        ValueError: the caps leave no place for `count` entries.
    """
    rows, columns = keys.shape
    left = torch.where(keys.isnan(), -0.5, keys)  # taken or full: -1
    in_rows = torch.full((rows,), in_row, device=keys.device)
    in_columns = torch.full((columns,), in_column, device=keys.device)
    chosen = torch.zeros(rows * columns, dtype=torch.bool, device=keys.device)
    missing = count
    while missing:
        left[in_rows == 0] = -1
        left[:, in_columns == 0] = -1
        survivors = torch.where(_rank(left, 1) < in_rows[:, None], left, -1)
        survivors = torch.where(_rank(survivors, 0) < in_columns[None, :], survivors, -1).view(-1)
        open_places = (survivors >= -0.5).nonzero().squeeze(1)
        if not open_places.numel():
            raise ValueError(
                f"quota: got at most {in_row} entries in a row and {in_column} in a column, which hold "
                f"{count - missing} of {count} entries of a [{rows}, {columns}] weight"
            )
        taken = open_places[top_k_sorted(survivors[open_places], min(missing, open_places.numel()))]
        chosen[taken] = True
        left.view(-1)[taken] = -1
        in_rows -= torch.bincount(taken // columns, minlength=rows)
        in_columns -= torch.bincount(taken % columns, minlength=columns)
        missing -= taken.numel()
    return chosen.nonzero().squeeze(1)


def _rank(values: Tensor, dim: int) -> Tensor:
    """Rank values [O, I] along `dim` from the largest, 0, down; ties in the order of indices: [O, I] int64."""
    order = values.argsort(dim=dim, descending=True, stable=True)
    places = torch.arange(values.shape[dim], device=values.device)
    return torch.empty_like(order).scatter_(dim, order, (places[:, None] if dim == 0 else places).expand_as(order))
