"""The settings of a `SparseFineTuning`, and the back ends that compute it.

Shapes: O rows, I columns of a weight; K active entries, C candidates, k up for replacement.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

from . import drop_grow as in_torch
from .drop_grow import Exchange
from .moments import Moments, float32_moments
from .optimizers import Growth
from .recorder import Products, Select
from .row_gradients import Sum
from .selection.proposals import Proposals
from .topk import largest_magnitudes


@dataclass(frozen=True, kw_only=True)
class MethodSettings:
    """The method's settings, independent of hardware. Lengths and dates are in the schedule."""

    method: str = "ag"
    """`ag` (SFT-AG), `ma` (SFT-MA), `static` (chosen once) or `random` (chosen once from a seed)."""
    betas: tuple[float, float] = (0.9, 0.999)
    """Decay rates of AdamW's moments (all but `ma`)."""
    eps: float = 1e-8
    """Added to AdamW's denominator, or under SM3's root (`ma`)."""
    weight_decay: float = 0.0
    """Decoupled decay of the deltas towards zero."""
    candidate_ratio: float = 1.0
    """C / K: candidates for growth per active entry."""
    drop_criterion: str = "magnitude"
    """`magnitude`; `age`, magnitude per step since it was grown; or `change` since the last reallocation, for which the
    store must keep a reference."""
    exchange_if_better: bool = False
    """Replace an entry only by a candidate with a larger gradient, or key, than its own (`ag`, `static`)."""
    growth: Growth = field(default_factory=Growth)
    """How newly grown entries begin (`ag`, `static`)."""
    scale_rates: bool = False
    """Scale each entry's updates by (entries in its row x entries in its column)^-1/4, with mean 1 in each weight."""
    seed: int = 0
    """Of what is left to chance after the first choice: the signs of sketches, where whole columns or rows move."""
    max_grad_norm: float | None = None
    """Clip the norm of all active gradients to this, and scale candidates by the same factor; None: never."""


class Exchanges(Protocol):
    """Drop and grow for one weight: the functions of `drop_grow`, or others with the same results."""

    def exchange_by_gradient(
        self, indices: Tensor, scores: Tensor, candidates: Tensor, mean: Tensor, k: int
    ) -> Exchange: ...

    def exchange_by_accumulators(
        self, indices: Tensor, scores: Tensor, row: Tensor, col: Tensor, k: int
    ) -> Exchange: ...


@dataclass(frozen=True, kw_only=True)
class Backends:
    """The implementations to compute with, and the dtypes they store. The defaults are plain torch in one process."""

    select: Select = largest_magnitudes
    """Choose candidates from one weight's gradient, summed over all ranks."""
    sum_: Sum = lambda flat: None
    """Sum over all ranks, for embeddings: which rows their batches have met."""
    proposals: Proposals | None = None
    """Choose and rank candidates by another rule than |gradient|; None: `select` does."""
    products: Products | None = None
    """Compute entries of a weight's gradient; None: pick them from the full product."""
    exchanges: Exchanges = in_torch
    """Drop and grow the entries of one weight."""
    together: bool | None = None
    """Drop and grow many weights at once, with the same results, and not by `exchanges`; None: on all but CPUs."""
    moments: Moments = float32_moments
    """Create the storage of AdamW's moments."""
    gradient_dtype: torch.dtype = torch.float32
    """Of the recorded gradients: float32 or bfloat16."""
    reuse_buffer: bool = True
    """Reuse one buffer for every dense gradient of a step."""
