"""Candidates for growth by any rule, and their ranking at drop and grow: the paper's loop with another score or draw.

Shapes: O rows, I columns, N = O * I entries of a weight; C candidates.

One micro-step proposes the C entries with the largest keys; the estimation phase averages their gradients; drop and
grow rank them by keys of those averages. Facts that a candidate's score needs from outside of it (rms of its row and
column, its weight) are those of the proposal. The noise of a draw is the same in both places.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor

from ..row_gradients import RowGradient
from .draws import is_top
from .evidence import Margins, margins_of
from .parts import Parts, ReadWeight
from .rule import SelectionRule

ROW_RMS, COLUMN_RMS, WEIGHT = "candidate_row_rms", "candidate_column_rms", "candidate_weight"


@dataclass(frozen=True)
class Proposals:
    """How candidates are proposed and ranked.

    Args:
        rule: what to choose by.
        parts: returns the processes that choose together, which may grow in number.
        read_weight: see `ReadWeight`; called only if the score reads weights.
        estimation_steps: G, the batches that estimates average.
    """

    rule: SelectionRule
    parts: Callable[[], Parts]
    read_weight: ReadWeight
    estimation_steps: int

    @property
    def reads_gradients(self) -> bool:
        """Return False if candidates are ranked without a look at their gradient."""
        return self.rule.of(batches=self.estimation_steps).reads_gradients

    def propose(
        self, name: str, gradient: Tensor | RowGradient, count: int, round_number: int
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Choose candidates of a weight from its gradient [O, I], this process's summand.

        Of an embedding's, only rows that have a gradient are looked at, unless the score reads none.

        Returns:
            Flat indices [C] int64, sorted; and the facts that `rank` needs: see `facts`. [0] if the score reads a
            gradient and all of it is 0, as of an expert that met no token: a draw would choose some all the same.
        """
        parts, score = self.parts(), self.rule.of(batches=1)
        shape, met = tuple(gradient.shape), None
        reads = score.reads | self.rule.of(batches=self.estimation_steps).reads
        if isinstance(gradient, RowGradient):
            if "gradient" in score.reads:
                met = gradient.union(lambda flat: parts.sum_(flat, "proposal"))
            gradient = met.values if met else gradient.dense()
        entries, facts = gradient.numel(), {}
        places = parts.range_of(entries)
        part = parts.own_part(gradient.reshape(-1)).float()
        drawn = not is_top(self.rule.temperature)  # keys of a draw are never 0
        if drawn and score.reads_gradients and not _any(parts, part):
            return torch.empty(0, dtype=torch.int64, device=part.device), {}
        indices: Tensor | slice = places
        if met:
            indices = met.flat(torch.arange(places.start, places.stop, device=part.device))
        margins = weight = None
        if "margins" in reads:
            margins = margins_of(part, places.start, (gradient.shape[0], shape[1]), parts.sum_)
            margins = margins.among(met.rows, shape[0]) if met else margins
            facts = {ROW_RMS: margins.rows, COLUMN_RMS: margins.columns}
        with self.read_weight(name) if "weight" in reads else nullcontext() as whole:
            if whole is not None:
                weight = whole.reshape(-1)[indices].float()
            keys = self.rule.keys(
                name,
                shape[1],
                round_number,
                indices,
                score=score,
                mean=part,
                mean_square=part.square() if "squares" in score.reads else None,
                margins=margins,
                weight=weight,
            )
            choose = lambda keys, wanted: parts.choose(keys, entries, wanted)
            chosen = met.choose(choose, count, keys) if met else choose(keys, count)
            if whole is not None:
                facts[WEIGHT] = whole.reshape(-1).index_select(0, chosen).float()
        return chosen, facts

    def facts(self, shape: tuple[int, int], count: int) -> dict[str, tuple[int, ...]]:
        """Return the shapes of the fp32 tensors that candidates keep for `rank`, by name."""
        reads = self.rule.of(batches=1).reads | self.rule.of(batches=self.estimation_steps).reads
        kept: dict[str, tuple[int, ...]] = {}
        if "margins" in reads:
            kept |= {ROW_RMS: (shape[0],), COLUMN_RMS: (shape[1],)}
        return kept | ({WEIGHT: (count,)} if "weight" in reads else {})

    def rank(
        self,
        name: str,
        columns: int,
        indices: Tensor,
        mean: Tensor,
        mean_square: Tensor,
        facts: dict[str, Tensor],
        round_number: int,
    ) -> Tensor:
        """Compute keys [C] fp32 of candidates, not negative, from their estimates; the largest grow first.

        Args:
            name: of the weight.
            columns: I.
            indices: [C] flat.
            mean: [C] fp32, estimate of the gradient (Eq. 8).
            mean_square: [C] fp32, of its square.
            facts: of `propose`.
            round_number: of this drop and grow.

        Raises:
            ValueError: a score is NaN or negative.
        """
        score = self.rule.of(batches=self.estimation_steps)
        keys = self.rule.keys(
            name,
            columns,
            round_number,
            indices,
            score=score,
            mean=mean,
            mean_square=mean_square,
            margins=Margins(facts[ROW_RMS], facts[COLUMN_RMS]) if ROW_RMS in facts else None,
            weight=facts.get(WEIGHT),
        )
        if wrong := int((~(keys >= 0)).sum()):
            raise ValueError(f"score '{score.name}': got NaN or a negative number for {wrong} candidates of '{name}'")
        return keys


def _any(parts: Parts, part: Tensor) -> bool:
    """Return True if an entry of a sum over the processes is not 0, in the part [n] of any of them."""
    found = part.any().float().view(1)
    parts.sum_(found, "proposal")
    return bool(found)
