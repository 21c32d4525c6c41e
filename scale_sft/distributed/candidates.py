"""Candidates for growth, chosen over all ranks: the largest entries of a summed gradient that no rank holds whole.

Shapes: W ranks; N entries of a weight, cut into W parts; C candidates.
"""

from __future__ import annotations

import torch
from torch import Tensor

from scale_sft.kernels.cpu.topk import top_k_magnitude
from scale_sft.spiel.indices import pieces
from scale_sft.spiel.topk import top_k_sorted

from .agreement import Ranks

PROPOSAL_ENTRIES = 1 << 22
"""Entries of a gradient that are summed over the ranks at a time."""


def select_candidates(ranks: Ranks, gradient: Tensor, count: int) -> Tensor:
    """Choose the entries of largest magnitude of a gradient summed over the ranks.

    Each rank receives its part of the sum (reduce-scatter, piece by piece, so that no fp32 copy of the whole is made)
    and takes the top of it; the top of those tops is the top of the whole. The choice is exact, and the same on every
    rank because all decide on the same gathered values.

    Args:
        ranks: the ranks that call this together.
        gradient: [N], this rank's summand.
        count: C.

    Returns:
        Flat indices [C] int64, sorted.
    """
    if ranks.size == 1:
        return top_k_magnitude(gradient, count)
    n, world = gradient.numel(), ranks.size
    part = -(-n // world)
    scores = torch.empty(0, dtype=torch.float32, device=gradient.device)
    indices = torch.empty(0, dtype=torch.int64, device=gradient.device)
    for piece in pieces(part, max(1, PROPOSAL_ENTRIES // world)):
        size = piece.stop - piece.start
        total = _reduced(ranks, gradient[piece.start * world : piece.stop * world], size)
        first = piece.start * world + ranks.rank * size
        total = total[: max(0, min(size, n - first))]
        top = top_k_magnitude(total, min(count, total.numel()))
        found = total[top].abs().nan_to_num(nan=-0.5, posinf=torch.inf)  # below any number, above the padding
        scores, indices = torch.cat((scores, found)), torch.cat((indices, top + first))
        if scores.numel() > count:
            kept = top_k_sorted(scores, count)
            scores, indices = scores[kept], indices[kept]
    length = min(count, part)
    ranks.traffic_bytes["proposal"] += 4 * part * world + 12 * length
    scores, indices = ranks.gather(_extended(scores, length, -1.0)), ranks.gather(_extended(indices, length, 0))
    order = indices.argsort(stable=True)
    return indices[order[top_k_sorted(scores[order], count)]]


def _reduced(ranks: Ranks, held: Tensor, size: int) -> Tensor:
    """Sum `held` [at most W * size] over the ranks in float32 and return this rank's part of the sum [size]."""
    padded = torch.zeros(size * ranks.size, dtype=torch.float32, device=held.device)
    padded[: held.numel()] = held
    total = torch.empty(size, dtype=torch.float32, device=held.device)
    ranks.mark()
    # newer torch has renamed the call
    call = getattr(torch.distributed, "reduce_scatter_single", None) or torch.distributed.reduce_scatter_tensor
    call(total, padded)
    return total


def _extended(tensor: Tensor, length: int, value: float) -> Tensor:
    """Pad a tensor [n], n <= length, with `value`: [length]."""
    return torch.cat((tensor, tensor.new_full((length - tensor.numel(),), value)))
