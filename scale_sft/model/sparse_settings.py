"""All settings of sparse training that do not depend on data or processes."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch

from scale_sft.config.methods import KEEPING, SEEDED, usual_rate
from scale_sft.config.options import OptimizerConfig, SparseConfig
from scale_sft.errors import UserError
from scale_sft.spiel.budgets import equivalent_rank
from scale_sft.spiel.optimizers import Growth
from scale_sft.spiel.schedules import LearningRateSchedule, ReallocationSchedule, scaled_rate
from scale_sft.spiel.selection.rule import SelectionRule
from scale_sft.spiel.settings import MethodSettings

from .quantization import Quantization
from .targets import depth_of


@dataclass(frozen=True, kw_only=True)
class SparseSettings:
    """All settings of sparse training, independent of the data."""

    sparse: SparseConfig
    optimizer: OptimizerConfig
    total_steps: int
    dtype: torch.dtype
    """Of the computation; of an unquantised base also of its weights."""
    quantization: Quantization | None = None
    seed: int = 0
    """Of the initial indices."""
    kernels: str = "auto"
    """`off`, `cpu` or `auto`, as in the option kernels."""
    start: Mapping[str, int] | None = None
    """Active entries K by weight of the adapter that training starts from; None: K by the budget, at random indices."""

    counts: Mapping[str, int] | None = None
    """Active entries K by weight that the first choice of a resumed run led to (budget global); None: by the budget."""

    @property
    def reallocations(self) -> ReallocationSchedule:
        """Build the schedule of drop and grow from the options."""
        return ReallocationSchedule(
            total_steps=self.total_steps,
            update_interval_steps=self.sparse.update_interval_steps,
            estimation_steps=self.sparse.estimation_steps,
            initial_replacement_fraction=self.sparse.initial_replacement_fraction,
            replacement_schedule=self.sparse.replacement_schedule,
            only_first=self.sparse.method in KEEPING,
            estimates=self.sparse.method != "ma",
            chosen=self.start is not None or self.sparse.method in SEEDED or self.sparse.selection_batches > 0,
        )

    @property
    def rule(self) -> SelectionRule:
        """Build the rule that chooses entries from the options."""
        return rule_of(self.sparse, self.seed)

    def learning_rates(self, active: int, shapes: Mapping[str, tuple[int, int]]) -> LearningRateSchedule:
        """Build the schedule of learning rates from the options; for the arguments see `peak_rate`."""
        return LearningRateSchedule(
            peak=peak_rate(self.sparse, self.optimizer, active, shapes),
            total_steps=self.total_steps,
            warmup_fraction=self.optimizer.warmup_fraction,
            decay=self.optimizer.lr_schedule,
        )

    @property
    def method(self) -> MethodSettings:
        """Build the method's settings from the options."""
        return MethodSettings(
            method=self.sparse.method,
            betas=self.optimizer.betas,
            eps=self.optimizer.eps,
            weight_decay=self.optimizer.weight_decay,
            candidate_ratio=self.sparse.candidate_ratio,
            drop_criterion=self.sparse.drop_criterion,
            exchange_if_better=self.sparse.exchange_if_better,
            growth=Growth(self.sparse.seed_moments, self.sparse.growth_warmup_steps),
            seed=self.seed,
            scale_rates=self.sparse.rate_scaling == "counts",
            max_grad_norm=self.optimizer.max_grad_norm,
        )


def peak_rate(
    sparse: SparseConfig, optimizer: OptimizerConfig, active: int, shapes: Mapping[str, tuple[int, int]]
) -> float:
    """Return the peak learning rate: the one that is given, or the method's for so many entries in these weights.

    Args:
        active: entries that are trained.
        shapes: (O, I) by name of the weights that hold them.
    """
    if optimizer.learning_rate is not None:
        return optimizer.learning_rate
    rate = usual_rate(sparse.method, sparse.draw)
    return scaled_rate(rate, equivalent_rank(active, shapes.values()), depth_of(shapes))


def rule_of(sparse: SparseConfig, seed: int) -> SelectionRule:
    """Build the rule that chooses entries from the options.

    Raises:
        UserError: the score is unknown.
    """
    try:
        return SelectionRule(
            score=sparse.score,
            temperature=sparse.temperature if sparse.draw == "sample" else math.inf,
            seed=seed,
            row_quota=sparse.row_quota,
            column_quota=sparse.column_quota,
        )
    except ValueError as error:
        raise UserError(str(error)) from None
