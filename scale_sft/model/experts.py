"""Experts fused into one parameter [E, R, C]: each expert's slice is a weight of its own.

transformers keeps the experts of a layer in parameters `gate_up_proj` (or `up_proj`) and `down_proj`. Slice `e` is the
matrix of expert `e`, as stored: [O, I], or [I, O] where the class multiplies from the right. It is called by the
parameter's name and its number, `model.layers.0.mlp.experts.down_proj.17`, and is a contiguous part of the parameter:
entry i of the flattened slice is entry e * R * C + i of the flattened parameter.
Shapes: E experts; R rows, C columns of a slice.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, cast

from torch import Tensor, nn

from scale_sft.spiel.taps import shape_of

_PROJECTIONS: tuple[str, ...] = ("gate_up_proj", "up_proj", "down_proj")
_MARKS = ("has_gate", "has_bias", "is_transposed")
"""Attributes that transformers' `use_experts_implementation` gives to every module of a class that it decorates."""
_OTHERS: dict[str, tuple[tuple[str, ...], bool]] = {
    "Llama4TextExperts": (_PROJECTIONS, True),
    "JetMoeParallelExperts": (("weight",), False),
}
"""Classes without that decorator: (parameters, whether slices are [I, O]); see `expert_taps`."""


@dataclass(frozen=True)
class FusedWeight:
    """One parameter [E, R, C] that holds the same projection of all experts of a layer."""

    path: str  # of the module of experts
    module: nn.Module
    leaf: str  # the parameter's name in it
    transposed: bool  # slices are [I, O]

    @property
    def name(self) -> str:
        """The parameter's name in the model."""
        return f"{self.path}.{self.leaf}"

    @property
    def weight(self) -> nn.Parameter:
        """The parameter as stored: whole, or in shards."""
        return cast(nn.Parameter, getattr(self.module, self.leaf))

    @property
    def experts(self) -> int:
        """E."""
        return shape_of(self.weight)[0]

    @property
    def slice_shape(self) -> tuple[int, int]:
        """(R, C)."""
        _, rows, columns = shape_of(self.weight)
        return rows, columns

    def why_not(self) -> str | None:
        """Say why its slices cannot carry deltas; None: they can."""
        if getattr(self.module, "_is_expert_parallel", False):
            return "experts spread over processes by transformers"
        return None

    def slice_names(self) -> list[str]:
        """Name the slices, in their order."""
        return [slice_name(self.name, number) for number in range(self.experts)]


def fused_weights(model: nn.Module) -> Iterator[FusedWeight]:
    """Find the fused parameters of all experts that transformers' experts interface runs, in the model's order."""
    for path, module in model.named_modules():
        yield from fused_in(path, module)


def fused_in(path: str, module: Any) -> Iterator[FusedWeight]:
    """Find the fused parameters of one module."""
    if all(hasattr(module, mark) for mark in _MARKS):
        leaves, transposed = _PROJECTIONS, bool(module.is_transposed)
    elif type(module).__name__ in _OTHERS:
        leaves, transposed = _OTHERS[type(module).__name__]
    else:
        return
    for leaf in leaves:
        weight = module._parameters.get(leaf)
        if weight is not None and len(shape_of(weight)) == 3:
            yield FusedWeight(path, module, leaf, transposed)


# --- names --------------------------------------------------------------------------------------------------------


def slice_name(parameter: str, number: int) -> str:
    """Name slice `number` of a fused parameter, as targets and adapters do."""
    return f"{parameter}.{number}"


def parse_slice(name: str) -> tuple[str, int] | None:
    """Split a target's name into the fused parameter's name and the slice's number; None: it is a whole parameter."""
    parameter, _, number = name.rpartition(".")
    return (parameter, int(number)) if parameter and number.isdigit() else None


def layer_kind(name: str) -> str:
    """Name what a target's layer has in common with those of other blocks: q_proj; of a slice, experts.down_proj."""
    found = parse_slice(name)
    return ".".join(found[0].split(".")[-2:]) if found else name.split(".")[-2]


def weight_named(model: nn.Module, name: str) -> Tensor:
    """Return the weight of a target in a model that is not in shards: a view, without gradient, in place.

    Args:
        name: of a parameter, or of a slice [R, C] of a fused one.

    Raises:
        AttributeError: the model has no such parameter. IndexError: the parameter has no such slice.
    """
    found = parse_slice(name)
    if found is None:
        return model.get_parameter(name).detach()
    parameter, number = found
    return model.get_parameter(parameter).detach()[number]


def named_weights(model: nn.Module) -> dict[str, Tensor]:
    """Return every parameter of a model that is not in shards, and every slice of the fused ones, by name: views."""
    weights = {name: weight.detach() for name, weight in model.named_parameters()}
    for fused in fused_weights(model):
        weights |= dict(zip(fused.slice_names(), fused.weight.detach().unbind(0), strict=True))
    return weights
