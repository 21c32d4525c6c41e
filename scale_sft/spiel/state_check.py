"""Explain why saved tensors cannot be the state of a weight's deltas.

Shapes: K active entries.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from .deltas import SparseDelta
from .indices import wrong_with_indices

Expected = Mapping[str, tuple[tuple[int, ...], torch.dtype]]
"""Shape and dtype of each tensor by name."""


def wrong_with(delta: SparseDelta, state: Mapping[str, Tensor], expected: Expected, cohorts: int) -> str | None:
    """Explain why `state` cannot be one weight's state with this many cohorts; None if it can be."""
    found = {kind: (tuple(tensor.shape), tensor.dtype) for kind, tensor in state.items()}
    if found != expected:
        kind = next(kind for kind in {**expected, **found} if expected.get(kind) != found.get(kind))
        return f"{kind} is {found.get(kind, 'missing')}, expected {expected.get(kind, 'none')}"
    for kind, tensor in state.items():
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            return f"{kind} holds a NaN or an infinite value"
        if kind.endswith("indices") and (wrong := wrong_with_indices(tensor, delta.shape)):
            return f"{kind}: {wrong}"
    if delta.tiles is not None:
        try:
            delta.tiles.tiling.chosen_in(state["indices"])
        except ValueError as error:
            return f"indices: {error}"
    if int(state["cohort"].max()) >= cohorts or int(state["cohort"].min()) < 0:
        return f"an entry has an unknown cohort: there are {cohorts}"
    return None
