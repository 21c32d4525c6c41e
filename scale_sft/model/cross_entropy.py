"""The cross entropy of rows of logits, a few rows in fp32 at a time.

A usual loss copies all logits to fp32, and again for their softmax and its gradient. Here only a few rows of these
exist at once: the only large tensors are the logits and their gradient, both in the dtype of the model.
Shapes: V vocabulary; T target tokens.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from scale_sft.spiel.indices import pieces

CPU_LOGITS, GPU_LOGITS = 1 << 20, 1 << 23
"""Logits in fp32 at once: 4 MiB fit a CPU's cache, and keep a GPU busy. Each thread gets at least a row."""


def cross_entropies(logits: Tensor, places: Tensor, targets: Tensor) -> Tensor:
    """Compute the negative natural logarithms of the targets' probabilities, [T] fp32.

    Args:
        logits: [rows, V] fp32, bf16 or fp16; must not change before the backward pass.
        places: [T] int64, the rows that predict, without repetition. targets: [T] int64, the tokens to predict.
    """
    return _CrossEntropies.apply(logits, places, targets)


class _CrossEntropies(torch.autograd.Function):
    """The cross entropy under autograd; the backward pass computes the softmax again from the logits."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, places: Tensor, targets: Tensor) -> Tensor:
        ctx.save_for_backward(logits, places, targets)
        losses = torch.empty(targets.shape, dtype=torch.float32, device=logits.device)
        for part in _parts(logits, targets):
            rows = logits.index_select(0, places[part]).float()
            losses[part] = functional.cross_entropy(rows, targets[part], reduction="none")
        return losses

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        logits, places, targets = ctx.saved_tensors
        of_logits = torch.zeros_like(logits)
        for part in _parts(logits, targets):
            rows = torch.softmax(logits.index_select(0, places[part]), dim=1, dtype=torch.float32)
            rows[torch.arange(len(rows), device=rows.device), targets[part]] -= 1
            rows *= gradient[part, None]
            of_logits.index_copy_(0, places[part], rows.to(logits.dtype))
        return of_logits, None, None


def _parts(logits: Tensor, targets: Tensor) -> Iterator[slice]:
    """Yield the parts of the targets whose logits are in fp32 at once; without numbers the first, as all are alike."""
    parts = pieces(len(targets), rows_at_once(logits))
    yield from islice(parts, 1) if logits.is_meta else parts


def rows_at_once(logits: Tensor) -> int:
    """Choose how many rows of logits [rows, V] to convert to fp32 at once."""
    on_cpu = logits.device.type == "cpu"
    at_once, least = (CPU_LOGITS, torch.get_num_threads()) if on_cpu else (GPU_LOGITS, 1)
    return max(least, at_once // logits.shape[-1])
