"""From scores of entries to keys of tiles: whole columns, rows or blocks are chosen by the norm of their scores.

Shapes: n entries of a contiguous part of a weight; m tiles of the whole weight.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ..indices import pieces
from ..tiles import Tiling
from .draws import is_top, sample_keys, stream, top_keys
from .rule import PART_ENTRIES, SelectionRule


def tile_keys(
    rule: SelectionRule, name: str, tiling: Tiling, scores: Tensor, start: int, sum_: Callable[[Tensor], None]
) -> Tensor:
    """Compute the keys [m] fp32 of all tiles: of the root of their entries' summed squares, by the rule's draw.

    Squares are added in float64 and rounded once. Every process gets the same keys.

    Args:
        rule: its temperature and seed count.
        name: of the weight, which decides the noise.
        tiling: of the weight.
        scores: [n] fp32 of the entries that this process holds, at least 0.
        start: flat index of the first of them.
        sum_: sums a tensor over all processes, in place.
    """
    squares = torch.zeros(tiling.count, dtype=torch.float64, device=scores.device)
    for part in pieces(scores.numel(), PART_ENTRIES):
        places = torch.arange(start + part.start, start + part.stop, device=scores.device)
        squares.index_add_(0, tiling.numbers_of(places), scores[part].double().square())
    sum_(squares)
    norms = squares.sqrt().float()
    return top_keys(norms) if is_top(rule.temperature) else _drawn(rule, name, norms, rule.temperature, 0)


def growth_keys(rule: SelectionRule, name: str, norms: Tensor, round_number: int) -> Tensor:
    """Compute the keys [m] fp32 of tiles by the norms [m] of their gradients: not negative.

    Args:
        rule: its draw and seed count, and score random, which draws uniformly.
        name: of the weight; it decides the noise, with `round_number`.
        norms: at least 0.
        round_number: of the reallocation.
    """
    temperature = 0.0 if rule.score == "random" else rule.temperature
    return top_keys(norms) if is_top(temperature) else _drawn(rule, name, norms, temperature, round_number)


def random_tile_keys(rule: SelectionRule, name: str, tiling: Tiling, device: torch.device | None) -> Tensor:
    """Compute the keys [m] fp32 of a uniform draw of tiles."""
    return random_keys(rule, name, tiling.count, device)


def random_keys(rule: SelectionRule, name: str, count: int, device: torch.device | None) -> Tensor:
    """Compute the keys [count] fp32 of a uniform draw, the same on every process."""
    return _drawn(rule, name, torch.ones(count, device=device), 0.0, 0)


def _drawn(rule: SelectionRule, name: str, norms: Tensor, temperature: float, round_number: int) -> Tensor:
    places = torch.arange(norms.numel(), device=norms.device)
    return sample_keys(norms, places, temperature, stream(rule.seed, name, round_number))
