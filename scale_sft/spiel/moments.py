"""Storage formats for AdamW's moments, of different bytes per delta; the update itself is always computed in fp32.

Shapes: K active entries of a weight. `float32`: as in the paper and the traces. `mixed`: the first moment in bf16; a
gradient computed in bf16 has no more digits, and the average forgets within about ten steps. The second moment stays
fp32: at beta2 = 0.999 the changes of a bf16 average are smaller than its spacing, so it would not move at all.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor

from .deltas import DeltaStore


class Moment(Protocol):
    """One moment of each delta of a store."""

    crosses_weights: bool
    """Whether a part of the entries may belong to several weights."""

    def load(self, part: slice) -> Tensor:
        """Return the moments of a part of all entries, [n] fp32, to update in place and pass to `store`."""

    def store(self, part: slice, values: Tensor) -> None:
        """Store [n] fp32 for a part of all entries.

        Where parts may not cross weights, this one begins at a multiple of 256 entries of its weight.
        """

    def state(self, name: str) -> dict[str, Tensor]:
        """Return the stored tensors of one weight, by a suffix of their name: views, not copies."""


class DenseMoment:
    """A moment as one flat tensor of a floating-point dtype."""

    crosses_weights = True

    def __init__(self, deltas: DeltaStore, dtype: torch.dtype):
        self._flat = torch.zeros(deltas.active, dtype=dtype, device=deltas.device)
        self._of = dict(zip(deltas.names, self._flat.split([delta.active for delta in deltas]), strict=True))

    def load(self, part: slice) -> Tensor:
        return self._flat[part].float()  # the stored memory itself if it is fp32

    def store(self, part: slice, values: Tensor) -> None:
        kept = self._flat[part]
        if kept.data_ptr() != values.data_ptr():
            kept.copy_(values)

    def state(self, name: str) -> dict[str, Tensor]:
        return {"": self._of[name]}


Moments = Callable[[DeltaStore], tuple[Moment, Moment]]
"""Creates the first and the second moment of all deltas, zero."""


def float32_moments(deltas: DeltaStore) -> tuple[Moment, Moment]:
    """Create both moments in fp32: 8 bytes per delta."""
    return DenseMoment(deltas, torch.float32), DenseMoment(deltas, torch.float32)


def mixed_moments(deltas: DeltaStore) -> tuple[Moment, Moment]:
    """Create the first moment in bf16, the second in fp32: 6 bytes per delta."""
    return DenseMoment(deltas, torch.bfloat16), DenseMoment(deltas, torch.float32)
