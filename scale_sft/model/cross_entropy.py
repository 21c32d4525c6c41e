"""Cross entropy of rows of logits, a few rows in fp32 at a time.

Of the logits in fp32, their softmax and its gradient, of which a usual loss makes a copy each, only a few rows exist at
once: next to the logits there is only their gradient, both in the dtype of the model.
Shapes: V vocabulary; T target tokens.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from scale_sft.spiel.indices import pieces

CPU_LOGITS, GPU_LOGITS = 1 << 20, 1 << 23
"""Logits that are in fp32 at once: 4 MiB stay in a processor's cache; on a GPU fewer would leave it waiting for work.
There is one row for each thread in any case."""


def cross_entropies(logits: Tensor, places: Tensor, targets: Tensor) -> Tensor:
    """Negative logarithms of the targets' probabilities, [T] fp32, natural logarithm.

    Args:
        logits: [rows, V] fp32, bf16 or fp16; must not change before the backward pass.
        places: [T] int64, the rows that predict, no row twice. targets: [T] int64, what they should.
    """
    return _CrossEntropies.apply(logits, places, targets)


class _CrossEntropies(torch.autograd.Function):
    """Recompute the softmax from the logits in the backward pass."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, places: Tensor, targets: Tensor) -> Tensor:
        ctx.save_for_backward(logits, places, targets)
        losses = torch.empty(targets.shape, dtype=torch.float32, device=logits.device)
        for part in pieces(len(targets), rows_at_once(logits)):
            rows = logits.index_select(0, places[part]).float()
            losses[part] = functional.cross_entropy(rows, targets[part], reduction="none")
        return losses

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        logits, places, targets = ctx.saved_tensors
        of_logits = torch.zeros_like(logits)
        for part in pieces(len(targets), rows_at_once(logits)):
            rows = torch.softmax(logits.index_select(0, places[part]), dim=1, dtype=torch.float32)
            rows[torch.arange(len(rows), device=rows.device), targets[part]] -= 1
            rows *= gradient[part, None]
            of_logits.index_copy_(0, places[part], rows.to(logits.dtype))
        return of_logits, None, None


def rows_at_once(logits: Tensor) -> int:
    """How many rows of logits [rows, V] are taken to fp32 at once."""
    on_cpu = logits.device.type == "cpu"
    at_once, least = (CPU_LOGITS, torch.get_num_threads()) if on_cpu else (GPU_LOGITS, 1)
    return max(least, at_once // logits.shape[-1])
