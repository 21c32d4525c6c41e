"""The processes that choose together, each of which holds a part of every gradient.

Shapes: N entries of a weight; W processes, each with n = ceil(N / W) of them (the last ones may have fewer).
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Protocol

from torch import Tensor

from ..topk import largest_magnitudes

ReadWeight = Callable[[str], AbstractContextManager[Tensor]]
"""Yields a whole weight, N entries, for the length of a `with` block; all processes call it together."""


class Parts(Protocol):
    """The processes that choose together. All of them make the same calls in the same order."""

    def range_of(self, n: int) -> slice:
        """Return the entries of a weight of `n` that belong to this process."""

    def own_part(self, gradient: Tensor) -> Tensor:
        """Sum a gradient [N] over the processes; returns this one's part [n], in fp32 if there are several."""

    def sum_(self, flat: Tensor, purpose: str = "gradients") -> None:
        """Sum a contiguous tensor over the processes, in place; its traffic counts as `purpose`."""

    def choose(self, keys: Tensor, n: int, count: int) -> Tensor:
        """Find the largest of all parts' keys [n] fp32: [count] int64 flat, sorted; ties to the smaller index.

        [0] if all keys are 0: nothing tells which are better.
        """

    def join(self, keys: Tensor, n: int) -> Tensor:
        """Put all parts' keys together: [N]."""


class WholeParts:
    """One process, which holds every gradient whole: an implementation of `Parts`."""

    def range_of(self, n: int) -> slice:
        return slice(0, n)

    def own_part(self, gradient: Tensor) -> Tensor:
        return gradient

    def sum_(self, flat: Tensor, purpose: str = "gradients") -> None:
        """Leave it as it is."""

    def choose(self, keys: Tensor, n: int, count: int) -> Tensor:
        return largest_magnitudes(keys, count)

    def join(self, keys: Tensor, n: int) -> Tensor:
        return keys
