"""How much an entry promises to learn: a number of at least 0, from its gradient and its weight.

A score is a function of `Evidence`, entry by entry: tensors [n] in, a tensor [n] out. To add one:

    >>> from scale_sft.spiel.selection.scores import register
    >>> @register("gradient_minus_decay", reads={"gradient", "weight"})
    ... def score(evidence):
    ...     return (evidence.mean.abs() - 0.01 * evidence.weight.abs()).clamp(min=0)

Then `score="gradient_minus_decay"` names it in `scale_sft.attach` and `scale_sft.train`. Entries with a score of 0 are
chosen only if there are too few others. The function sees parts of a weight, so it must treat each entry by itself;
`row_rms` and `column_rms` are what it may know about the rest.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass
from difflib import get_close_matches

import torch
from torch import Tensor

from .evidence import Evidence

READS = ("gradient", "squares", "margins", "weight")
"""What a score may ask for: the mean gradient, the mean of its squares, rms over row and column, and the weight."""


@dataclass(frozen=True)
class Score:
    """A named score.

    `reads` lists what it needs of `READS`: what nobody reads is neither summed nor kept.
    """

    name: str
    function: Callable[[Evidence], Tensor]
    reads: frozenset[str]
    from_one: str | None = None
    """The score that stands in for this one where a single batch is all there is; None: this one."""

    @property
    def reads_gradients(self) -> bool:
        """True if it cannot be computed without a look at gradients."""
        return bool(self.reads - {"weight"})


_SCORES: dict[str, Score] = {}


def register(
    name: str, *, reads: Collection[str], from_one: str | None = None
) -> Callable[[Callable[[Evidence], Tensor]], Callable[[Evidence], Tensor]]:
    """Add a score, as a decorator of its function.

    Args:
        name: as option `score` gives it.
        reads: of `READS`; other fields of the evidence are None.
        from_one: the score to use with a single batch.

    Raises:
        ValueError: the name is taken, or `reads` asks for something unknown.
    """
    if name in _SCORES:
        raise ValueError(f"score: got '{name}' twice, expected a new name")
    if unknown := sorted(set(reads) - set(READS)):
        raise ValueError(f"score '{name}': reads: got {', '.join(unknown)}, expected some of {', '.join(READS)}")

    def add(function: Callable[[Evidence], Tensor]) -> Callable[[Evidence], Tensor]:
        _SCORES[name] = Score(name, function, frozenset(reads), from_one)
        return function

    return add


def score_named(name: str) -> Score:
    """Look up a score.

    Raises:
        ValueError: there is none of this name.
    """
    if name not in _SCORES:
        close = get_close_matches(name, _SCORES, n=1)
        hint = f"did you mean '{close[0]}'?" if close else "register it first: scale_sft.spiel.selection.scores"
        raise ValueError(f"score: got '{name}', expected one of {', '.join(_SCORES)}. Fix: {hint}")
    return _SCORES[name]


@register("gradient", reads={"gradient"})
def gradient(evidence: Evidence) -> Tensor:
    """Score by |mean gradient|: the paper's choice, and the steepest descent for a given number of entries."""
    return evidence.mean.abs()


@register("snr", reads={"gradient", "squares"}, from_one="gradient")
def snr(evidence: Evidence) -> Tensor:
    """Score by signal to noise over batches: |mean| / sqrt(mean of squares), in [0, 1]; 0 where all gradients are 0.

    It orders entries as |mean| / standard deviation does.
    """
    squares = evidence.mean_square.sqrt()
    return torch.where(squares > 0, evidence.mean.abs() / squares, 0.0)


@register("balanced", reads={"gradient", "margins"})
def balanced(evidence: Evidence) -> Tensor:
    """Score by |mean gradient| / sqrt(rms of its row x rms of its column): spread where `gradient` crowds."""
    scale = (evidence.row_rms * evidence.column_rms).sqrt()
    return torch.where(scale > 0, evidence.mean.abs() / scale, 0.0)


@register("weight", reads={"weight"})
def weight(evidence: Evidence) -> Tensor:
    """Score by |weight|."""
    return evidence.weight.abs()


@register("gradient_weight", reads={"gradient", "weight"})
def gradient_weight(evidence: Evidence) -> Tensor:
    """Score by |gradient x weight|, the change of the loss if the weight went to 0, to first order."""
    return (evidence.mean * evidence.weight).abs()


@register("random", reads=())
def random(evidence: Evidence) -> Tensor:
    """Score all entries alike; the draw is then always a uniform sample."""
    return torch.ones(evidence.count, device=evidence.device)
