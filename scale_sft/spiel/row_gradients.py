"""Gradients of embeddings: the rows of the tokens in a batch, never the whole [V, H].

Such a gradient is E^T dY with a one-hot factor E [T, V], which is given by the places of its ones: token ids [T].
Shapes: T tokens; V rows, H columns of a weight; n rows of a batch's tokens on this process, m on all of them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .indices import Entries

Sum = Callable[[Tensor], None]
"""Sums a contiguous tensor over all processes, in place."""


class RowGradient:
    """The gradient of an embedding in one backward pass; rows of other tokens are 0 and take no memory.

    Args:
        ids: [T] int64, the row that each token looked up.
        gradient: [T, H] of the looked-up rows.
        rows: V.
    """

    def __init__(self, ids: Tensor, gradient: Tensor, rows: int):
        self.shape = (rows, gradient.shape[1])
        self.met = torch.zeros(rows, dtype=torch.bool, device=ids.device).index_fill_(0, ids, True)
        """[V] bool: the rows of the batch's tokens."""
        self._place = self.met.cumsum(0).sub_(1).clamp_(min=0)  # [V] int64: of a row among those met
        held = max(1, min(ids.numel(), rows))  # n or more: to count them, the host would wait for the device
        self._values = torch.zeros(held, self.shape[1], dtype=torch.float32, device=ids.device)
        self._values.index_add_(0, self._place.index_select(0, ids), gradient.float())

    def rows(self) -> Tensor:
        """List the rows met: [n] int64, sorted; the host waits for the device."""
        return self.met.nonzero().squeeze(1)

    def any(self) -> bool:
        """Return True unless every entry is 0."""
        return bool(self._values.any())

    def pick(self, wanted: Sequence[tuple[Entries, Tensor]]) -> None:
        """Add the gradient of some entries to each `out` [K]; entries in other rows get nothing."""
        values, width = self._values.view(-1), self.shape[1]
        for entries, out in wanted:
            for part, row, column in entries.coordinates():
                places = self._place.index_select(0, row).mul_(width).add_(column)
                found = values.index_select(0, places)
                out[part] += torch.where(self.met.index_select(0, row), found, 0.0).to(out.dtype)

    def add_to(self, dense: Tensor) -> Tensor:
        """Add to a dense gradient [V, H], in place; returns it."""
        rows = self.rows()
        return dense.index_add_(0, rows, self._values[: rows.numel()].to(dense.dtype))

    def dense(self) -> Tensor:
        """Make the whole gradient: [V, H] fp32."""
        return self.add_to(torch.zeros(self.shape, dtype=torch.float32, device=self._values.device))

    def union(self, sum_: Sum) -> Rows:
        """List the rows that any process has met, with this process's summand of their gradient."""
        counts = self.met.float()
        sum_(counts)
        rows = counts.nonzero().squeeze(1)
        values = self._values.index_select(0, self._place.index_select(0, rows))
        return Rows(rows, values.mul_(self.met.index_select(0, rows)[:, None]), self.shape)


@dataclass(frozen=True)
class Rows:
    """Some rows of a weight, and their gradient. Their entries, one after the other, are m * H `compact` places."""

    rows: Tensor  # [m] int64, sorted
    values: Tensor  # [m, H] fp32
    shape: tuple[int, int]  # (V, H)

    def flat(self, compact: Tensor) -> Tensor:
        """Turn compact places [C] int64 into flat indices of the weight, in the same order."""
        width = self.shape[1]
        row = torch.div(compact, width, rounding_mode="floor")
        return self.rows.index_select(0, row).mul_(width).add_(compact - row * width)

    def choose(self, select: Callable[[Tensor, int], Tensor], count: int, keys: Tensor | None = None) -> Tensor:
        """Choose `count` (C) entries of the weight, the largest of these rows.

        If these rows have fewer entries, others fill up, the first ones: their gradient is 0, and so they do not grow.

        Args:
            select: (keys, c) -> [c] places of the largest, sorted int64; 0 <= c <= m * H.
            count: C, at most V * H.
            keys: what to choose by, of the compact places; None: the gradient.

        Returns:
            Flat indices [C] int64, sorted; [0] if `select` finds none, because all of the gradient is 0.
        """
        chosen = self.flat(select(self.values.reshape(-1) if keys is None else keys, min(count, self.values.numel())))
        missing = count - chosen.numel()
        if not missing or not chosen.numel():
            return chosen
        free = torch.ones(count, dtype=torch.bool, device=chosen.device)
        free[chosen[chosen < count]] = False
        return torch.cat((chosen, free.nonzero().squeeze(1)[:missing])).sort().values


class Pending:
    """Dense gradients of weights whose backward pass brings them in several parts, until the last part is there."""

    def __init__(self) -> None:
        self._sums: dict[str, Tensor] = {}

    def __contains__(self, name: str) -> bool:
        return name in self._sums

    def clear(self) -> None:
        """Forget parts whose last one never came."""
        self._sums.clear()

    def add(self, name: str, part: Tensor | RowGradient, *, more: bool) -> Tensor | None:
        """Add one part; returns the whole gradient [R, C] with the last one, which may be `part` itself.

        Args:
            name: of the weight.
            part: [R, C], or some of its rows. It may be overwritten after the call.
            more: others follow.
        """
        total = self._sums.pop(name, None)
        if total is None:
            if isinstance(part, Tensor) and not more:
                return part
            total = part.clone() if isinstance(part, Tensor) else part.dense()
        elif isinstance(part, Tensor):
            total += part
        else:
            part.add_to(total)
        if not more:
            return total
        self._sums[name] = total
        return None
