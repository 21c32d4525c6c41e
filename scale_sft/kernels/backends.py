"""Choose kernels where they are requested and available here, otherwise plain torch."""

from __future__ import annotations

import torch

from scale_sft.spiel import drop_grow as in_torch
from scale_sft.spiel.recorder import Products
from scale_sft.spiel.settings import Exchanges

from .cpu import compile as native
from .cpu import drop_grow as in_c
from .cpu.sampled_columns import SampledColumns
from .gpu import usable


def triton_asked_for(device: torch.device, kernels: str) -> bool:
    """Return True if a run with this option `kernels` wants Triton's kernels on a device, if they are available."""
    return device.type == "cuda" and kernels == "auto"


def triton_used(device: torch.device, kernels: str) -> bool:
    """Return True if Triton's kernels are requested and available."""
    return triton_asked_for(device, kernels) and usable.why_not(device) is None


def why_plain(device: torch.device, kernels: str) -> str | None:
    """Explain why a run gets plain torch although it asks for kernels; None if it gets them, or asks for none."""
    if native.asked_for(device, kernels) and (reason := native.why_not()):
        return f"slower than C: {reason}"
    if triton_asked_for(device, kernels) and (reason := usable.why_not(device)):
        return f"slower than Triton: {reason}"
    return None


def products_of(device: torch.device, kernels: str) -> Products | None:
    """Choose how to compute entries of a weight's gradient; None: they are picked from the full product."""
    if triton_used(device, kernels):
        from .gpu.picked import picked_entries

        return picked_entries
    return SampledColumns() if native.used(device, kernels) else None


def exchanges_of(device: torch.device, kernels: str) -> Exchanges:
    """Choose the implementation of drop and grow."""
    return in_c if native.used(device, kernels) else in_torch
