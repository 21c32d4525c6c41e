"""Choose kernels where they are requested and available here, otherwise plain torch."""

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
    """Make the choice of paths to recorded gradients, measured before the first step; None if not requested."""
    return GradientPath(device) if kernels == "auto" else None


def products_of(path: GradientPath | None, device: torch.device, kernels: str) -> Products | None:
    """Choose how to compute entries of a weight's gradient; None: they are picked from the full product."""
    if path and path.has_kernels:
        return path.products
    return SampledColumns() if native.used(device, kernels) else None


def exchanges_of(device: torch.device, kernels: str) -> Exchanges:
    """Choose the implementation of drop and grow."""
    return in_c if native.used(device, kernels) else in_torch
