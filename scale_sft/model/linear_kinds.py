"""Which layers compute what `nn.Linear` computes, so that a tap may stand in for their backward pass."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from .packed_weights import is_quantized_layer

_PROVED: dict[type, bool] = {}
"""Results of `_computes_linear` by class: the proof takes some products of tiny matrices."""


def is_conv1d(module: nn.Module) -> bool:
    """Return True for GPT-2's layer, whose weight is transposed: [I, O]."""
    return type(module).__name__ == "Conv1D"


def why_not_linear(module: nn.Module) -> str | None:
    """Say why a layer with a matrix as weight cannot carry a delta; None: it can.

    It can if it is `nn.Linear`, `Conv1D`, or either of them packed by bitsandbytes; or a subclass of `nn.Linear` whose
    output and gradients are proved to be those of `nn.Linear` on the same weight.
    """
    if type(module) is nn.Linear or is_conv1d(module) or is_quantized_layer(module):
        return None
    kind = type(module).__name__
    if not isinstance(module, nn.Linear) or not module.weight.is_floating_point():
        return f"{kind}, not nn.Linear"
    if type(module).forward is nn.Linear.forward or _proved(module):
        return None
    return f"{kind}, whose forward is not that of nn.Linear"


def _proved(module: nn.Linear) -> bool:
    kind = type(module)
    if kind not in _PROVED:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            try:
                _PROVED[kind] = all(_computes_linear(module, bias) for bias in (False, True))
            except Exception:  # its forward wants something else than an input: no proof
                _PROVED[kind] = False
    return _PROVED[kind]


def _computes_linear(module: nn.Linear, bias: bool) -> bool:
    """Compare a copy of the layer on a small random weight with `functional.linear`: output, dX, dW, at two scales."""
    probe: Any = copy.copy(module)
    outcomes: list[bool] = []
    for scale in (0.1, 30.0):  # rounding or clipping shows at one of them
        weight = nn.Parameter(scale * torch.randn(6, 5, dtype=torch.float64))
        offset = nn.Parameter(torch.randn(6, dtype=torch.float64)) if bias else None
        probe._parameters = {**module._parameters, "weight": weight, "bias": offset}
        for shape in ((3, 5), (2, 4, 5)):
            x = (scale * torch.randn(shape, dtype=torch.float64)).requires_grad_()
            got = _results(probe(x), x, weight)
            outcomes += map(_close, got, _results(functional.linear(x, weight, offset), x, weight))
    return all(outcomes)


def _results(y: Tensor, x: Tensor, weight: Tensor) -> tuple[Tensor, ...]:
    """Return output [..., O], and the gradients in X and W of its weighted sum."""
    down = torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view(y.shape)
    return y.detach(), *torch.autograd.grad((y * down).sum(), (x, weight))


def _close(got: Tensor, expected: Tensor) -> bool:
    return got.shape == expected.shape and torch.allclose(got, expected, rtol=1e-9, atol=1e-9)
