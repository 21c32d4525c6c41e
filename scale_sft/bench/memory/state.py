"""Count training state: every tensor that a contestant reaches, by part, each storage once."""

from __future__ import annotations

import types
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

_NAMES = {
    "flat": "deltas",
    "deltas": "deltas",
    "indices": "indices",
    "entries": "indices",
    "_row_starts": "indices",
    "_columns": "indices",
    "first_entries": "indices",
    "columns_before": "indices",
    "cohort": "ages",
    "reference": "reference",
    "candidates": "candidates",
    "_base": "base values",
    "packed": "scales of the base",
}
"""Part names by attribute; the first such attribute on the path to a tensor counts."""
_ROOT_NAMES = {"optimizer": "moments", "adapter": "adapter"}
"""Part names by root, for paths without such an attribute; other tensors are named after their own attribute."""
_NO_STATE = (nn.Module, types.FunctionType, types.MethodType, types.BuiltinFunctionType, types.ModuleType, type,
             torch.Generator, str, bytes, int, float, bool, torch.dtype, torch.device)  # fmt: skip


def bytes_by_part(roots: Mapping[str, Any], base: Iterable[Tensor]) -> dict[str, int]:
    """Count the bytes of all tensors reachable from objects, except those that share storage with the base.

    Storage counts, regardless of a tensor's dtype and layout; the first of several tensors that share it names it.

    Args:
        roots: objects in the order of search, by the part name to use if no attribute on the path has one.
        base: all tensors that are not state.
    """
    seen = {_storage(tensor) for tensor in base}
    parts: dict[str, int] = {}
    for root, value in roots.items():
        for path, tensor in _tensors(value, (root,), set()):
            place = _storage(tensor)
            if place in seen or not tensor.untyped_storage().nbytes():
                continue
            seen.add(place)
            part = _part_of(path)
            parts[part] = parts.get(part, 0) + tensor.untyped_storage().nbytes()
    return parts


def tensors_of_model(model: nn.Module) -> Iterator[Tensor]:
    """Yield parameters, buffers, and the tensors attached to quantised parameters."""
    for tensor in (*model.parameters(), *model.buffers()):
        yield tensor
        yield from (found for _, found in _tensors(getattr(tensor, "quant_state", None), (), set()))
    for module in model.modules():  # scales that a layer keeps next to its parameter
        yield from (found for _, found in _tensors(getattr(module, "quant_state", None), (), set()))
        yield from (found for _, found in _tensors(getattr(module, "state", None), (), set()))


def _part_of(path: tuple[str, ...]) -> str:
    if path[:2] == ("recorder", "flat"):
        return "gradients"  # of active entries and, in the estimation phase, of candidates
    if path in (("optimizer", "rows"), ("optimizer", "columns")):
        return "accumulators"
    known = [_NAMES[word] for word in path[1:] if word in _NAMES]
    return known[0] if known else _ROOT_NAMES.get(path[0], path[-1])


def _storage(tensor: Tensor) -> tuple[torch.device, int]:
    return tensor.device, tensor.untyped_storage().data_ptr()


def _tensors(value: Any, path: tuple[str, ...], met: set[int]) -> Iterator[tuple[tuple[str, ...], Tensor]]:
    """Yield (attributes and text keys on the path, tensor) of everything reachable from an object, except modules."""
    if isinstance(value, Tensor):
        yield path, value
        return
    if value is None or isinstance(value, _NO_STATE) or id(value) in met:
        return
    met.add(id(value))
    if isinstance(value, Mapping):
        for key, one in value.items():
            yield from _tensors(one, (*path, key) if isinstance(key, str) else path, met)
    elif isinstance(value, (list, tuple, set, frozenset)):
        for one in value:
            yield from _tensors(one, path, met)
    else:
        for name in (*getattr(value, "__dict__", ()), *getattr(type(value), "__slots__", ())):
            yield from _tensors(getattr(value, name, None), (*path, name), met)
