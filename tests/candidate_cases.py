"""Gradients of several ranks, and the candidates that ranks choose from them by gathering the tops of all.

Each rank gathers and sorts W * C entries, so this is only for tests: what the exchange must agree with.
Shapes: W ranks; N entries of a weight; C candidates.
"""

from __future__ import annotations

import torch
from torch import Tensor

from scale_sft.distributed.agreement import Ranks
from scale_sft.kernels.cpu.topk import top_k_magnitude
from scale_sft.spiel.indices import pieces
from scale_sft.spiel.topk import top_k_sorted

KINDS = ("spread", "ties", "all equal", "broken", "infinite", "zeros of both signs", "small", "in one part")


def summands(kind: str, world: int, n: int, dtype: torch.dtype) -> Tensor:
    """[W, N]: gradients of the ranks whose sums are exact in float32, so that their order does not matter."""
    generator = torch.Generator().manual_seed(n + world)
    parts = torch.randint(-200, 201, (world, n), generator=generator).float() / 64
    if kind == "ties":
        parts = parts.sign() * 2
    elif kind == "all equal":
        parts = torch.full_like(parts, -0.5)
    elif kind == "broken":
        parts[-1, n // 3 :: 2] = torch.nan
        parts[0, :: n // 2 + 1] = -torch.nan
    elif kind == "infinite":
        parts[0, ::3] = torch.inf
        parts[-1, ::3] = -torch.inf  # with the line above no number
        parts[-1, 1::5] = -torch.inf
    elif kind == "zeros of both signs":
        parts = torch.where(parts > 2.5, parts, torch.where(parts > 0, 0.0, -0.0))
    elif kind == "small":
        parts *= 2.0**-140  # below the smallest normal number
    elif kind == "in one part":
        parts[:, : n // 2] *= 2.0**-20
    return parts.to(dtype)


def gathered_candidates(ranks: Ranks, gradient: Tensor, count: int, piece_entries: int = 1 << 22) -> Tensor:
    """Choose the entries of largest magnitude of a gradient summed over the ranks.

    Each rank takes the top of its part of the sum; the top of those tops is the top of the whole.

    Args:
        ranks: the ranks that call this together.
        gradient: [N], this rank's summand.
        count: C.
        piece_entries: entries of the gradient that are summed at a time.

    Returns:
        Flat indices [C] int64, sorted.
    """
    if ranks.size == 1:
        return top_k_magnitude(gradient, count)
    n, world = gradient.numel(), ranks.size
    part = -(-n // world)
    scores = torch.empty(0, dtype=torch.float32, device=gradient.device)
    indices = torch.empty(0, dtype=torch.int64, device=gradient.device)
    for piece in pieces(part, max(1, piece_entries // world)):
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
    scores, indices = ranks.gather(_extended(scores, length, -1.0)), ranks.gather(_extended(indices, length, 0))
    order = indices.argsort(stable=True)
    return indices[order[top_k_sorted(scores[order], count)]]


def _reduced(ranks: Ranks, held: Tensor, size: int) -> Tensor:
    """Sum `held` [at most W * size] over the ranks in float32 and return this rank's part of the sum [size]."""
    padded = torch.zeros(size * ranks.size, dtype=torch.float32, device=held.device)
    padded[: held.numel()] = held
    total = torch.empty(size, dtype=torch.float32, device=held.device)
    ranks.sum_parts(total, padded, "gathered")
    return total


def _extended(tensor: Tensor, length: int, value: float) -> Tensor:
    """Pad a tensor [n], n <= length, with `value`: [length]."""
    return torch.cat((tensor, tensor.new_full((length - tensor.numel(),), value)))
