"""An adapter folder that PEFT and this package both read: tensors named as in `adapters.format`, facts in its config.

Shapes: K active entries of a weight.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from scale_sft.adapters.format import FORMAT, Adapter, absolute_base
from scale_sft.errors import UserError
from scale_sft.model.fingerprints import combine_fingerprints
from scale_sft.model.resident import ROUNDING_RULE
from scale_sft.spiel.indices import wrong_with_indices
from scale_sft.version import __version__

from .layer import Linear

_LEAVES = {"spiel_values": "deltas", "spiel_indices": "indices"}
_PEFT_PREFIX = "base_model.model."


def key_in_file(key: str) -> str:
    """Name a tensor as `adapters.format` does: 'base_model.model.PATH.spiel_values' -> 'PATH.weight.deltas'."""
    path, _, leaf = key.rpartition(".")
    return f"{path.removeprefix(_PEFT_PREFIX)}.weight.{_LEAVES[leaf]}" if leaf in _LEAVES else key


def bring_up_to_date(config: Any, adapter: str, layers: Sequence[Linear]) -> None:
    """Bring the facts in an adapter's config up to date, before it is saved."""
    prints = {layer.weight_name: layer.fingerprint() for layer in layers}
    shapes = {layer.weight_name: layer.shape for layer in layers}
    counts = {layer.weight_name: layer.spiel_values[adapter].numel() for layer in layers}
    base = config.base_model_name_or_path or ""
    config.facts = {
        **(config.facts or {}),
        "format": FORMAT,
        "scale_sft_version": __version__,
        "rounding_rule": ROUNDING_RULE,
        "base": absolute_base(base) if base else "",
        "dtype": str(layers[0].weight.dtype).removeprefix("torch."),
        "base_hash": combine_fingerprints(prints, shapes),
        "base_fingerprints": {name: f"{a:016x}{b:016x}" for name, (a, b) in prints.items()},
        "active_entries": sum(counts.values()),
        "shapes": {name: list(shape) for name, shape in shapes.items()},
    }
    config.entries_per_weight = counts


def check_loaded(state: Mapping[str, Tensor], config: Any, adapter: str, layers: Sequence[Linear]) -> None:
    """Check all tensors of an adapter's file against the model, before any of them is loaded.

    Raises:
        UserError: the base is another one, a weight or its entries are missing, of another number or damaged.
    """
    names = [layer.weight_name for layer in layers]
    tensors = {key: tensor for key, tensor in state.items() if key.endswith((".weight.deltas", ".weight.indices"))}
    expected = {f"{name}.{kind}" for name in names for kind in _LEAVES.values()}
    if set(tensors) != expected:
        odd = sorted(set(tensors) ^ expected)[0]
        where = "is not in the model's adapter" if odd in tensors else "is missing"
        raise UserError(
            f"adapter: '{odd}' {where}. Fix: use the target_modules of the adapter, or PeftModel.from_pretrained"
        )
    require_base(layers, config.facts or {})
    for name, layer in zip(names, layers, strict=True):
        check_entries(layer, adapter, tensors[f"{name}.indices"], tensors[f"{name}.deltas"])


def check_entries(layer: Linear, adapter: str, indices: Tensor, deltas: Tensor, *, resize: bool = False) -> None:
    """Raise UserError unless indices [K] and deltas [K] can be those of a layer's adapter.

    Args:
        layer: the layer.
        adapter: one of its adapters.
        indices: from a file. deltas: from a file.
        resize: K may be another than the adapter's.
    """
    name, own = layer.weight_name, layer.spiel_values[adapter].numel()
    wrong = wrong_with_indices(indices, layer.shape)
    if indices.shape != deltas.shape:
        wrong = wrong or f"{tuple(indices.shape)} indices for {tuple(deltas.shape)} deltas"
    elif deltas.numel() != own and not resize:
        wrong = wrong or (
            f"got {deltas.numel():,} entries, expected {own:,} as in adapter '{adapter}'. Fix: use the density of the "
            "checkpoint"
        )
    elif not bool(torch.isfinite(deltas).all()):
        wrong = wrong or "a delta is not a finite number"
    if wrong:
        raise UserError(f"adapter: weight '{name}': {wrong}")


def require_base(layers: Sequence[Linear], facts: Mapping[str, Any]) -> None:
    """Raise UserError if an adapter's facts say that it was trained on other weights; without any, all pass."""
    prints, dtype = facts.get("base_fingerprints") or {}, facts.get("dtype")
    for layer in layers:
        name = layer.weight_name
        has = str(layer.weight.dtype).removeprefix("torch.")
        if dtype is not None and has != dtype:
            raise UserError(f"adapter: '{name}' is in {has}, expected {dtype}, in which the adapter was trained")
        if layer.weight.is_meta or name not in prints:
            continue
        found = "{:016x}{:016x}".format(*layer.fingerprint())
        if found != prints[name]:
            raise UserError(
                f"adapter: got another base, not the one it was trained on ('{facts.get('base')}'): the fingerprint of "
                f"'{name}' is {found[:16]}..., expected {prints[name][:16]}..."
            )


def replace_entries(layers: Sequence[Linear], adapter: str, new: Adapter) -> None:
    """Give an adapter of these layers the entries of another, after checking all of them.

    Raises:
        UserError: it is of another base, or of other weights.
    """
    if odd := sorted({layer.weight_name for layer in layers} ^ set(new.shapes)):
        raise UserError(f"hotswap: the adapters differ in '{odd[0]}'. Fix: load_adapter adds it under another name")
    require_base(layers, new.info)
    for layer in layers:
        check_entries(layer, adapter, new.indices[layer.weight_name], new.deltas[layer.weight_name], resize=True)
    for layer in layers:
        layer.replace(adapter, new.indices[layer.weight_name], new.deltas[layer.weight_name].float())
