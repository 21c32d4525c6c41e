"""The names of weights in a checkpoint's files, where transformers' model classes use others."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping

import torch
from torch import nn

from scale_sft.errors import UserError


def unwrapped(model: nn.Module) -> nn.Module:
    """Take the wrappers of DeepSpeed and DistributedDataParallel off a model."""
    while isinstance(inner := model._modules.get("module"), nn.Module):
        model = inner
    return model


def names_on_disk(model: nn.Module, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, str]:
    """Map names in the state dict to those in the files that `save_pretrained` would write.

    Raises:
        UserError: a weight is cut or fused on its way to the files, so its entries have no place of their own there.
    """
    found = {name: name_on_disk(model, name, shape) for name, shape in shapes.items()}
    lost = [name for name, stored in found.items() if stored is None]
    if lost:
        raise UserError(
            f"sync: got '{lost[0]}', which the checkpoint's files hold fused or in pieces; expected a weight that they "
            "hold as it is. Fix: leave it out of target_modules"
        )
    return {name: str(stored) for name, stored in found.items()}


def name_on_disk(model: nn.Module, name: str, shape: tuple[int, ...]) -> str | None:
    """Find the name of one weight in the files; None if it is not there as it is in the model."""
    try:
        from transformers import PreTrainedModel
        from transformers.core_model_loading import revert_weight_conversion
    except ImportError:  # a transformers without conversions writes the names of the state dict
        return name
    if not isinstance(model, PreTrainedModel):
        return name
    probe = torch.empty(shape, device="meta")
    with contextlib.suppress(Exception):  # a conversion of several weights does not take one alone
        ((stored, tensor),) = revert_weight_conversion(model, {name: probe}).items()
        if tensor is probe:
            return str(stored)
    return None
