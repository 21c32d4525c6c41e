"""The reallocation schedule: the steps that drop and grow, and how many entries (section 3.2, Eq. 9).

Steps are counted from 1: step t is the t-th optimizer step. S update interval, G estimation steps, T all steps.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from enum import Enum


class Phase(Enum):
    """The role of a step: what its backward passes record in addition to the active deltas' gradients."""

    OFF = "off"
    PROPOSE = "propose"  # the first micro-step chooses the candidates, all micro-steps estimate them
    ESTIMATE = "estimate"


@dataclass(frozen=True, kw_only=True)
class ReallocationSchedule:
    """The reallocation schedule of Eq. 9.

    Differs from the paper: its text puts updates "every S steps" and the estimation phase before them; the authors'
    code reallocates whenever t % S == G % S. So does this schedule: the first reallocation happens at t = G.
    """

    total_steps: int
    update_interval_steps: int = 20
    estimation_steps: int = 5
    initial_replacement_fraction: float = 0.2
    replacement_schedule: str = "linear"  # or "cosine"
    only_first: bool = False  # `static`: gradient-selected once at t = G, then fixed
    estimates: bool = True  # False for SFT-MA, which needs no candidates
    chosen: bool = False  # the first entries are not to be replaced altogether: `static` keeps them for good

    def reallocates_at(self, step: int) -> bool:
        """Return True if drop and grow happen at the end of step `step` (counted from 1)."""
        first, interval = self.estimation_steps, self.update_interval_steps
        if self.only_first:
            return step == first and not self.chosen
        return step <= self.total_steps and step >= first and step % interval == first % interval

    def phase(self, step: int) -> Phase:
        """Return the phase of `step`: the G steps that end at a reallocation estimate, the first of them proposes."""
        if not self.estimates:
            return Phase.OFF
        ahead = (self.estimation_steps - step) % self.update_interval_steps
        if ahead >= self.estimation_steps or not self.reallocates_at(step + ahead):
            return Phase.OFF
        return Phase.PROPOSE if ahead == self.estimation_steps - 1 else Phase.ESTIMATE

    def replaced(self, step: int, active: int) -> int:
        """Compute k(t) of Eq. 9: how many of `active` entries are up for replacement at step `step`.

        All of them at the first reallocation, unless they are `chosen` already.
        """
        return int(self._share(step) * active)

    def replaced_tiles(self, step: int, active: int) -> int:
        """Compute k(t) of `active` whole columns or rows: the nearest number, as a few of them would never reach 1."""
        return int(self._share(step) * active + 0.5)

    def _share(self, step: int) -> float:
        if step == self.estimation_steps and not self.chosen:
            return 1.0
        progress = step / self.total_steps
        left = 1 - progress if self.replacement_schedule == "linear" else (1 + math.cos(math.pi * progress)) / 2
        return self.initial_replacement_fraction * left

    def reallocations(self) -> list[int]:
        """List all steps at which drop and grow happen."""
        return [step for step in range(1, self.total_steps + 1) if self.reallocates_at(step)]


RANK_OF_RATES, DEPTH_OF_RATES = 8, 32
"""The budget, as an equivalent rank, and the number of blocks that a rate is stated for."""
LOWEST_RANK, LOWEST_DEPTH = 2, 8
"""Below these a rate rises no further: smaller budgets and shallower models have not been measured."""


def scaled_rate(rate: float, rank: float, depth: int) -> float:
    """Scale a peak learning rate to a budget and a depth: rate x (8 / rank)^(5/6) x (32 / depth)^(1/2), to two digits.

    Not in the paper, which gives one rate for each base. Entries of one row add up in its output, and AdamW moves all
    of them alike: the best rate would fall with the root of their number if their steps were independent, and with the
    number if all agreed. Blocks add up in the residual stream, whose norm itself grows with the root of their number.
    docs/selection.md has the best rates that were found, on two models at budgets of rank 2 to 64.

    Args:
        rate: for a budget of rank 8, 16 entries in each row of a square weight, in 32 blocks.
        rank: of LoRA with as many parameters; under 2 counts as 2.
        depth: blocks that hold entries; under 8 counts as 8.
    """
    of_budget = (RANK_OF_RATES / max(rank, LOWEST_RANK)) ** (5 / 6)
    of_depth = (DEPTH_OF_RATES / max(depth, LOWEST_DEPTH)) ** (1 / 2)
    return float(f"{rate * of_budget * of_depth:.2g}")


@dataclass(frozen=True, kw_only=True)
class LearningRateSchedule:
    """Linear warm-up over a fraction of the steps, then linear, cosine or no decay (section 4.3: linear after 3 %).

    Differs from the paper, whose runs are long: without a fraction of its own, warm-up takes 3 %, but at least 10
    steps, or a quarter of a run under 40. AdamW's first moment is a mean over about 1 / (1 - beta1) = 10 gradients;
    before it has them, nearly every entry moves by the whole rate, along the noise of single batches.
    """

    peak: float
    total_steps: int
    warmup_fraction: float | None = None
    decay: str = "linear"  # or "cosine" or "constant"

    @property
    def warmup_steps(self) -> int:
        """Steps over which the rate rises."""
        if self.warmup_fraction is not None:
            return math.ceil(self.warmup_fraction * self.total_steps)
        return math.ceil(max(0.03 * self.total_steps, min(10, self.total_steps / 4)))

    def at(self, step: int) -> float:
        """Compute the learning rate of step `step` (counted from 1); it is never 0 at the first step."""
        warmup = self.warmup_steps
        if step <= warmup:
            return self.peak * step / warmup
        progress = (step - 1 - warmup) / max(1, self.total_steps - warmup)
        if self.decay == "linear":
            return self.peak * (1 - progress)
        if self.decay == "cosine":
            return self.peak * (1 + math.cos(math.pi * progress)) / 2
        return self.peak
