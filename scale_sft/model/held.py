"""Targets in a model, by name: whole parameters, and experts' slices of fused ones."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from scale_sft.spiel.taps import shape_of

from .experts import parse_slice
from .resident import WeightPart


@dataclass(frozen=True)
class Held:
    """A target as a model holds it now: a parameter, or one expert's slice of a fused one."""

    parameter: nn.Parameter
    number: int | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        """The target's shape; whole, if the parameter is in shards."""
        shape = shape_of(self.parameter)
        return shape if self.number is None else shape[1:]

    @property
    def dtype(self) -> torch.dtype:
        return self.parameter.dtype

    @property
    def device(self) -> torch.device:
        return self.parameter.device

    @property
    def entries(self) -> Tensor:
        """A 1-D view of all entries, in place. Take it each time: the parameter may have moved."""
        data = self.parameter.data
        return (data if self.number is None else data[self.number]).view(-1)


def parts_held(
    weights: Mapping[str, Held], part_of: Callable[[nn.Parameter], WeightPart] = WeightPart.whole
) -> dict[str, WeightPart]:
    """Describe what this process holds of some targets, by name.

    Args:
        weights: by name.
        part_of: describes a whole parameter.
    """
    whole: dict[int, WeightPart] = {}
    parts = {}
    for name, held in weights.items():
        key = id(held.parameter)
        if key not in whole:
            whole[key] = part_of(held.parameter)
        part = whole[key]
        if held.number is not None:
            entries = held.shape[0] * held.shape[1]
            part = part.cut(held.number * entries, entries)
        parts[name] = part
    return parts


def held_weight(parameters: Mapping[str, nn.Parameter], name: str) -> Held | None:
    """Find a target among the parameters of a model by its name; None: there is no such parameter or slice."""
    if name in parameters:
        return Held(parameters[name])
    found = parse_slice(name)
    if found is None or found[0] not in parameters:
        return None
    parameter, number = parameters[found[0]], found[1]
    shape = shape_of(parameter)
    return Held(parameter, number) if len(shape) == 3 and number < shape[0] else None
