"""Tap linear layers, so that their backward pass offers the weight gradient to a recorder (Eq. 5 and 7).

Resident delta (in the weight itself): the forward pass is the layer's own, no clone, no scatter, no adapter. Transient
delta (section 3.4): each forward and each backward pass computes the effective weight, and discards it after use.
The backward pass hands the two factors of dW = dY^T X to the recorder; the frozen weight gets no `.grad`.
Shapes: T tokens (all leading dimensions), I in, O out.
"""

from __future__ import annotations

import types
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Protocol, cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from .traced import enlist, traced_output


class Record(Protocol):
    """Receives the factors of a weight's gradient in a backward pass."""

    def __call__(self, name: str, left: Tensor, right: Tensor, *, more: bool = False) -> None:
        """Receive left [T, R] and right [T, C]: the gradient of the weight [R, C], or a part of it, is left^T right.

        Embeddings give `left` as [T] int64, the places of the ones of a one-hot factor. `more`: other parts of this
        weight's gradient follow in the same backward pass.
        """


Bounds = Sequence[tuple[int, int]]
"""Of each weight, its first row and the one after its last, among the rows of all."""

RecordMany = Callable[[Sequence[str], Tensor, Tensor, Bounds], None]
"""(names, left [S, R], right [S, C], bounds): the same for weights that follow each other, of rows a to b of each."""

Needed = Callable[[str, Tensor, bool], Tensor]
"""(name, factor [T, n], whether it is the left one): the columns of it [T, m] that `Record` needs."""

Materialize = Callable[[nn.Parameter], AbstractContextManager[Tensor]]
"""Yields the whole weight for the length of a `with` block, even if it is stored in shards."""


def shape_of(weight: Any) -> tuple[int, ...]:
    """Return a parameter's shape, whole if it is in shards."""
    return tuple(getattr(weight, "ds_shape", weight.shape))


class WeightTap:
    """The link from one layer's backward pass to a recorder: the weight, its layout, and the recorder to call.

    Args:
        module: `nn.Linear` (weight [O, I]) or a layer of transposed weight [I, O] such as GPT-2's `Conv1D`.
        name: of the weight, as the recorder knows it.
        record: called once per backward pass with the factors of dW, see `Record`; None: the layer is not trained.
        transposed: the weight is [I, O].
        materialize: see `Materialize`.
        effective_weight: makes a copy of the whole weight with its delta added, which the tap holds for one product
            only; None: the module's weight contains the delta.
        needed: see `Needed`: what the forward pass keeps of its input; None: all.
    """

    def __init__(
        self,
        module: Any,
        name: str,
        record: Record | None,
        *,
        transposed: bool = False,
        materialize: Materialize = nullcontext,
        effective_weight: Callable[[], Tensor] | None = None,
        needed: Needed | None = None,
    ):
        self.needed = needed
        self.module, self.name, self.record, self.transposed = module, name, record, transposed
        self.materialize, self.effective_weight = materialize, effective_weight
        self.stock_forward = module.forward
        self.anchor = torch.zeros((), requires_grad=True)
        self.number = enlist(self)
        self.rows: int = module.nf if transposed else module.out_features

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Give a copy a number of its own."""
        self.__dict__.update(state)
        self.number = enlist(self)

    def forward(self, x: Tensor) -> Tensor:
        """Compute [..., O] from x [..., I]; without gradients, the same values from the same effective weight."""
        if not torch.is_grad_enabled() or (self.record is None and not x.requires_grad):
            return self.output(x)
        if torch.compiler.is_compiling():
            return traced_output(x, self.anchor, self.number, self.rows)
        return _TappedLinear.apply(x, self.anchor, self)

    def output(self, x: Tensor) -> Tensor:
        """Compute Y = X W^T + b: [..., I] -> [..., O], outside autograd."""
        if self.effective_weight is None:
            return self.stock_forward(x)
        weight = self.effective_weight()
        return functional.linear(x, weight.t() if self.transposed else weight, self.module.bias)

    def input_gradient(self, dy: Tensor) -> Tensor:
        """Compute dX = dY W: [..., O] -> [..., I], in the dtype of dY."""
        if self.effective_weight is not None:
            weight = self.effective_weight().to(dy.dtype)
            return dy @ (weight.t() if self.transposed else weight)
        with self.materialize(self.module.weight) as stored:
            weight = stored.to(dy.dtype)
            return dy @ (weight.t() if self.transposed else weight)

    def factors(self, x: Tensor, dy: Tensor) -> tuple[Tensor, Tensor]:
        """Return the factors (left [T, R], right [T, C]) of dW = left^T right, in the weight's own layout.

        Args:
            x: [..., I]. dy: [..., O].
        """
        x, dy = x.reshape(-1, x.shape[-1]), dy.reshape(-1, dy.shape[-1])
        return (x, dy) if self.transposed else (dy, x)

    def kept(self, x: Tensor) -> Tensor:
        """Return what the backward pass needs of the input [..., I]: itself, or some of its columns [T, n]."""
        return x if self.needed is None else self.needed(self.name, x.reshape(-1, x.shape[-1]), self.transposed)

    def offer(self, x: Tensor, dy: Tensor, *, more: bool = False) -> None:
        """Hand the factors of dW, or of a part of it, to the recorder, if the weight is trained: see `Record`.

        Args:
            x: [..., I], or what `kept` returned of it.
            dy: [..., O].
            more: other parts follow in the same backward pass.
        """
        if self.record is not None:
            left, right = self.factors(x, dy)
            if more:
                self.record(self.name, left, right, more=True)
            else:
                self.record(self.name, left, right)


class _TappedLinear(torch.autograd.Function):
    """The layer's forward under autograd. Only the input is kept, or a part of it: never anything of the weight's size.

    Under torch.autocast the product is of another dtype than input and weight: the input is kept in that dtype, and
    the backward pass, which autocast does not reach, computes in it too.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, anchor: Tensor, tap: WeightTap) -> Tensor:
        # `anchor` requires a gradient and gets none: it makes backward run where x needs no gradient (first layer).
        ctx.tap, ctx.dtype = tap, x.dtype
        y = tap.output(x)
        if tap.record is not None:
            ctx.save_for_backward(tap.kept(x).to(y.dtype))
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, None, None]:
        saved = ctx.saved_tensors  # must come first: with checkpointing this recomputes the block
        tap = ctx.tap
        dx = tap.input_gradient(dy).to(ctx.dtype) if ctx.needs_input_grad[0] else None
        if tap.record is not None:
            tap.offer(saved[0], dy)
        return dx, None, None


class Tap(Protocol):
    """What stands in for a module's forward pass."""

    module: Any

    def forward(self, *inputs: Any, **options: Any) -> Any: ...


def attach(tap: WeightTap | Tap) -> None:
    """Route the module's forward through the tap; on the instance, so that other libraries' hooks stay in place."""

    def forward(module: nn.Module, *inputs: Any, **options: Any) -> Any:
        return tap.forward(*inputs, **options)

    install(tap, forward)


def install(tap: Any, forward: Any) -> None:
    """Make a function (module, ...) the forward of a tap's module, until `detach`."""
    forward.before = tap.module.__dict__.get("forward")
    forward.tap = tap
    tap.module.forward = types.MethodType(forward, tap.module)


def share_anchor(module: nn.Module, anchor: Tensor) -> None:
    """Replace the anchor of a tapped module's tap: a scalar that requires a gradient and gets none."""
    cast(Any, module).forward.tap.anchor = anchor


def detach(module: nn.Module) -> None:
    """Undo `attach`: give the module its earlier forward back; one without a tap stays as it is."""
    forward: Any = module.__dict__.get("forward")
    if not hasattr(forward, "before"):
        return
    del module.forward
    if forward.before is not None:
        module.forward = forward.before
