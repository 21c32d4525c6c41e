"""The deltas among a model's parameters, for optimizers, schedulers and DistributedDataParallel of other libraries."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, NoReturn

import torch
from torch import nn

from scale_sft.errors import UserError
from scale_sft.spiel.taps import share_anchor

PARAMETER = "sparse_deltas"
"""Name under which a model's `parameters()` list the deltas of an attached `SparseModel`."""

ANCHOR = "sparse_anchor"
"""Name of one number, always 0: the part of the model that DistributedDataParallel sees train."""

_IGNORED = "_ddp_params_and_buffers_to_ignore"
_OWN = (PARAMETER, f".{PARAMETER}")  # DistributedDataParallel looks for both: a path of "" joined to a name


class Exposure:
    """The two parameters that an attached model lists, and the hooks that keep them out of its state dicts.

    `PARAMETER` holds the deltas. Its gradient does not come from autograd and is averaged over processes by the
    optimizer's step, so DistributedDataParallel is told to ignore it. DistributedDataParallel refuses models of which
    nothing is left: `ANCHOR` is in the graph of every tapped layer, gets no gradient and never changes.

    Args:
        model: lists the parameters until `remove`.
        parameter: the deltas.
        tapped: all layers with a tap.
        loaded: called after the model has loaded a state dict.
    """

    def __init__(
        self, model: nn.Module, parameter: nn.Parameter, tapped: Iterable[nn.Module], loaded: Callable[[], None]
    ):
        self.model = model
        anchor = nn.Parameter(torch.zeros((), device=parameter.device))
        parameter.__deepcopy__ = _refuse_copy  # type: ignore[method-assign]
        model.register_parameter(PARAMETER, parameter)
        model.register_parameter(ANCHOR, anchor)
        for module in tapped:
            share_anchor(module, anchor)
        setattr(model, _IGNORED, [*getattr(model, _IGNORED, ()), *_OWN])

        def after_load(module: nn.Module, incompatible: Any) -> None:
            _do_not_miss(incompatible)
            loaded()

        self._hooks = [
            model.register_state_dict_post_hook(_leave_out),
            model.register_load_state_dict_post_hook(after_load),
        ]

    def remove(self) -> None:
        """Take the parameters and the hooks out of the model."""
        for hook in self._hooks:
            hook.remove()
        for name in (PARAMETER, ANCHOR):
            del self.model._parameters[name]
        rest = [name for name in getattr(self.model, _IGNORED) if name not in _OWN]
        if rest:
            setattr(self.model, _IGNORED, rest)
        else:
            delattr(self.model, _IGNORED)


def carries_deltas(model: nn.Module) -> bool:
    """Return True if the model lists the deltas of an attached `SparseModel`."""
    return PARAMETER in model._parameters


def _refuse_copy(memo: Any) -> NoReturn:
    """Refuse copy.deepcopy of an attached model: the copy's layers would go on calling the original's taps."""
    raise UserError(
        "deepcopy: got a model with attached deltas, expected none, as a copy would share them. Fix: detach() before, "
        "or load the base again and attach it"
    )


def _leave_out(module: nn.Module, state: dict[str, Any], prefix: str, _: Any) -> None:
    """Keep the deltas out of a state dict: the weights hold them already, and the base has no such entry."""
    for name in (PARAMETER, ANCHOR):
        state.pop(prefix + name, None)


def _do_not_miss(incompatible: Any) -> None:
    """Accept a state dict without the deltas, as every state dict is."""
    missing = incompatible.missing_keys
    missing[:] = [key for key in missing if key.rpartition(".")[2] not in (PARAMETER, ANCHOR)]
