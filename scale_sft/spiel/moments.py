"""The moments of AdamW, kept in more or fewer bytes per delta; every update itself is computed in fp32.

Shapes: K active entries of a weight. `float32`: what the paper and the traces have. `mixed`: the first moment in bf16;
a gradient that was computed in bf16 has no more digits, and the average forgets within about ten steps. The second
moment stays fp32: at beta2 = 0.999 the steps of a bf16 average are smaller than its spacing, and it would stand still.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor

from .deltas import DeltaStore


class Moment(Protocol):
    """One moment of each delta of a store."""

    def load(self, name: str, part: slice) -> Tensor:
        """[n] fp32, the moments of a part of one weight's entries; to be updated in place and given to `store`."""

    def store(self, name: str, part: slice, values: Tensor) -> None:
        """Keep [n] fp32 for a part of one weight's entries, which begins at a multiple of 256."""

    def state(self, name: str) -> dict[str, Tensor]:
        """What is kept of one weight, by a suffix of its name; views, not copies."""


class DenseMoment:
    """A moment as one flat tensor of a floating-point dtype."""

    def __init__(self, deltas: DeltaStore, dtype: torch.dtype):
        flat = torch.zeros(deltas.active, dtype=dtype, device=deltas.device)
        self._of = dict(zip(deltas.names, flat.split([delta.active for delta in deltas]), strict=True))

    def load(self, name: str, part: slice) -> Tensor:
        return self._of[name][part].float()  # the very memory where it is fp32

    def store(self, name: str, part: slice, values: Tensor) -> None:
        kept = self._of[name][part]
        if kept.data_ptr() != values.data_ptr():
            kept.copy_(values)

    def state(self, name: str) -> dict[str, Tensor]:
        return {"": self._of[name]}


Moments = Callable[[DeltaStore], tuple[Moment, Moment]]
"""Makes the first and the second moment of all deltas, zero."""


def float32_moments(deltas: DeltaStore) -> tuple[Moment, Moment]:
    """8 bytes per delta."""
    return DenseMoment(deltas, torch.float32), DenseMoment(deltas, torch.float32)


def mixed_moments(deltas: DeltaStore) -> tuple[Moment, Moment]:
    """6 bytes per delta: the first in bf16, the second in fp32."""
    return DenseMoment(deltas, torch.bfloat16), DenseMoment(deltas, torch.float32)
