"""Put an adapter into a model's weights and take it out again."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from scale_sft.errors import UserError
from scale_sft.model.experts import parse_slice
from scale_sft.model.fingerprints import combine_fingerprints, fingerprints_of
from scale_sft.model.resident import WeightPart, effective_values, read_entries, write_entries
from scale_sft.spiel.taps import shape_of

from .format import Adapter


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
        part = whole.setdefault(id(held.parameter), part_of(held.parameter))
        parts[name] = part if held.number is None else part.cut(held.number, held.shape[0] * held.shape[1])
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


def apply_adapter(model: nn.Module, adapter: Adapter) -> dict[str, Tensor]:
    """Write an adapter's effective values into a model's weights, in place, after checking everything.

    Returns:
        The base values that were there, by weight name: [K]; `undo_adapter` puts them back.

    Raises:
        UserError: a weight is missing or of another shape or dtype, or the base is not the adapter's.
    """
    weights = require_fit(dict(model.named_parameters(remove_duplicate=False)), adapter)
    require_base(fingerprints_of(parts_held(weights)), adapter)
    kept = {}
    for name, indices in adapter.indices.items():
        entries = weights[name].entries
        indices = indices.to(entries.device)
        kept[name] = read_entries(entries, indices)
        write_entries(entries, indices, effective_values(kept[name], adapter.deltas[name].to(entries.device)))
    return kept


def require_fit(parameters: Mapping[str, nn.Parameter], adapter: Adapter) -> dict[str, Held]:
    """Find the weights that an adapter belongs to, by name, among all parameters of a model.

    Raises:
        UserError: one is missing, or of another shape or dtype; or the adapter belongs to a quantised base.
    """
    if adapter.is_quantized:
        raise UserError(
            f"adapter: it was trained on a base in {adapter.info['quantization']} and cannot be written into packed "
            "weights; merge it (`scale-sft merge`) and load the merged model"
        )
    found = {}
    for name, shape in adapter.shapes.items():
        weight = held_weight(parameters, name)
        if weight is None:
            raise UserError(f"adapter: the model has no weight '{name}'; is it the adapter's base?")
        has, dtype = weight.shape, adapter.dtype_of(name)
        if has != shape or weight.dtype != dtype:
            raise UserError(
                f"adapter: weight '{name}' is {has} {weight.dtype} in the model, {shape} {dtype} in the adapter"
            )
        if weight.parameter.is_meta:
            raise UserError(f"adapter: weight '{name}' is not in memory (offloaded); load the model without offloading")
        found[name] = weight
    return found


def undo_adapter(model: nn.Module, adapter: Adapter, kept: Mapping[str, Tensor]) -> None:
    """Write the base values that `apply_adapter` returned back into the weights."""
    weights = require_fit(dict(model.named_parameters(remove_duplicate=False)), adapter)
    for name, values in kept.items():
        entries = weights[name].entries
        write_entries(entries, adapter.indices[name].to(entries.device), values)


def require_base(prints: Mapping[str, tuple[int, int]], adapter: Adapter, what: str = "") -> None:
    """Raise UserError if the fingerprints of the target weights are not those that the adapter was trained on.

    Args:
        what: the message in that case; default: that this is not the adapter's base.
    """
    found, expected = combine_fingerprints(prints, adapter.shapes), adapter.info["base_hash"]
    if found != expected:
        what = what or f"adapter: this base is not the one it was trained on ('{adapter.info['base']}')"
        raise UserError(f"{what}: the hash of the target weights is {found[:16]}..., expected {expected[:16]}...")
