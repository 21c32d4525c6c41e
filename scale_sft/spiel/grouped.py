"""Tap products of a fused parameter [E, R, C], the same projection of E experts, as `taps` does with linear layers.

Rows of the input are sorted by expert, and each expert multiplies its own: Y[a:b] = X[a:b] W[e]^T. In the backward pass
the factors of each slice's gradient, dW[e] = dY[a:b]^T X[a:b], go to the recorder under the slice's own name. Nothing
of the parameter's size is kept or made.
Shapes: E experts; S rows of all experts; I in, O out; slices [O, I], or [I, O] if transposed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from functools import cached_property
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from .taps import Materialize, RecordMany, shape_of
from .traced import enlist, traced_grouped_output

_ALIGNED_BYTES = 16
"""What torch's grouped product wants rows to be a multiple of."""


class Groups:
    """Which rows belong to which expert: those of expert e end before row `offsets[e]`.

    Args:
        offsets: [E] int32, on the device of the rows, ascending.
        rows: S.
    """

    def __init__(self, offsets: Tensor, rows: int):
        self.offsets, self._rows = offsets, rows

    @classmethod
    def of_sizes(cls, sizes: Sequence[int], device: torch.device) -> Groups:
        """Describe groups of sizes that the host knows."""
        ends = list(accumulate(sizes))
        groups = cls(torch.tensor(ends, dtype=torch.int32).to(device), sum(sizes))
        groups.__dict__["bounds"] = _bounds(ends)
        return groups

    @cached_property
    def bounds(self) -> list[tuple[int, int]]:
        """The first row of each expert, and the one after its last; the host waits for the device once."""
        if self.offsets.is_meta:  # no numbers: as if all experts had equally many
            return _bounds([self._rows * (e + 1) // len(self.offsets) for e in range(len(self.offsets))])
        return _bounds(self.offsets.tolist())


def _bounds(ends: list[int]) -> list[tuple[int, int]]:
    return list(zip([0, *ends], ends, strict=False))


def grouped_product(x: Tensor, weight: Tensor, groups: Groups) -> Tensor:
    """Multiply the rows of each expert with its own matrix: x [S, I], weight [E, I, O] of one dtype -> [S, O]."""
    if _has_kernel(x, weight):
        return functional.grouped_mm(x, weight, offs=groups.offsets)
    out = x.new_empty(len(x), weight.shape[2])
    if x.is_meta:
        return out
    for number, (start, stop) in enumerate(groups.bounds):
        if start < stop:
            torch.mm(x[start:stop], weight[number], out=out[start:stop])
    return out


def _has_kernel(x: Tensor, weight: Tensor) -> bool:
    """Return True if torch has one kernel for all experts here."""
    if not x.is_cuda or not hasattr(functional, "grouped_mm") or x.dtype is not torch.bfloat16:
        return False
    aligned = all(width * x.element_size() % _ALIGNED_BYTES == 0 for width in weight.shape[1:])
    return aligned and x.is_contiguous() and torch.cuda.get_device_capability(x.device) >= (8, 0)


class GroupedTap:
    """The link from one fused parameter's backward pass to a recorder.

    Args:
        module: holds the parameter.
        leaf: its name there.
        names: of its slices, as the recorder knows them; None for one that is not trained.
        record: called once per backward pass with all trained slices, in their order, whether their experts have rows
            or not: so all ranks make the same calls.
        transposed: slices are [I, O].
        materialize: see `Materialize`.
        effective_weight: makes a copy of the whole parameter with its deltas added, for one product; None: the
            parameter contains the deltas.
    """

    def __init__(
        self,
        module: Any,
        leaf: str,
        names: Sequence[str | None],
        record: RecordMany,
        *,
        transposed: bool = False,
        materialize: Materialize = nullcontext,
        effective_weight: Callable[[], Tensor] | None = None,
    ):
        self.module, self.leaf, self.record = module, leaf, record
        self.names = {number: name for number, name in enumerate(names) if name is not None}
        self.transposed, self.materialize, self.effective_weight = transposed, materialize, effective_weight
        self.anchor = torch.zeros((), requires_grad=True)
        self.number = enlist(self)
        self.width = shape_of(getattr(module, leaf))[2 if transposed else 1]  # O

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Give a copy a number of its own."""
        self.__dict__.update(state)
        self.number = enlist(self)

    def groups_of(self, offsets: Tensor, rows: int) -> Groups:
        """Describe the groups of `rows` rows (S) that end at `offsets` [E]."""
        return Groups(offsets, rows)

    def forward(self, x: Tensor, groups: Groups) -> Tensor:
        """Compute [S, O] from x [S, I], sorted by expert; in the parameter's dtype, as transformers does."""
        x = x.to(getattr(self.module, self.leaf).dtype)
        if not torch.is_grad_enabled():
            return self.output(x, groups)
        if torch.compiler.is_compiling():
            return traced_grouped_output(x, groups.offsets, self.anchor, self.number, self.width)
        return _TappedProduct.apply(x, self.anchor, self, groups)

    def output(self, x: Tensor, groups: Groups) -> Tensor:
        """Compute Y[a:b] = X[a:b] W[e]^T, outside autograd."""
        if self.effective_weight is not None:
            weight = self.effective_weight()
        else:
            weight = getattr(self.module, self.leaf).detach()
        return grouped_product(x, weight if self.transposed else weight.transpose(1, 2), groups)

    def input_gradient(self, dy: Tensor, groups: Groups) -> Tensor:
        """Compute dX[a:b] = dY[a:b] W[e]: [S, O] -> [S, I]."""
        if self.effective_weight is not None:
            weight = self.effective_weight()
            return grouped_product(dy, weight.transpose(1, 2) if self.transposed else weight, groups)
        with self.materialize(getattr(self.module, self.leaf)) as weight:
            return grouped_product(dy, weight.transpose(1, 2) if self.transposed else weight, groups)

    def offer(self, x: Tensor, dy: Tensor, groups: Groups) -> None:
        """Hand the factors of each slice's gradient to the recorder: x [S, I], dy [S, O]."""
        left, right = (x, dy) if self.transposed else (dy, x)
        if self.names:
            bounds = [groups.bounds[number] for number in self.names]
            self.record(list(self.names.values()), left, right, bounds)


class _TappedProduct(torch.autograd.Function):
    """The grouped product under autograd. Only input and groups are kept: never the parameter."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, anchor: Tensor, tap: GroupedTap, groups: Groups) -> Tensor:
        ctx.tap, ctx.groups = tap, groups
        ctx.save_for_backward(x)
        return tap.output(x, groups)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, None, None, None]:
        (x,) = ctx.saved_tensors  # must come first: with checkpointing this recomputes the block
        tap, dy = ctx.tap, dy.contiguous()
        with tap.materialize(getattr(tap.module, tap.leaf)):  # once, also for scores that read the weight
            dx = tap.input_gradient(dy, ctx.groups) if ctx.needs_input_grad[0] else None
            tap.offer(x, dy, ctx.groups)
        return dx, None, None, None
