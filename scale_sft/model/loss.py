"""Compute the cross entropy of a batch's target tokens, a few rows of logits at a time.

A usual loss copies all logits to fp32, and again for their softmax and its gradient. Here only a few rows of these
exist at once: the only large tensors are the logits and their gradient, both in the dtype of the model.
Shapes: B sequences, L tokens, V vocabulary; T target tokens.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from scale_sft.spiel.indices import pieces

IGNORED = -100
"""Label of a token that does not count."""

CPU_LOGITS, GPU_LOGITS = 1 << 20, 1 << 23
"""Logits in fp32 at once: 4 MiB fit a CPU's cache, and keep a GPU busy. Each thread gets at least a row."""


def token_losses(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    """Compute the cross entropies of a [B, L] batch's target tokens, row by row: [T] fp32 with gradient."""
    inputs = {key: value for key, value in batch.items() if key != "labels"}
    logits = model(**inputs, use_cache=False).logits
    following = functional.pad(batch["labels"][:, 1:], (0, 1), value=IGNORED).flatten()  # the last predicts nothing
    places = (following != IGNORED).nonzero().squeeze(1)
    return cross_entropies(logits.flatten(0, 1), places, following[places])


def token_loss_sum(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    """Sum the cross entropies of all target tokens of a batch: fp32 scalar with gradient."""
    return token_losses(model, batch).sum()


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
    def forward(ctx, logits: Tensor, places: Tensor, targets: Tensor) -> Tensor:
        ctx.save_for_backward(logits, places, targets)
        losses = torch.empty(targets.shape, dtype=torch.float32, device=logits.device)
        for part in pieces(len(targets), rows_at_once(logits)):
            rows = logits.index_select(0, places[part]).float()
            losses[part] = functional.cross_entropy(rows, targets[part], reduction="none")
        return losses

    @staticmethod
    def backward(ctx, gradient: Tensor):
        logits, places, targets = ctx.saved_tensors
        of_logits = torch.zeros_like(logits)
        for part in pieces(len(targets), rows_at_once(logits)):
            rows = torch.softmax(logits.index_select(0, places[part]), dim=1, dtype=torch.float32)
            rows[torch.arange(len(rows), device=rows.device), targets[part]] -= 1
            rows *= gradient[part, None]
            of_logits.index_copy_(0, places[part], rows.to(logits.dtype))
        return of_logits, None, None


def rows_at_once(logits: Tensor) -> int:
    """Choose how many rows of logits [rows, V] to convert to fp32 at once."""
    on_cpu = logits.device.type == "cpu"
    at_once, least = (CPU_LOGITS, torch.get_num_threads()) if on_cpu else (GPU_LOGITS, 1)
    return max(least, at_once // logits.shape[-1])
