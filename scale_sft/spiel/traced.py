"""Taps inside torch.compile: one operator per pass, so that a block of tapped layers is one graph.

Tracing cannot follow a tap: its backward pass calls a recorder, and it may make a weight that must not outlive one
product. A graph holds two operators in its place. They find their tap by a number that the graph takes as an input, so
that all blocks of one kind share a graph. The backward operator returns what autograd waits for: that keeps it in the
graph, although it is there to record. Both call the tap's own methods, and so compute the same bits.
Shapes: see `taps`.
"""

from __future__ import annotations

import weakref
from collections.abc import MutableMapping
from itertools import count
from typing import Any, Protocol

import torch
from torch import Tensor


class Tap(Protocol):
    """The part of a `WeightTap` that the operators use, all of it outside autograd."""

    def output(self, x: Tensor) -> Tensor: ...

    def input_gradient(self, dy: Tensor) -> Tensor: ...

    def offer(self, x: Tensor, dy: Tensor) -> None: ...


_numbers = count()
_taps: MutableMapping[int, Any] = weakref.WeakValueDictionary()


def enlist(tap: Tap | TapOfGroups) -> Tensor:
    """Number a tap for the operators, for as long as it exists: returns the number, an int64 scalar on the CPU."""
    number = next(_numbers)
    _taps[number] = tap
    return torch.tensor(number, device="cpu")


def traced_output(x: Tensor, anchor: Tensor, number: Tensor, rows: int) -> Tensor:
    """Compute Y = X W^T + b inside a graph: [..., I] -> [..., O], in autocast's dtype if it is on.

    Args:
        x: [..., I].
        anchor: a scalar that requires a gradient. It is in the graph only if `x` needs none, and then its gradient is
            0, for an operator without any gradient to return would be dropped.
        number: see `enlist`.
        rows: O.
    """
    cast = torch.is_autocast_enabled(x.device.type)
    if cast:
        x = x.to(torch.get_autocast_dtype(x.device.type))
    return _forward(x, None if x.requires_grad else anchor, number, rows, cast)


@torch.library.custom_op("scale_sft::tapped_linear", mutates_args=())
def _forward(x: Tensor, anchor: Tensor | None, number: Tensor, rows: int, cast: bool) -> Tensor:
    """Compute Y [..., O] in the dtype of `x`; `cast` if the weight may have another: graphs run outside autocast."""
    with torch.autocast(x.device.type, x.dtype, enabled=cast):
        return _taps[int(number)].output(x)


@_forward.register_fake
def _(x: Tensor, anchor: Tensor | None, number: Tensor, rows: int, cast: bool) -> Tensor:
    return x.new_empty(*x.shape[:-1], rows)


@torch.library.custom_op("scale_sft::tapped_linear_backward", mutates_args=())
def _backward(dy: Tensor, x: Tensor, anchor: Tensor | None, number: Tensor) -> Tensor:
    """Record the factors of dW; returns the gradient of `x`, or of the anchor if there is one."""
    tap = _taps[int(number)]
    gradient = tap.input_gradient(dy) if anchor is None else torch.zeros_like(anchor)
    tap.offer(x, dy)
    return gradient


@_backward.register_fake
def _(dy: Tensor, x: Tensor, anchor: Tensor | None, number: Tensor) -> Tensor:
    return x.new_empty(x.shape) if anchor is None else torch.zeros_like(anchor)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, anchor, number, _, _ = inputs
    ctx.has_anchor = anchor is not None
    ctx.save_for_backward(x, number, *([anchor] if ctx.has_anchor else []))


def _differentiate(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    x, number, *anchor = ctx.saved_tensors
    gradient = _backward(dy, x, anchor[0] if ctx.has_anchor else None, number)
    return (None, gradient, None, None, None) if ctx.has_anchor else (gradient, None, None, None, None)


_forward.register_autograd(_differentiate, setup_context=_keep)


# --- products of experts: see `grouped` -----------------------------------------------------------------------------


class TapOfGroups(Protocol):
    """The part of a `GroupedTap` that the operators use, all of it outside autograd."""

    def groups_of(self, offsets: Tensor, rows: int) -> Any: ...

    def output(self, x: Tensor, groups: Any) -> Tensor: ...

    def input_gradient(self, dy: Tensor, groups: Any) -> Tensor: ...

    def offer(self, x: Tensor, dy: Tensor, groups: Any) -> None: ...


def traced_grouped_output(x: Tensor, offsets: Tensor, anchor: Tensor, number: Tensor, width: int) -> Tensor:
    """Compute the products of experts inside a graph: [S, I] -> [S, O].

    Args:
        x: [S, I], sorted by expert.
        offsets: [E] int32, where the rows of each expert end.
        anchor: as in `traced_output`.
        number: see `enlist`.
        width: O.
    """
    return _grouped_forward(x, offsets, None if x.requires_grad else anchor, number, width)


@torch.library.custom_op("scale_sft::tapped_grouped", mutates_args=())
def _grouped_forward(x: Tensor, offsets: Tensor, anchor: Tensor | None, number: Tensor, width: int) -> Tensor:
    """Compute Y [S, O] in the dtype of `x`."""
    tap = _taps[int(number)]
    return tap.output(x, tap.groups_of(offsets, len(x)))


@_grouped_forward.register_fake
def _(x: Tensor, offsets: Tensor, anchor: Tensor | None, number: Tensor, width: int) -> Tensor:
    return x.new_empty(x.shape[0], width)


@torch.library.custom_op("scale_sft::tapped_grouped_backward", mutates_args=())
def _grouped_backward(dy: Tensor, x: Tensor, offsets: Tensor, anchor: Tensor | None, number: Tensor) -> Tensor:
    """Record the factors of each slice's gradient; returns the gradient of `x`, or of the anchor if there is one."""
    tap, dy = _taps[int(number)], dy.contiguous()
    groups = tap.groups_of(offsets, len(x))
    gradient = tap.input_gradient(dy, groups) if anchor is None else torch.zeros_like(anchor)
    tap.offer(x, dy, groups)
    return gradient


@_grouped_backward.register_fake
def _(dy: Tensor, x: Tensor, offsets: Tensor, anchor: Tensor | None, number: Tensor) -> Tensor:
    return x.new_empty(x.shape) if anchor is None else torch.zeros_like(anchor)


def _keep_groups(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, offsets, anchor, number, _ = inputs
    ctx.has_anchor = anchor is not None
    ctx.save_for_backward(x, offsets, number, *([anchor] if ctx.has_anchor else []))


def _differentiate_groups(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    x, offsets, number, *anchor = ctx.saved_tensors
    gradient = _grouped_backward(dy, x, offsets, anchor[0] if ctx.has_anchor else None, number)
    return (None, None, gradient, None, None) if ctx.has_anchor else (gradient, None, None, None, None)


_grouped_forward.register_autograd(_differentiate_groups, setup_context=_keep_groups)
