"""The method of a sparse model, built from its settings: store, schedule, back ends, and the rule of growth.

Shapes: O rows, I columns of a weight; K active entries.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from scale_sft.errors import UserError
from scale_sft.kernels.backends import exchanges_of, products_of
from scale_sft.kernels.moments import moments_of, resolve_moments
from scale_sft.spiel.algorithm import SparseFineTuning
from scale_sft.spiel.deltas import Active, DeltaStore
from scale_sft.spiel.seeding import random_tiles
from scale_sft.spiel.selection.parts import ReadWeight
from scale_sft.spiel.selection.proposals import Proposals
from scale_sft.spiel.settings import Backends
from scale_sft.spiel.tiles import Tiles, Tiling

from .group import Group
from .sparse_settings import SparseSettings
from .targets import Target, budget_of, transposed_names
from .tilings import tilings_of


def make_method(
    settings: SparseSettings,
    targets: list[Target],
    group: Callable[[], Group],
    read_weight: ReadWeight,
    active: Mapping[str, Tensor] | Mapping[str, int] | None = None,
) -> SparseFineTuning:
    """Build the method over a fresh store.

    Args:
        settings: what to do.
        targets: the layers to train.
        group: returns the processes that train together, which may grow in number.
        read_weight: see `ReadWeight`.
        active: initial indices of each weight, or K of each at random indices; None: K by the settings.
    """
    sparse, schedule, device = settings.sparse, settings.reallocations, group().device
    shapes, transposed = {target.name: target.shape for target in targets}, transposed_names(targets)
    tilings = tilings_of(sparse, shapes, transposed)
    chosen: Active = active or settings.start or settings.counts or budget_of(sparse, shapes, transposed)
    store = DeltaStore(
        shapes,
        _whole(chosen, tilings, settings.seed) if tilings else chosen,
        seed=settings.seed,
        device=device,
        cohorts=len(schedule.reallocations()),
        keep_reference=sparse.drop_criterion == "change",
        dtype=getattr(torch, sparse.delta_dtype),
    )
    rule, plain = settings.rule, settings.rule.is_plain
    if sparse.exchange_if_better and "weight" in rule.of(batches=schedule.estimation_steps).reads:
        raise UserError(
            f"exchange_if_better: got it with score {sparse.score}, which reads weights, expected one that does not"
        )
    backends = Backends(
        select=lambda gradient, count: group().select_candidates(gradient, count),
        sum_=lambda flat: group().sum_(flat, "proposal"),
        proposals=None if plain else ModelProposals(rule, group, read_weight, schedule.estimation_steps),
        products=products_of(device, settings.kernels),
        exchanges=exchanges_of(device, settings.kernels),
        moments=moments_of(resolve_moments(settings.optimizer.moments, settings.dtype)),
        gradient_dtype=getattr(torch, settings.optimizer.gradient_dtype),
        reuse_buffer=settings.quantization is None,  # next to a dequantised copy, memory is for one gradient only
    )
    tuning = SparseFineTuning(store, settings.method, schedule, backends)
    tuning.recorder.by_rows |= {target.name for target in targets if target.by_rows}
    return tuning


def _whole(active: Active, tilings: Mapping[str, Tiling], seed: int) -> dict[str, Tiles]:
    """Turn counts into as many random tiles, and indices into the tiles that they make up.

    Raises:
        UserError: counts or indices are not those of whole tiles.
    """
    found = {}
    for name, tiling in tilings.items():
        given = active[name]
        if isinstance(given, Tensor):
            found[name] = tiling.chosen_in(given)
        elif isinstance(given, int) and given % tiling.size == 0:
            found[name] = random_tiles(tiling, given // tiling.size, seed, name)
        else:
            raise UserError(
                f"granularity: got {given} entries for '{name}', expected whole tiles of {tiling.size}. Fix: "
                "--granularity entry with method static"
            )
    return found


class ModelProposals(Proposals):
    """Proposals whose errors are the user's to read."""

    def rank(self, *arguments: Any) -> Tensor:
        """Compute the keys of candidates.

        Raises:
            UserError: a score is NaN or negative.
        """
        try:
            return super().rank(*arguments)
        except ValueError as error:
            raise UserError(str(error)) from None
