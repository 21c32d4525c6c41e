"""Route modules of experts, and routers, through taps.

A module of experts computes as transformers' `grouped_mm` does, whatever implementation the model's config names:
rows are sorted by expert, each product covers all experts, and rows return to their order. Without gradients the module
computes as before. Shapes: T tokens, k experts of each; E experts; S = T * k rows; H hidden.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from scale_sft.spiel.grouped import GroupedTap, Groups
from scale_sft.spiel.taps import Bounds, Materialize, Record, RecordMany, attach

from .experts import FusedWeight, fused_in

EffectiveWeight = Callable[[str], Tensor]
"""(name of a fused parameter) -> a copy of it with its deltas added."""


class ExpertsTap:
    """The link from the backward pass of one module of experts to a recorder.

    Args:
        module: of experts.
        products: the taps of its fused parameters, by leaf.
    """

    def __init__(self, module: Any, products: Mapping[str, GroupedTap]):
        self.module, self.products = module, products
        self.stock_forward = module.forward
        self.compute = _FORWARDS.get(type(module).__name__, _routed)

    @property
    def anchor(self) -> Tensor:
        """A scalar that requires a gradient and gets none: see `spiel.taps`."""
        return next(iter(self.products.values())).anchor

    @anchor.setter
    def anchor(self, anchor: Tensor) -> None:
        for product in self.products.values():
            product.anchor = anchor

    def forward(self, *inputs: Any, **options: Any) -> Tensor:
        """Compute what the module computes."""
        stock = all(product.effective_weight is None for product in self.products.values())
        if stock and not torch.is_grad_enabled():
            return self.stock_forward(*inputs, **options)
        return self.compute(self.module, self.products, *inputs, **options)


Products = Mapping[str, GroupedTap]


def _routed(
    module: Any, products: Products, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor
) -> Tensor:
    """Compute [T, H] from [T, H]: experts of transformers' experts interface.

    Args:
        top_k_index: [T, k], the experts of each token. top_k_weights: [T, k].
    """
    tokens, each = top_k_index.shape
    expert, order = torch.sort(top_k_index.reshape(-1), stable=True)
    bounds = torch.arange(1, module.num_experts + 1, device=expert.device, dtype=expert.dtype)
    groups = Groups(torch.searchsorted(expert, bounds, out_int32=True), tokens * each)

    def project(leaf: str, x: Tensor) -> Tensor:
        out = products[leaf].forward(x, groups)
        return out + getattr(module, f"{leaf}_bias")[expert] if module.has_bias else out

    if module.has_gate:
        inner = module._apply_gate(project("gate_up_proj", hidden_states[order // each]))
    else:
        inner = module.act_fn(project("up_proj", hidden_states[order // each]))
    out = project("down_proj", inner)
    if getattr(module, "has_post_expert_norm", False):
        out = module.post_expert_norm(out)
    out = out * top_k_weights.reshape(-1)[order].unsqueeze(-1)
    back = torch.empty_like(order)
    back[order] = torch.arange(len(order), device=order.device)
    return out[back].view(tokens, each, -1).sum(1).to(hidden_states.dtype)


def _every_token(module: Any, products: Products, hidden_states: Tensor) -> Tensor:
    """Compute [S, H] from [S, H]: Llama 4, whose experts see all tokens, one copy of them each."""
    rows = len(hidden_states)
    each = rows // module.num_experts
    groups = Groups.of_sizes([each] * module.num_experts, hidden_states.device)
    gate, up = products["gate_up_proj"].forward(hidden_states.reshape(rows, -1), groups).chunk(2, dim=-1)
    return products["down_proj"].forward(up * module.act_fn(gate), groups)


def _given_sizes(module: Any, products: Products, inputs: Tensor, expert_size: list[int]) -> Tensor:
    """Compute [S, O] from [S, I], sorted by expert, in groups of given sizes: JetMoe."""
    return products["weight"].forward(inputs, Groups.of_sizes(expert_size, inputs.device))


_FORWARDS: Mapping[str, Callable[..., Tensor]] = {
    "Llama4TextExperts": _every_token,
    "JetMoeParallelExperts": _given_sizes,
}
"""By class; all others are of transformers' experts interface."""


def attach_expert_taps(
    modules: Iterable[tuple[str, nn.Module]],
    trained: Iterable[str],
    record: Record,
    materialize: Materialize = nullcontext,
    effective_weight: EffectiveWeight | None = None,
    record_many: RecordMany | None = None,
) -> None:
    """Route modules of experts through taps.

    Args:
        modules: with their paths.
        trained: names of the slices that are trained.
        record: receives the gradients' factors of these, each by its name.
        materialize: see `Materialize`.
        effective_weight: adds deltas to a copy of a parameter; None: the parameters contain them.
        record_many: receives all slices of a parameter at once, instead of `record`.
    """
    wanted = set(trained)
    for path, module in modules:
        products = {}
        for fused in fused_in(path, module):
            names = [name if name in wanted else None for name in fused.slice_names()]
            products[fused.leaf] = GroupedTap(
                module,
                fused.leaf,
                names,
                record_many or _one_by_one(record),
                transposed=fused.transposed,
                materialize=materialize,
                effective_weight=_bound(effective_weight, fused),
            )
        attach(ExpertsTap(module, products))


def _one_by_one(record: Record) -> RecordMany:
    def record_many(names: Sequence[str], left: Tensor, right: Tensor, bounds: Bounds) -> None:
        for name, (start, stop) in zip(names, bounds, strict=True):
            record(name, left[start:stop], right[start:stop])

    return record_many


def _bound(effective_weight: EffectiveWeight | None, fused: FusedWeight) -> Callable[[], Tensor] | None:
    if effective_weight is None:
        return None
    return lambda: effective_weight(fused.name)


# --- routers ----------------------------------------------------------------------------------------------------------


class RouterTap:
    """The link from a router's backward pass to a recorder, whatever its forward pass does with its weight [E, H].

    The weight is small, so its gradient is formed whole: inside the forward pass the module has a stand-in for it,
    through which autograd reaches the tap.
    """

    def __init__(
        self, module: Any, name: str, record: Record | None, effective_weight: Callable[[], Tensor] | None = None
    ):
        self.module, self.name, self.record, self.effective_weight = module, name, record, effective_weight
        self.stock_forward = module.forward
        self.anchor = torch.zeros((), requires_grad=True)

    def forward(self, *inputs: Any, **options: Any) -> Any:
        """Compute what the module computes."""
        weight = self.effective_weight() if self.effective_weight else self.module.weight.detach()
        if torch.is_grad_enabled() and self.record is not None:
            weight = _StandIn.apply(weight, self.anchor, self)
        elif self.effective_weight is None:
            return self.stock_forward(*inputs, **options)
        self.module.__dict__["weight"] = weight
        try:
            return self.stock_forward(*inputs, **options)
        finally:
            del self.module.__dict__["weight"]


class _StandIn(torch.autograd.Function):
    """A weight under autograd whose gradient goes to the recorder."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, anchor: Tensor, tap: RouterTap) -> Tensor:
        ctx.tap = tap
        return weight.view_as(weight)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[None, None, None]:
        one = torch.eye(len(gradient), dtype=gradient.dtype, device=gradient.device)
        ctx.tap.record(ctx.tap.name, one, gradient)
        return None, None, None
