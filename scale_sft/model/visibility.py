"""Which deltas survive in a merged model: those that move their weight by at least half a step of bfloat16.

Shapes: K active entries of a weight, E of them in this process's part.
"""

from __future__ import annotations

import torch

from scale_sft.spiel.deltas import SparseDelta

from .resident import read_entries
from .stepped import Sparse
from .transient import TransientDeltas


def visible_fraction(sparse: Sparse) -> float:
    """Compute the share of the active entries whose weight differs from the base's in bfloat16.

    All processes call it together.
    """
    counts = torch.zeros(2, dtype=torch.float64, device=sparse.group.device)
    sparse.carrier.settle()
    for delta in sparse.tuning.store:
        base, deltas = _held(sparse, delta)
        base = base.to(deltas.device).float()
        visible = (base + deltas.float()).to(torch.bfloat16) != base.to(torch.bfloat16)
        counts += torch.stack((visible.sum(), torch.full_like(visible.sum(), visible.numel())))
    sparse.group.sum_(counts, "scalars")
    visible_entries, entries = counts.tolist()
    return visible_entries / max(1.0, entries)


def _held(sparse: Sparse, delta: SparseDelta) -> tuple[torch.Tensor, torch.Tensor]:
    """Return base values and deltas [E] of the entries that this process holds of a weight."""
    carrier = sparse.carrier
    if isinstance(carrier, TransientDeltas):
        with carrier.without():
            weight = carrier.effective_weight(delta.name)
        return read_entries(weight.view(-1), delta.indices), delta.deltas
    _, base, _, before = carrier.held(delta.name)
    return base, delta.deltas[before : before + base.numel()]
