"""Put an adapter into a model's weights and take it out again."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, nn

from scale_sft.errors import UserError
from scale_sft.model.fingerprints import combine_fingerprints, fingerprints_of
from scale_sft.model.held import Held, held_weight, parts_held
from scale_sft.model.resident import effective_values, read_entries, write_entries

from .format import Adapter


def apply_adapter(model: nn.Module, adapter: Adapter) -> dict[str, Tensor]:
    """Write an adapter's effective values into a model's weights, in place, after checking everything.

    Returns:
        The base values that were there, by weight name: [K]; `undo_adapter` puts them back.

    Raises:
        UserError: a weight is missing or of another shape or dtype, or the base is not the adapter's.
    """
    weights = require_fit(model, adapter)
    require_base(fingerprints_of(parts_held(weights)), adapter)
    kept = {}
    for name, indices in adapter.indices.items():
        entries = weights[name].entries
        indices = indices.to(entries.device)
        kept[name] = read_entries(entries, indices)
        write_entries(entries, indices, effective_values(kept[name], adapter.deltas[name].to(entries.device)))
    return kept


def require_fit(model: nn.Module, adapter: Adapter) -> dict[str, Held]:
    """Find the weights that an adapter belongs to, by name, among the parameters of a model.

    Raises:
        UserError: one is missing, or of another shape or dtype; or the adapter belongs to a quantised base.
    """
    if adapter.is_quantized:
        raise UserError(
            f"adapter: it was trained on a base in {adapter.info['quantization']} and cannot be written into packed "
            "weights; merge it (`scale-sft merge`) and load the merged model"
        )
    parameters = dict(model.named_parameters(remove_duplicate=False))
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
    weights = require_fit(model, adapter)
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
