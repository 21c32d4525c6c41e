"""What training has done to the weights: the size and shape of the updates, and how much of them a merge keeps.

Shapes: O rows, I columns of a target weight.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from statistics import mean
from typing import Any

import torch
from torch import Tensor, nn

from scale_sft.model.experts import slice_name
from scale_sft.model.first_choice import weight_reader

VECTORS, ROUNDS = 8, 12


@dataclass(frozen=True)
class Update:
    """The change of one weight."""

    name: str
    base: Tensor  # [O, I] fp32, on the device of the model
    change: Tensor  # [O, I] fp32: merged minus base before rounding


def figures(updates: Iterator[Update]) -> dict[str, float]:
    """Measure updates: mean norms over the weights, and the share of changed entries that bfloat16 shows.

    Returns:
        update_frobenius, update_spectral: means over the weights.
        visible_fraction: of the entries that changed, those whose weight differs in bfloat16.
    """
    frobenius, spectral, seen, changed = [], [], 0, 0
    for update in updates:
        frobenius.append(float(update.change.norm()))
        spectral.append(spectral_norm(update.change))
        moved = (update.base + update.change).to(torch.bfloat16) != update.base.to(torch.bfloat16)
        seen += int(moved.sum())
        changed += int((update.change != 0).sum())
    return {
        "update_frobenius": mean(frobenius),
        "update_spectral": mean(spectral),
        "visible_fraction": seen / max(1, changed),
    }


def spectral_norm(matrix: Tensor) -> float:
    """Estimate the largest singular value of a matrix [O, I] by power iteration of VECTORS vectors at once.

    It is a lower bound, within a per cent for matrices whose largest values are not close together.
    """
    generator = torch.Generator().manual_seed(0)
    count = min(VECTORS, *matrix.shape)
    right = torch.randn(matrix.shape[1], count, generator=generator).to(matrix)
    for _ in range(ROUNDS):
        left, _ = torch.linalg.qr(matrix @ right)
        right, _ = torch.linalg.qr(matrix.T @ left)
    return float(torch.linalg.matrix_norm(matrix @ right, 2))


@torch.no_grad()
def sparse_updates(sparse: Any) -> Iterator[Update]:
    """Yield the updates of a sparse model, one weight at a time; its weights hold the base in between."""
    read = weight_reader(sparse)
    with sparse.carrier.without():
        for delta in sparse.tuning.store:
            with read(delta.name) as weight:
                base = weight.float().reshape(delta.shape)
                change = torch.zeros_like(base)
                change.view(-1)[delta.indices.long()] = delta.deltas.float().to(change.device)
                yield Update(delta.name, base, change)


@torch.no_grad()
def peft_updates(model: nn.Module) -> Iterator[Update]:
    """Yield the updates of PEFT's LoRA or IA3."""
    for name, layer in model.named_modules():
        if not hasattr(layer, "get_base_layer") or not hasattr(layer, "active_adapters"):
            continue
        base = _dense(layer.get_base_layer()).float()
        if getattr(layer, "lora_A", None) or getattr(layer, "lora_embedding_A", None):
            change = layer.get_delta_weight("default").float()
        elif getattr(layer, "ia3_l", None):
            factor = layer.ia3_l["default"].float()
            change = base * (factor if layer.is_feedforward else factor.view(-1, 1)) - base
        else:
            continue
        yield Update(name.removeprefix("base_model.model.") + ".weight", base, change)


def _dense(layer: nn.Module) -> Tensor:
    """Return the weight of a linear layer; of a quantised one, dequantised."""
    weight: Any = layer.weight
    if weight.is_floating_point():
        return weight
    from peft.utils.integrations import dequantize_module_weight

    return dequantize_module_weight(layer)


@torch.no_grad()
def dense_updates(model: nn.Module, names: Sequence[str], base: Callable[[], nn.Module]) -> Iterator[Update]:
    """Yield the updates of dense fine-tuning, compared with a fresh copy of the base; of experts one by one."""
    before, after = dict(base().named_parameters()), dict(model.named_parameters())
    for name in names:
        start, end = before[name], after[name]
        fused = start.dim() == 3
        for number in range(len(start) if fused else 1):
            old, new = (weight[number] if fused else weight for weight in (start, end))
            old = old.float()
            yield Update(slice_name(name, number) if fused else name, old, new.float() - old.to(new.device))
