"""The adapter of a model in training: its present deltas, with what is needed to use them."""

from __future__ import annotations

from typing import Any

import torch

from scale_sft.model.coverage import coverage_of
from scale_sft.model.sparse_model import SparseModel

from .format import Adapter


def trained_adapter(
    sparse: SparseModel, base: str, revision: str | None, quantized_on: torch.device | None = None
) -> Adapter:
    """Describe the present deltas of a sparse model as an adapter; tensors are not copied.

    Args:
        sparse: the model.
        base: name or folder of its base.
        revision: of the base on the hub.
        quantized_on: where the base was quantised, if it was.
    """
    settings, store = sparse.settings, sparse.tuning.store
    info: dict[str, Any] = {
        "base": base,
        "revision": revision,
        "dtype": str(settings.dtype).removeprefix("torch."),
        "base_hash": sparse.base_hash,
        "base_fingerprints": {name: f"{a:016x}{b:016x}" for name, (a, b) in sparse.prints.items()},
        "method": settings.sparse.method,
        "block_weights": coverage_of(sparse.model, settings.sparse).document(),
    }
    if (kind := settings.sparse.trains_whole) != "entry":
        info["granularity"] = kind
    odd = {
        target.name: str(target.weight.dtype).removeprefix("torch.")
        for target in sparse.targets
        if settings.quantization is None and target.weight.dtype is not settings.dtype
    }
    if odd:
        info["dtypes"] = odd
    if settings.quantization:
        info |= settings.quantization.description(quantized_on or sparse.group.device)
    return Adapter(
        indices={delta.name: delta.indices for delta in store},
        deltas={delta.name: delta.deltas for delta in store},
        shapes={delta.name: delta.shape for delta in store},
        info=info,
    )
