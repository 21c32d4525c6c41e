"""Tap embeddings, so that their backward pass offers the gradient of the looked-up rows to a recorder.

Shapes: T tokens (all leading dimensions), V rows, H columns.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from .taps import Record


class EmbeddingTap:
    """The link from an embedding's backward pass to a recorder.

    The recorder gets the token ids [T] int64 in place of a one-hot factor [T, V], and dY [T, H]. What a subclass of
    `nn.Embedding` computes around its look-up (scales, casts) is its own code, under autograd.

    Args:
        module: `nn.Embedding`, or a subclass that looks rows up by `functional.embedding`.
        name: of the weight, as the recorder knows it.
        record: called once per backward pass, see `Record`.
        look_up: returns effective rows [..., H] of ids [...]; None: the module's weight contains the delta.
    """

    def __init__(
        self, module: nn.Embedding, name: str, record: Record, *, look_up: Callable[[Tensor], Tensor] | None = None
    ):
        self.module, self.name, self.record, self.look_up = module, name, record, look_up
        self.stock_forward = module.forward
        self.anchor = torch.zeros((), requires_grad=True)

    def forward(self, *arguments: Any, **named: Any) -> Tensor:
        """Compute [..., H] from token ids [...], as the module does."""
        with _Redirected(self):
            return self.stock_forward(*arguments, **named)

    def rows(self, ids: Tensor) -> Tensor:
        """Look up [..., H] of ids [...], with gradient if gradients are enabled."""
        if not torch.is_grad_enabled():
            return self.output(ids)
        return _TappedEmbedding.apply(ids, self.anchor, self)

    def output(self, ids: Tensor) -> Tensor:
        """Look up [..., H] of ids [...], outside autograd."""
        if self.look_up is not None:
            return self.look_up(ids)
        return functional.embedding(ids, self.module.weight.detach())

    def offer(self, ids: Tensor, dy: Tensor) -> None:
        """Hand ids [...] and dY [..., H] to the recorder; the row of the padding token has no gradient."""
        ids, dy = ids.reshape(-1), dy.reshape(-1, dy.shape[-1])
        if self.module.padding_idx is not None:
            dy = dy.masked_fill((ids == self.module.padding_idx)[:, None], 0)
        self.record(self.name, ids.long(), dy)


class _TappedEmbedding(torch.autograd.Function):
    """The look-up under autograd. Only the ids are kept."""

    @staticmethod
    def forward(ctx: Any, ids: Tensor, anchor: Tensor, tap: EmbeddingTap) -> Tensor:
        # `anchor` requires a gradient and gets none: it makes backward run
        ctx.tap = tap
        ctx.save_for_backward(ids)
        return tap.output(ids)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[None, None, None]:
        ctx.tap.offer(ctx.saved_tensors[0], dy)
        return None, None, None


class _Redirected(TorchFunctionMode):
    """Leads `functional.embedding` on the tapped weight through the tap inside the block."""

    def __init__(self, tap: EmbeddingTap):
        super().__init__()
        self._tap = tap

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is functional.embedding:
            given = dict(zip(("input", "weight"), args, strict=False)) | (kwargs or {})
            if given["weight"] is self._tap.module.weight:
                return self._tap.rows(given["input"])
        return func(*args, **(kwargs or {}))


def why_not_embedding(module: nn.Module) -> str | None:
    """Say why a module cannot carry deltas as an embedding; None: it can."""
    kind = type(module).__name__
    if not isinstance(module, nn.Embedding) or not module.weight.is_floating_point():
        return f"{kind}, not nn.Embedding"
    if module.max_norm is not None or module.scale_grad_by_freq:
        return f"{kind} with max_norm or scale_grad_by_freq"
    return None
