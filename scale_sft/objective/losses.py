"""Losses of preference tuning: pure functions of log-probabilities of whole answers.

Notation: x a prompt; y_w the chosen answer, y_l the rejected one; pi the model, ref the reference. The log-ratio of an
answer is h(y) = log pi(y | x) - log ref(y | x), natural logarithm, summed over its target tokens.
Shapes: P pairs, N single answers. All tensors are fp32.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional


def dpo(margins: Tensor, beta: float, label_smoothing: float = 0.0) -> Tensor:
    """Compute the loss of each pair (Rafailov et al., 2023, Eq. 7): -log sigmoid(beta * margin), [P].

    With label smoothing e it is the robust loss (Chowdhury et al., 2024, Eq. 9), unbiased if a fraction e of the pairs
    is swapped: (-(1 - e) log sigmoid(z) + e log sigmoid(-z)) / (1 - 2 e) with z = beta * margin.

    Args:
        margins: h(y_w) - h(y_l), or that of h per token of each answer, [P].
        beta: above 0.
        label_smoothing: e in [0, 0.5).
    """
    z = beta * margins
    if not label_smoothing:
        return -functional.logsigmoid(z)
    right, wrong = functional.logsigmoid(z), functional.logsigmoid(-z)
    return (-(1 - label_smoothing) * right + label_smoothing * wrong) / (1 - 2 * label_smoothing)


def ipo(margins: Tensor, beta: float) -> Tensor:
    """Compute the loss of each pair (Azar et al., 2023, Eq. 17): (margin - 1 / (2 beta))^2, [P].

    Differs from the paper: margins are per token, h(y_w) / |y_w| - h(y_l) / |y_l|, as its authors and TRL compute them.
    """
    return (margins - 1 / (2 * beta)) ** 2


def orpo(chosen: Tensor, rejected: Tensor, beta: float) -> Tensor:
    """Compute the odds-ratio loss of each pair (Hong et al., 2024, Eq. 7): -beta log sigmoid(log odds ratio), [P].

    The cross entropy of the chosen answer (Eq. 6) is added elsewhere.

    Args:
        chosen: log pi(y_w | x) / |y_w|, [P]. rejected: log pi(y_l | x) / |y_l|, [P].
        beta: above 0, lambda in the paper.
    """
    log_odds_ratio = (chosen - rejected) - (_log1mexp(chosen) - _log1mexp(rejected))
    return -beta * functional.logsigmoid(log_odds_ratio)


def kto(
    log_ratios: Tensor, good: Tensor, divergence: float, beta: float, good_weight: float, bad_weight: float
) -> Tensor:
    """Compute the loss of each answer (Ethayarajh et al., 2024, Eq. 8), [N].

    w (1 - sigmoid(beta (h - z))) for a good answer, w (1 - sigmoid(beta (z - h))) for a bad one.

    Args:
        log_ratios: h, [N].
        good: whether each answer is good, [N] bool.
        divergence: z, the KL divergence from the reference, at least 0; it has no gradient.
        beta: above 0.
        good_weight, bad_weight: w.
    """
    distance = beta * torch.where(good, log_ratios - divergence, divergence - log_ratios)
    weights = torch.where(good, good_weight, bad_weight)
    return weights * (1 - torch.sigmoid(distance))


def _log1mexp(values: Tensor) -> Tensor:
    """Compute log(1 - exp(x)) of x < 0 without cancellation (Maechler, 2012); an x that rounds to 0 stays finite."""
    values = values.clamp(max=-1e-7)
    near = values > -0.6931472  # -log 2
    small = torch.log(-torch.expm1(torch.where(near, values, -1.0)))
    return torch.where(near, small, torch.log1p(-torch.exp(torch.where(near, -1.0, values))))
