"""Combine adapters of one model: weighted sums, and TIES and DARE by name, on the union of their entries.

Shapes: K active entries of a weight in one adapter, U in the union.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from peft.utils.merge_utils import dare_linear, dare_ties, magnitude_prune, ties
from torch import Tensor

from scale_sft.errors import UserError

from .layer import Linear

_PRUNED = {"magnitude_prune": magnitude_prune, "dare_linear": dare_linear, "ties": ties, "dare_ties": dare_ties}
TYPES = ("linear", *_PRUNED)


def require_possible(
    known: Iterable[str], adapters: list[str], weights: list[float], name: str, kind: str, density: float | None
) -> None:
    """Raise UserError unless adapters, of the `known` ones, can be combined: see `SpielModel.add_weighted_adapter`."""
    known = list(known)
    missing = [one for one in adapters if one not in known]
    if not adapters or missing:
        raise UserError(f"adapters: got {missing or adapters}, expected some of {', '.join(known)}")
    if len(weights) != len(adapters):
        raise UserError(f"weights: got {len(weights)} for {len(adapters)} adapters, expected one for each")
    if name in known:
        raise UserError(f"adapter_name: got '{name}', which exists. Fix: choose another, or delete_adapter first")
    if kind not in TYPES:
        raise UserError(f"combination_type: got {kind!r}, expected {', '.join(TYPES[:-1])} or {TYPES[-1]}")
    if kind in _PRUNED and (density is None or not 0 < density <= 1):
        raise UserError(f"density: got {density!r}, expected a fraction in (0, 1], which {kind} keeps")


def combined(
    layer: Linear,
    adapters: list[str],
    weights: list[float],
    kind: str,
    density: float | None,
    majority_sign_method: str,
) -> tuple[Tensor, Tensor]:
    """Combine one weight's entries: (indices [U] sorted, deltas [U] fp32). Sums are taken in fp64 and rounded once."""
    found = [(one, weight) for one, weight in zip(adapters, weights, strict=True) if layer.has(one)]
    indices = [layer.spiel_indices[one] for one, _ in found]
    union, place = torch.cat(indices).unique(return_inverse=True)
    factors = torch.tensor([weight for _, weight in found], dtype=torch.float64, device=union.device)
    vectors = []
    for (one, _), part in zip(found, place.split([each.numel() for each in indices]), strict=True):
        vector = torch.zeros(union.shape, dtype=torch.float64, device=union.device)
        vectors.append(vector.index_copy_(0, part, layer.spiel_values[one].detach().double()))
    if kind == "linear":
        return union, (torch.stack(vectors) * factors[:, None]).sum(0).float()
    signs = {"majority_sign_method": majority_sign_method} if kind in ("ties", "dare_ties") else {}
    return union, _PRUNED[kind](vectors, factors, density, **signs).float()
