"""Drop and grow for one weight: tensors in, tensors out (sections 3.2 and 3.3, Algorithms 1 and 2).

Shapes: K active entries, C candidates, k up for replacement, g newly grown; O rows, I columns; n of m tiles.
Score (what to drop, what to grow), mechanics (`Exchange`) and schedule (how many) are three separate things: another
criterion is one more short function that returns an `Exchange`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .deltas import SparseDelta, TogetherDelta
from .indices import Entries, find_places
from .tiles import Tiles
from .topk import bottom_k_sorted, top_k_of_product, top_k_sorted


@dataclass(frozen=True)
class Exchange:
    """The active entries of a weight, or of several together, that stay, and the indices that join them.

    `merge` carries any tensor parallel to the indices across the exchange.
    """

    kept: Tensor  # [K] bool
    grown: Tensor  # [g] flat indices, sorted, none of them active before; of several weights, more may be listed
    order: Tensor  # [K]: cat(indices, grown)[order] are the new indices, sorted
    grown_candidates: Tensor | None = None  # [g] positions of `grown` among the candidates (AG); None: `grown` is all
    count: Tensor | None = None  # the newly active entries, int64, where that is not g

    @property
    def replaced(self) -> Tensor | int:
        """Count the newly active entries."""
        return self.grown.numel() if self.count is None else self.count

    def merge(self, old: Tensor, new: Tensor) -> Tensor:
        """Merge old values [K] with those of grown entries, new [g]; returns them in the new order."""
        return torch.cat((old, new.to(old.dtype))).index_select(0, self.order)


def drop_scores(delta: SparseDelta | TogetherDelta, criterion: str, ages: Tensor | None = None) -> Tensor:
    """Score the entries, [K]; the smallest are dropped first.

    `magnitude`: |delta|, the paper's text and the authors' code. `change`: |delta - delta at the last reallocation|,
    the paper's Algorithm 1 (line 10). `age`: |delta| / steps since the entry was grown, so that young entries are not
    dropped for being young; not in the paper.

    Args:
        delta: the entries.
        criterion: as above.
        ages: [cohorts] fp32, steps since each cohort was grown, at least 1; only for `age`.
    """
    if criterion == "change" and delta.reference is not None:
        return (delta.deltas.float() - delta.reference.float()).abs()
    if criterion == "age" and ages is not None:
        return delta.deltas.float().abs() / ages.index_select(0, delta.cohort.int())
    return delta.deltas.abs()


def keep_unless_better(exchange: Exchange, indices: Tensor, leaving: Tensor, coming: Tensor) -> Exchange:
    """Undo the part of an exchange whose newcomers promise no more than what they replace; not in the paper.

    Of the entries up for replacement and the newcomers together, the most promising stay; ties go to the entries.

    Args:
        exchange: of one weight, by gradient.
        indices: [K] its entries before the exchange, sorted.
        leaving: [g] promises of the entries to be dropped, in their order.
        coming: [g] promises of the newcomers, in theirs.
    """
    if exchange.grown_candidates is None:
        raise ValueError("an exchange by gradient knows its candidates; got one that does not")
    best = top_k_sorted(torch.cat((leaving, coming)), leaving.numel())
    stays, joins = best[best < leaving.numel()], best[best >= leaving.numel()] - leaving.numel()
    kept = exchange.kept.clone()
    kept[(~kept).nonzero().squeeze(1)[stays]] = True
    return _exchange(indices, kept, exchange.grown[joins], exchange.grown_candidates[joins])


def exchange_by_gradient(indices: Tensor, scores: Tensor, candidates: Tensor, mean: Tensor, k: int) -> Exchange:
    """Drop the `k` of smallest score, and grow the k candidates of largest |mean gradient|: SFT-AG (section 3.2).

    Candidates that would remain active are skipped; an entry both dropped and grown stays as it is. If fewer than k
    can grow, only as many are dropped, the smallest first. Ties go to the smaller index on both sides.

    Args:
        indices: [K] sorted. scores: [K]. candidates: [C] sorted. mean: [C] fp32, estimate of Eq. 8.
    """
    candidates = candidates.to(indices.dtype)
    place, is_active = find_places(indices, candidates)
    k = _growable(scores, place[is_active], candidates.numel(), k)
    kept = torch.ones(indices.shape, dtype=torch.bool, device=indices.device)
    kept[bottom_k_sorted(scores, k)] = False
    eligible = (~(is_active & kept[place])).nonzero().squeeze(1)
    chosen = eligible[top_k_sorted(mean[eligible].abs(), k)]
    stays = is_active[chosen]
    kept[place[chosen[stays]]] = True
    chosen = chosen[~stays]
    return _exchange(indices, kept, candidates[chosen], chosen)


def exchange_tiles(
    tiles: Tiles, indices: Tensor, scores: Tensor, keys: Tensor, able: Tensor, k: int, *, if_better: bool = False
) -> Exchange:
    """Drop the `k` whole columns or rows of smallest score, and grow the k of largest key; not in the paper.

    As `exchange_by_gradient`, with tiles in the place of entries, and all that are `able` as candidates.

    Args:
        tiles: the active ones, n of m.
        indices: [K] their entries. scores: [K]; that of a tile is their norm.
        keys: [m] of all tiles, at least 0.
        able: [m] bool: those that may grow.
        if_better: see `keep_unless_better`.
    """
    numbers, candidates = tiles.numbers, able.nonzero().squeeze(1)
    exchange = exchange_by_gradient(numbers, tiles.norms(scores), candidates, keys[candidates], k)
    if if_better:
        leaving = numbers[~exchange.kept]
        exchange = keep_unless_better(exchange, numbers, keys[leaving], keys[exchange.grown])
    grown = Tiles(tiles.tiling, exchange.grown).indices()
    return _exchange(indices, tiles.spread(exchange.kept), grown, None)


def _growable(scores: Tensor, active_candidates: Tensor, candidates: int, k: int) -> int:
    """Find the largest m <= k for which m entries can grow when the m smallest are dropped.

    Two kinds can grow: inactive candidates, and candidates among the m dropped, which simply stay. So m is reached as
    long as there are at least as many inactive candidates as dropped entries that are not candidates.

    Args:
        scores: [K]. active_candidates: positions of those active entries that are candidates.
    """
    fresh = candidates - active_candidates.numel()
    if k <= fresh:
        return k
    leaving = torch.ones(scores.shape, dtype=torch.bool, device=scores.device)
    leaving[active_candidates] = False
    in_drop_order = torch.sort(scores, stable=True).indices[:k]
    return int((leaving[in_drop_order].cumsum(0) <= fresh).sum())


def exchange_by_accumulators(indices: Tensor, scores: Tensor, row: Tensor, col: Tensor, k: int) -> Exchange:
    """Drop the `k` of smallest score, and grow the k inactive entries of largest row[i] * col[j]: SFT-MA (section 3.3).

    Args:
        indices: [K] sorted. scores: [K]. row: [O], col: [I] fp32, SM3 accumulators.
    """
    k = min(k, row.numel() * col.numel() - indices.numel())
    kept = torch.ones(indices.shape, dtype=torch.bool, device=indices.device)
    kept[bottom_k_sorted(scores, k)] = False
    return _exchange(indices, kept, top_k_of_product(row, col, k, excluded=indices), None)


def positive_products(entries: Entries, row: Tensor, col: Tensor) -> int:
    """Count the inactive entries with row[i] * col[j] > 0: those that accumulators can let grow.

    Args:
        entries: the active ones. row: [O], col: [I], not negative.
    """
    every = int((row > 0).sum()) * int((col > 0).sum())
    return every - sum(int(((row[i] > 0) & (col[j] > 0)).sum()) for _, i, j in entries.coordinates())


def _exchange(indices: Tensor, kept: Tensor, grown: Tensor, grown_candidates: Tensor | None) -> Exchange:
    """Merge the sorted indices that stay with the sorted grown ones."""
    grown = grown.to(indices.dtype)
    staying = kept.nonzero().squeeze(1)
    new = torch.arange(grown.numel(), device=grown.device)
    among = new + torch.searchsorted(indices[staying], grown)  # positions of the grown ones
    is_old = torch.ones(staying.numel() + grown.numel(), dtype=torch.bool, device=indices.device)
    is_old[among] = False
    order = torch.empty(is_old.shape, dtype=torch.int64, device=indices.device)
    order[is_old], order[among] = staying, new + indices.numel()
    return Exchange(kept=kept, grown=grown, order=order, grown_candidates=grown_candidates)


def apply_exchange(delta: SparseDelta | TogetherDelta, exchange: Exchange, cohort: int) -> None:
    """Carry one weight, or several together, over an exchange, in place: grown deltas start at 0, in `cohort`.

    The number of active entries does not change; the optimizer's state follows in its own `follow`.
    """
    grown = exchange.grown
    zeros = torch.zeros(grown.shape, dtype=delta.deltas.dtype, device=grown.device)
    indices = exchange.merge(delta.entries.flat(), grown)
    if isinstance(delta, SparseDelta):
        delta.indices = indices
    else:
        delta.entries.replace(indices)
    delta.deltas.copy_(exchange.merge(delta.deltas, zeros))
    delta.cohort.copy_(exchange.merge(delta.cohort, torch.full_like(zeros, cohort, dtype=delta.cohort.dtype)))
    if delta.reference is not None:
        delta.reference.copy_(delta.deltas)
