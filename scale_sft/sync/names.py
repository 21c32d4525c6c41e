"""The names of weights in a checkpoint's files, where transformers' model classes use others."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import nn

from scale_sft.errors import UserError
from scale_sft.model.experts import parse_slice
from scale_sft.spiel.taps import shape_of


def unwrapped(model: nn.Module) -> nn.Module:
    """Take the wrappers of DeepSpeed and DistributedDataParallel off a model."""
    while isinstance(inner := model._modules.get("module"), nn.Module):
        model = inner
    return model


@dataclass(frozen=True)
class Piece:
    """A tensor of the files [rows, I]: all of a weight [O, I] of the model, or consecutive rows of it."""

    name: str  # in the files
    shape: tuple[int, int]
    first: int = 0  # flat index in the weight of its first entry

    @property
    def last(self) -> int:
        """Flat index in the weight after its last entry."""
        return self.first + self.shape[0] * self.shape[1]


def pieces_on_disk(model: nn.Module, shapes: Mapping[str, tuple[int, int]]) -> dict[str, tuple[Piece, ...]]:
    """Map weights of the model to the tensors in the files that `save_pretrained` would write.

    An expert's slice of a fused parameter is one tensor there, or two: `gate_up_proj.3` is `3.gate_proj.weight` and
    `3.up_proj.weight`.

    Raises:
        UserError: a weight is cut or fused on its way to the files, so its entries have no place of their own there.
    """
    fused: dict[str, dict[int, tuple[Piece, ...]]] = {}
    found: dict[str, tuple[Piece, ...]] = {}
    for name, shape in shapes.items():
        parameter, number = parse_slice(name) or (None, 0)
        if parameter is None:
            stored = name_on_disk(model, name, shape)
            found[name] = (Piece(stored, shape),) if stored is not None else ()
            continue
        if parameter not in fused:
            fused[parameter] = expert_pieces(model, parameter)
        found[name] = fused[parameter].get(number, ())
    lost = [name for name, pieces in found.items() if not pieces]
    if lost:
        if parse_slice(lost[0]):
            raise UserError(
                f"sync: got '{lost[0]}', but the checkpoint's files hold all experts in one tensor; expected a tensor "
                "for each expert. Fix: send the adapter (sparse.save), or leave the experts out by exclude_modules"
            )
        raise UserError(
            f"sync: got '{lost[0]}', which the checkpoint's files hold fused or in pieces; expected a weight that they "
            "hold as it is. Fix: leave it out of target_modules"
        )
    return found


def expert_pieces(model: nn.Module, parameter: str) -> dict[int, tuple[Piece, ...]]:
    """Find the tensors in the files that hold each expert of a fused parameter [E, R, C], by the expert's number.

    transformers converts a parameter whose entries are the numbers of their rows, so the tensors say what they hold.
    Nothing is found where they do not hold whole rows of one expert in their order.
    """
    from transformers.core_model_loading import revert_weight_conversion

    experts, rows, columns = shape_of(model.get_parameter(parameter))
    labels = torch.arange(experts * rows).view(experts, rows, 1)
    try:
        stored = revert_weight_conversion(model, {parameter: labels})
    except Exception:  # the conversion is code of transformers: what it cannot do is no place in the files
        return {}
    pieces: dict[int, list[Piece]] = {}
    covered = 0
    for name, found in stored.items():
        if found.dim() != 2 or found.shape[1] != 1:
            return {}
        number, row = divmod(int(found[0, 0]), rows)
        height = found.shape[0]
        if row + height > rows or not torch.equal(found[:, 0], torch.arange(height) + number * rows + row):
            return {}
        pieces.setdefault(number, []).append(Piece(name, (height, columns), row * columns))
        covered += height
    return {number: tuple(found) for number, found in pieces.items()} if covered == experts * rows else {}


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
