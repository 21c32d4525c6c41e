"""Choose who computes: kernels where they are asked for and can be used here, otherwise plain torch."""

from __future__ import annotations

import torch

from scale_sft.spiel import drop_grow as in_torch
from scale_sft.spiel.recorder import Products
from scale_sft.spiel.settings import Exchanges

from .autotune import GradientPath
from .cpu import compile as native
from .cpu import drop_grow as in_c
from .cpu.sampled_columns import SampledColumns


def gradient_path_of(device: torch.device, kernels: str) -> GradientPath | None:
    """Ways to recorded gradients that are measured before the first step; None where none are asked for."""
    return GradientPath(device) if kernels == "auto" else None


def products_of(path: GradientPath | None, device: torch.device, kernels: str) -> Products | None:
    """Choose who computes entries of a weight's gradient; None: they are picked from the whole product."""
    if path and path.has_kernels:
        return path.products
    return SampledColumns() if native.used(device, kernels) else None


def exchanges_of(device: torch.device, kernels: str) -> Exchanges:
    """Choose who drops and grows entries."""
    return in_c if native.used(device, kernels) else in_torch
