"""Carry the state of somebody else's optimizer across drop and grow.

Differs from `spiel.optimizers.AdamW`: torch's optimizers count steps once per parameter and not once per cohort of
entries. Seeds are therefore scaled to the parameter's own count, so that a grown entry's bias-corrected moments are its
estimates of Eq. 8, as with cohorts; from then on a young entry's moments move as slowly as an old one's.
Shapes: K active entries of a weight, g of them newly grown.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from math import inf
from typing import Any

import torch
from torch import Tensor, nn

from scale_sft.errors import UserError
from scale_sft.spiel.drop_grow import Exchange
from scale_sft.spiel.schedules import ReallocationSchedule

Seed = Callable[[Any, float, Tensor, Tensor], Tensor]
"""(the option, steps, mean [g], mean square [g]) -> the state of grown entries [g]."""


def _first(betas: tuple[float, float], steps: float, mean: Tensor, square: Tensor) -> Tensor:
    return mean * (1 - betas[0] ** steps)


def _second(betas: tuple[float, float], steps: float, mean: Tensor, square: Tensor) -> Tensor:
    return square * (1 - betas[1] ** steps)


def _smoothed(alpha: float, steps: float, mean: Tensor, square: Tensor) -> Tensor:
    return square * (1 - alpha**steps)


def _mean(momentum: float, steps: float, mean: Tensor, square: Tensor) -> Tensor:
    return mean


INTERVAL = "update_interval_steps"
"""Key in the state of a session."""

SEEDS: dict[str, tuple[str, Seed]] = {
    "exp_avg": ("betas", _first),  # Adam, AdamW, NAdam, RAdam, Lion
    "exp_avg_sq": ("betas", _second),
    "max_exp_avg_sq": ("betas", _second),
    "square_avg": ("alpha", _smoothed),  # RMSprop
    "momentum_buffer": ("momentum", _mean),  # SGD, RMSprop
}
"""State tensors [K] that can be carried: the option of the optimizer they depend on, and how grown entries start."""


def require_same_interval(state: Mapping[str, Any], schedule: ReallocationSchedule | None) -> None:
    """Raise UserError if a training that reallocates again and again is resumed with another interval than it had."""
    if schedule is None or schedule.only_first:
        return
    now = schedule.update_interval_steps
    before = state.get(INTERVAL, now)  # older states do not tell
    if now != before:
        raise UserError(
            f"update_interval_steps: got {now}, expected {before}, with which the checkpoint's training began. Fix: "
            f"SpielConfig(update_interval_steps={before})"
        )


def refuse_foreign(optimizer: torch.optim.Optimizer, values: nn.Parameter, mode: str) -> None:
    """Raise UserError for an optimizer whose state cannot follow drop and grow; mode `reset` accepts every one."""
    if mode == "reset":
        return
    kind, state = type(optimizer).__name__, optimizer.state.get(values, {})
    group = group_of(optimizer, values)
    for key, tensor in state.items():
        if not isinstance(tensor, Tensor) or tensor.numel() <= 1:
            continue
        fits = tensor.shape == values.shape and tensor.is_floating_point()
        if fits and key in SEEDS and SEEDS[key][0] in group:
            continue
        odd = (
            f" without the option '{SEEDS[key][0]}' that says how grown entries begin" if fits and key in SEEDS else ""
        )
        raise UserError(
            f"optimizer_state: {kind} keeps '{key}'{odd} ({str(tensor.dtype).removeprefix('torch.')} "
            f"{tuple(tensor.shape)}), expected one of {', '.join(SEEDS)} with a number for each entry. Fix: "
            "SpielConfig(optimizer_state='reset'), or method='random', or AdamW"
        )


def group_of(optimizer: torch.optim.Optimizer, values: nn.Parameter) -> dict[str, Any]:
    """Return the parameter group of a parameter.

    Raises:
        UserError: the optimizer does not have it.
    """
    found = next((group for group in optimizer.param_groups if any(one is values for one in group["params"])), None)
    if found is None:
        raise UserError(
            "optimizer: got one without the adapter's deltas, expected one made after get_peft_model. Fix: make it "
            "from the PEFT model's parameters()"
        )
    return found


@torch.no_grad()
def follow(
    optimizer: torch.optim.Optimizer, values: nn.Parameter, exchange: Exchange, mean: Tensor, square: Tensor, mode: str
) -> None:
    """Move a parameter's state with its entries, in place; grown ones are seeded from their estimates (section 3.2).

    Args:
        optimizer: holds the parameter.
        values: the parameter [K].
        exchange: of its entries.
        mean: [C] fp32, estimate of Eq. 8. square: [C] fp32, of its square.
        mode: `carry`, or `reset`, which forgets the state of this parameter.
    """
    state = optimizer.state.get(values)
    if not state:
        return
    if mode == "reset":
        del optimizer.state[values]
        return
    group, picked = group_of(optimizer, values), exchange.grown_candidates
    steps = float(state.get("step", inf))  # without a count there is no bias correction
    for key, tensor in state.items():
        if isinstance(tensor, Tensor) and key in SEEDS and tensor.shape == values.shape:
            option, seed = SEEDS[key]
            tensor.copy_(exchange.merge(tensor, seed(group[option], steps, mean[picked], square[picked])))
