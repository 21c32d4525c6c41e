"""A score and a draw, applied to one weight or a part of it: keys, of which the largest are the choice.

Shapes: O rows, I columns of a weight; n entries of a part of it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from ..indices import pieces
from .draws import is_top, sample_keys, stream, top_keys
from .evidence import Margins, gather_evidence
from .scores import Score, score_named

PART_ENTRIES = 1 << 20
"""Entries that are scored at a time: temporaries stay near 100 bytes for each of them."""


@dataclass(frozen=True, kw_only=True)
class SelectionRule:
    """What to choose by: a score, a draw, and caps for rows and columns.

    Raises:
        ValueError: the score is unknown, or the temperature is below 0 or NaN.
    """

    score: str = "gradient"
    temperature: float = math.inf
    """The draw: infinite takes the best, finite samples in proportion to score^temperature, 0 is uniform."""
    seed: int = 0
    row_quota: float | None = None
    """The most entries in a row, in units of the mean of all rows; None: no cap. First choice only."""
    column_quota: float | None = None

    def __post_init__(self) -> None:
        score_named(self.score)
        if not self.temperature >= 0:
            raise ValueError(f"temperature: got {self.temperature}, expected a number of at least 0")

    @property
    def is_plain(self) -> bool:
        """True for the largest gradients, as in the paper: keys are then the gradient's magnitudes."""
        return self.score == "gradient" and is_top(self.temperature)

    def of(self, *, batches: int) -> Score:
        """Return the score that applies to a mean over so many batches."""
        score = score_named(self.score)
        return score_named(score.from_one) if batches == 1 and score.from_one else score

    def keys(
        self,
        name: str,
        columns: int,
        round_number: int,
        indices: Tensor | slice,
        *,
        score: Score,
        mean: Tensor | None = None,
        mean_square: Tensor | None = None,
        margins: Margins | None = None,
        weight: Tensor | None = None,
        device: torch.device | None = None,
    ) -> Tensor:
        """Compute the keys [n] fp32 of entries of weight `name`: not negative, NaN where the score is NaN.

        Args:
            name: decides the noise, with `seed` and `round_number`.
            columns: I.
            round_number: 0 for the first choice, then the number of the reallocation.
            indices: flat, [n], or a slice of them all.
            score: see `of`.
            mean: [n] of the gradient; what `score` does not read may be None.
            mean_square: [n] of its square.
            margins: of the whole weight.
            weight: [n].
            device: of the keys, where no tensor is given.
        """
        given = {"mean": mean, "mean_square": mean_square, "weight": weight}
        known = [tensor for tensor in (mean, mean_square, weight) if tensor is not None]
        if isinstance(indices, slice):
            count, device = indices.stop - indices.start, known[0].device if known else device
        else:
            count, device = indices.numel(), indices.device
        temperature = 0.0 if score.name == "random" else self.temperature
        noise_keys = stream(self.seed, name, round_number)
        found = torch.empty(count, dtype=torch.float32, device=device)
        for part in pieces(count, PART_ENTRIES):
            if isinstance(indices, slice):
                places = torch.arange(indices.start + part.start, indices.start + part.stop, device=device)
            else:
                places = indices[part].long()
            here = {kind: None if tensor is None else tensor[part] for kind, tensor in given.items()}
            scores = score.function(gather_evidence(places, columns, margins=margins, **here))
            if scores.shape != places.shape:
                raise ValueError(
                    f"score '{score.name}': got {tuple(scores.shape)} for {places.numel()} entries, expected one each"
                )
            if is_top(temperature):
                found[part] = top_keys(scores)
            else:
                found[part] = sample_keys(scores, places, temperature, noise_keys)
        return found

    def quotas(self, count: int, shape: tuple[int, int]) -> tuple[int, int] | None:
        """Compute the caps (entries in a row, entries in a column) for `count` entries of an [O, I] weight, or None."""
        if self.row_quota is None and self.column_quota is None:
            return None
        rows, columns = shape
        in_row = columns if self.row_quota is None else min(columns, math.ceil(self.row_quota * count / rows))
        in_column = rows if self.column_quota is None else min(rows, math.ceil(self.column_quota * count / columns))
        return in_row, in_column
