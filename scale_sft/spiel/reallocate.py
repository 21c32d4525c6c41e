"""Drop and grow for one weight: tensors in, tensors out (sections 3.2 and 3.3, Algorithms 1 and 2).

Shapes: K active entries, C candidates, k up for replacement, g newly grown; O rows, I columns.
Score (what to drop, what to grow), mechanics (`Exchange`) and schedule (how many) are three separate things: another
criterion is one more short function that returns an `Exchange`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .delta import SparseDelta
from .topk import bottom_k_sorted, in_sorted, top_k_of_product, top_k_sorted


@dataclass(frozen=True)
class Exchange:
    """Which active entries of a weight stay and which indices join them.

    `merge` carries any tensor that runs parallel to the indices over the exchange.
    """

    kept: Tensor  # [K] bool
    grown: Tensor  # [g] flat indices, sorted, none of them active before
    order: Tensor  # [K - dropped + g]: sorts cat(indices[kept], grown)
    grown_candidates: Tensor | None = None  # [g] positions of `grown` among the candidates (AG)

    @property
    def replaced(self) -> int:
        """How many entries became active that were not before."""
        return self.grown.numel()

    def merge(self, old: Tensor, new: Tensor) -> Tensor:
        """old: [K], values of the entries before; new: [g], of the grown ones. Returns them in the new order."""
        return torch.cat((old[self.kept], new.to(old.dtype)))[self.order]


def drop_scores(delta: SparseDelta, criterion: str) -> Tensor:
    """[K]: the smallest are dropped first.

    `magnitude`: |delta|, the paper's text and the authors' code. `change`: |delta - delta at the last reallocation|,
    the paper's Algorithm 1 (line 10).
    """
    if criterion == "change":
        return (delta.deltas.float() - delta.reference.float()).abs()
    return delta.deltas.abs()


def exchange_by_gradient(indices: Tensor, scores: Tensor, candidates: Tensor, mean: Tensor, k: int) -> Exchange:
    """SFT-AG (section 3.2): drop the `k` of smallest score, grow the k candidates of largest |mean gradient|.

    Candidates that would remain active are skipped; an entry both dropped and grown stays as it is. If fewer than k
    can grow, only as many are dropped, the smallest first. Ties go to the smaller index on both sides.

    Args:
        indices: [K] sorted. scores: [K]. candidates: [C] sorted. mean: [C] fp32, estimate of Eq. 8.
    """
    was_candidate = in_sorted(indices, candidates)
    k = _growable(scores, was_candidate, candidates.numel(), k)
    dropped = torch.zeros(indices.shape, dtype=torch.bool, device=indices.device)
    dropped[bottom_k_sorted(scores, k)] = True
    eligible = (~in_sorted(candidates, indices[~dropped])).nonzero().squeeze(1)
    chosen = eligible[top_k_sorted(mean[eligible].abs(), k)]
    kept = ~dropped | in_sorted(indices, candidates[chosen])
    chosen = chosen[~in_sorted(candidates[chosen], indices)]
    return _exchange(indices, kept, candidates[chosen], chosen)


def _growable(scores: Tensor, was_candidate: Tensor, candidates: int, k: int) -> int:
    """The largest m <= k for which m entries can grow when the m smallest are dropped.

    What can grow then: candidates that are not active, and candidates among the m dropped (those simply stay). So m is
    reached as long as the dropped entries that are no candidates do not outnumber the candidates that are not active.
    """
    fresh = candidates - int(was_candidate.sum())
    if k <= fresh:
        return k
    in_drop_order = torch.sort(scores, stable=True).indices[:k]
    leaving = (~was_candidate[in_drop_order]).cumsum(0)
    return int((leaving <= fresh).sum())


def exchange_by_accumulators(indices: Tensor, scores: Tensor, row: Tensor, col: Tensor, k: int) -> Exchange:
    """SFT-MA (section 3.3): drop the `k` of smallest score, grow the k inactive entries of largest row[i] * col[j].

    Args:
        indices: [K] sorted. scores: [K]. row: [O], col: [I] fp32, SM3 accumulators.
    """
    k = min(k, row.numel() * col.numel() - indices.numel())
    kept = torch.ones(indices.shape, dtype=torch.bool, device=indices.device)
    kept[bottom_k_sorted(scores, k)] = False
    return _exchange(indices, kept, top_k_of_product(row, col, k, excluded=indices), None)


def _exchange(indices: Tensor, kept: Tensor, grown: Tensor, grown_candidates: Tensor | None) -> Exchange:
    order = torch.argsort(torch.cat((indices[kept], grown.to(indices.dtype))))
    return Exchange(kept=kept, grown=grown, order=order, grown_candidates=grown_candidates)


def apply_exchange(delta: SparseDelta, exchange: Exchange, cohort: int) -> None:
    """Carry one weight over an exchange, in place: grown deltas start at 0 and belong to `cohort`.

    The number of active entries does not change; the optimizer's state follows in its own `follow`.
    """
    grown = exchange.grown
    zeros = torch.zeros(grown.shape, dtype=delta.deltas.dtype, device=grown.device)
    delta.indices = exchange.merge(delta.indices, grown)
    delta.deltas.copy_(exchange.merge(delta.deltas, zeros))
    delta.cohort = exchange.merge(delta.cohort, torch.full_like(zeros, cohort, dtype=delta.cohort.dtype))
    if delta.reference is not None:
        delta.reference.copy_(delta.deltas)
