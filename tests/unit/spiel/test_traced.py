"""Tapped layers inside torch.compile: one graph, and the bits of the layers without it."""

import copy
import gc

import pytest
import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from scale_sft.spiel import traced
from scale_sft.spiel.taps import WeightTap, attach

BITS = ("eager", "aot_eager")
"""Backends of torch.compile that run the operations of the model."""

LAYERS = {
    "linear": lambda: nn.Linear(24, 40),
    "linear without bias": lambda: nn.Linear(24, 40, bias=False),
    "conv1d": lambda: Conv1D(40, 24),
}


def tapped(kind: str) -> tuple[nn.Module, list[tuple[str, Tensor]]]:
    """A frozen layer with a tap, and the list of what it records."""
    torch.manual_seed(0)
    layer, recorded = LAYERS[kind]().requires_grad_(False), []
    record = lambda name, left, right: recorded.append((name, left.t() @ right))
    attach(WeightTap(layer, "w", record, transposed=kind == "conv1d"))
    return layer, recorded


def once(call, x: Tensor, recorded: list) -> list[Tensor]:
    """The output, the gradient of `x` if it needs one, and what was recorded."""
    recorded.clear()
    x = x.clone().detach().requires_grad_(x.requires_grad)
    y = call(x)
    y.float().square().sum().backward()
    return [y, *([x.grad] if x.requires_grad else []), *(gradient for _, gradient in recorded)]


def same(left: list[Tensor], right: list[Tensor]) -> bool:
    return len(left) == len(right) and all(map(torch.equal, left, right)) and len(left) > 1


@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize("needs_input_gradient", [True, False])
def test_output_input_gradient_and_factors_are_those_of_the_layer_as_it_is(kind, needs_input_gradient) -> None:
    layer, recorded = tapped(kind)
    x = torch.randn(2, 5, 24, requires_grad=needs_input_gradient)
    wanted = once(layer, x, recorded)
    for backend in BITS:
        assert same(wanted, once(torch.compile(layer, backend=backend, fullgraph=True), x, recorded)), backend


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_so_they_are_under_autocast(dtype) -> None:
    """Graphs run outside of it: what it would cast is cast in the graph."""
    layer, recorded = tapped("linear")
    graph = torch.compile(layer, backend="aot_eager", fullgraph=True)
    x = torch.randn(2, 5, 24).to(dtype).requires_grad_(True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        wanted, found = once(layer, x, recorded), once(graph, x, recorded)
    assert wanted[0].dtype is torch.bfloat16 and same(wanted, found)


def test_a_weight_that_is_made_for_one_product_is_neither_kept_nor_made_twice_at_once() -> None:
    layer, made, recorded = nn.Linear(24, 40, bias=False).requires_grad_(False), [], []

    def effective_weight() -> Tensor:
        made.append(layer.weight.clone())
        return made[-1]

    record = lambda name, left, right: recorded.append((name, left.t() @ right))
    attach(WeightTap(layer, "w", record, effective_weight=effective_weight))
    x = torch.randn(3, 24, requires_grad=True)
    wanted, saved = once(layer, x, recorded), []
    graph = torch.compile(lambda x: layer(x).tanh(), backend="aot_eager", fullgraph=True)
    made.clear()
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: saved.append(tensor) or tensor, lambda tensor: tensor):
        y = graph(x)
    assert len(made) == 1 and saved and not any(tensor.numel() == layer.weight.numel() for tensor in saved)
    y.atanh().square().sum().backward()
    assert len(made) == 2
    torch.testing.assert_close(x.grad, wanted[1])


def test_a_copy_of_a_tap_is_found_by_a_number_of_its_own() -> None:
    layer, _ = tapped("linear")
    tap = layer.forward.tap
    again = copy.deepcopy(tap)
    assert traced._taps[int(tap.number)] is tap and traced._taps[int(again.number)] is again


def test_a_tap_that_is_gone_leaves_no_number_behind() -> None:
    gc.collect()
    before = len(traced._taps)
    layer, _ = tapped("linear")
    assert len(traced._taps) == before + 1
    del layer
    gc.collect()
    assert len(traced._taps) == before
