"""The loss that balances the load of experts (Switch Transformer, Eq. 4 to 6), as the model's own class computes it."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from scale_sft.errors import UserError

from .empty import text_config

_ARGUMENT = "output_router_logits"
_COEFFICIENTS = ("router_aux_loss_coef", "aux_loss_coef", "moe_loss_weight")
"""Names of the loss's weight: in a model, or in its configuration."""


@dataclass(frozen=True)
class RouterLoss:
    """The balancing loss of a model, taken from its forward passes.

    Args:
        coefficient: its weight, as the model's class multiplies it.
    """

    coefficient: float

    @contextmanager
    def taken(self, model: nn.Module) -> Iterator[list[Tensor]]:
        """Collect the unweighted loss of each forward pass inside the block; give them `inputs`."""
        found: list[Tensor] = []
        hook = model.register_forward_hook(lambda module, arguments, output: found.append(output.aux_loss))
        try:
            yield found
        finally:
            hook.remove()

    @property
    def inputs(self) -> dict[str, Any]:
        """The arguments with which the model computes it."""
        return {_ARGUMENT: True}


def router_loss_of(model: Any, wanted: str) -> RouterLoss | None:
    """Choose the balancing loss of a model, with its weights or without; None: it is not part of the loss.

    Args:
        wanted: true, false, or auto: as the model's configuration says.

    Raises:
        UserError: `wanted` is true, and the model has no such loss.
    """
    config = text_config(model.config)
    coefficient = next(
        (
            float(value)
            for owner in (model, config, model.config)
            for name in _COEFFICIENTS
            if isinstance(value := getattr(owner, name, None), int | float)
        ),
        None,
    )
    has = coefficient is not None and _ARGUMENT in inspect.signature(type(model).forward).parameters
    if wanted == "true" and not has:
        raise UserError(
            f"router_aux_loss: got true, expected false, as {type(model).__name__} computes no loss that balances its "
            "experts. Fix: --router_aux_loss false"
        )
    asked = wanted == "true" or (wanted == "auto" and bool(getattr(config, _ARGUMENT, False)))
    return RouterLoss(coefficient) if has and asked and coefficient is not None else None
