import gc
from collections import Counter

import pytest
import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AutoModelForCausalLM
from transformers.pytorch_utils import Conv1D

from scale_sft.data.micro_batches import collate
from scale_sft.model.loss import token_loss_sum, why_all_logits
from scale_sft.spiel import topk
from scale_sft.spiel.taps import WeightTap, attach, detach

LAYERS = {
    "linear": lambda: nn.Linear(24, 40),
    "linear without bias": lambda: nn.Linear(24, 40, bias=False),
    "conv1d": lambda: Conv1D(40, 24),
}


class Operations(TorchDispatchMode):
    """Counts operations by name, and keeps weak references to the storages of all tensors of `numel` entries made."""

    def __init__(self, numels: set[int], known: list[Tensor]):
        super().__init__()
        self.numels, self.names, self.storages, self.most_alive = numels, Counter(), {}, 0
        self.known = {tensor.untyped_storage().data_ptr() for tensor in known}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        self.names[func.overloadpacket.__name__] += 1
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor) and leaf.numel() in self.numels:
                storage = leaf.untyped_storage()
                if storage.data_ptr() not in self.known:
                    self.storages[storage._cdata] = StorageWeakRef(storage)
        self.most_alive = max(self.most_alive, self.alive())
        return result

    def alive(self) -> int:
        """How many of the storages seen are still held by somebody."""
        self.storages = {key: ref for key, ref in self.storages.items() if not ref.expired()}
        return len(self.storages)


def tapped(kind: str) -> tuple[nn.Module, list[tuple[str, Tensor]]]:
    """A frozen layer with a tap, and the list of what it records."""
    torch.manual_seed(0)
    layer, recorded = LAYERS[kind]().requires_grad_(False), []
    nn.init.normal_(layer.weight)
    record = lambda name, left, right: recorded.append((name, left.t() @ right))
    attach(WeightTap(layer, "w", record, transposed=kind == "conv1d"))
    return layer, recorded


@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize("needs_input_gradient", [True, False])
def test_gradients_are_those_of_autograd_in_the_layout_of_the_weight(kind: str, needs_input_gradient: bool) -> None:
    layer, recorded = tapped(kind)
    x = torch.randn(2, 5, 24, requires_grad=needs_input_gradient)
    layer(x).square().sum().backward()
    own = x.grad
    detach(layer)
    layer.weight.requires_grad_(True)
    again = x.detach().requires_grad_(True)
    layer(again).square().sum().backward()
    ((name, gradient),) = recorded
    assert name == "w"
    torch.testing.assert_close(gradient, layer.weight.grad)
    if needs_input_gradient:
        torch.testing.assert_close(own, again.grad)


@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_under_autocast_gradients_are_those_of_autograd_too(kind: str, dtype: torch.dtype) -> None:
    """Of inputs in either dtype, as norms and layers of a model give them."""
    layer, recorded = tapped(kind)
    results = []
    for has_tap in (True, False):
        if not has_tap:
            detach(layer)
            layer.weight.requires_grad_(True)
        x = torch.randn(2, 5, 24, generator=torch.Generator().manual_seed(1)).to(dtype).requires_grad_(True)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            y = layer(x)
        assert y.dtype is torch.bfloat16
        y.square().sum().backward()
        results.append(x.grad)
    ((_, gradient),) = recorded
    assert results[0].dtype is dtype
    torch.testing.assert_close(gradient.float(), layer.weight.grad)
    torch.testing.assert_close(*results)


def test_a_layer_without_a_tap_is_not_detached() -> None:
    """Other libraries route forward passes on the instance too."""
    layer = nn.Linear(2, 2)
    own = layer.forward = lambda x: x
    detach(layer)
    assert layer.forward is own


@pytest.mark.parametrize("kind", LAYERS)
def test_the_frozen_weight_gets_no_gradient(kind: str) -> None:
    layer, _ = tapped(kind)
    layer(torch.randn(3, 24)).sum().backward()
    assert layer.weight.grad is None and (layer.bias is None or layer.bias.grad is None)


@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize("gradients", [True, False])
def test_the_forward_pass_runs_the_stock_operations_and_no_others(kind: str, gradients: bool) -> None:
    layer, _ = tapped(kind)
    x = torch.randn(3, 24)
    with torch.set_grad_enabled(gradients):
        with Operations(set(), []) as with_tap:
            tapped_output = layer(x)
        detach(layer)
        with Operations(set(), []) as stock:
            stock_output = layer(x)
    remaining = with_tap.names - stock.names
    assert not (stock.names - with_tap.names) and set(remaining) <= {"detach", "alias", "view_as"}
    assert torch.equal(tapped_output, stock_output)


@pytest.mark.parametrize("kind", LAYERS)
def test_detaching_gives_the_module_its_own_forward_back(kind: str) -> None:
    layer, recorded = tapped(kind)
    detach(layer)
    assert "forward" not in layer.__dict__
    layer(torch.randn(3, 24, requires_grad=True)).sum().backward()
    assert recorded == []


def one_step(session, step: int) -> None:
    """A whole optimizer step of a session, without its records."""
    from scale_sft.train import forward_backward

    session.tuning.begin_step(step)
    forward_backward(session, session.inputs.order.batch(step))
    session.tuning.update(0.01)
    if session.tuning.schedule.reallocates_at(step):
        session.tuning.reallocate(step, session.resident)
    session.resident.write()


@pytest.mark.parametrize("method", ["ag", "ma"])
def test_a_forward_pass_of_the_model_makes_nothing_of_a_weights_size(session, tiny_model, architecture, method) -> None:
    """No clone and no scatter of a weight: with one token, every tensor made is smaller than the smallest weight."""
    run = session(base=str(tiny_model(architecture)), method=method)
    one_step(run, 1)
    weights = [target.module.weight for target in run.targets]
    batch = {"input_ids": torch.tensor([[65]]), "attention_mask": torch.ones(1, 1, dtype=torch.int64)}
    with Operations({weight.numel() for weight in weights}, list(run.model.parameters())) as operations:
        run.model(**batch, use_cache=False)
    assert operations.most_alive == 0 and operations.names["mm"] + operations.names["addmm"] > 0
    assert not any(name.startswith(("scatter", "index_put", "index_add", "index_copy")) for name in operations.names)


@pytest.mark.parametrize("quantity", ["operations", "bytes"])
def test_training_forward_passes_cost_what_those_of_the_stock_model_cost(session, tiny_model, architecture, quantity):
    """The same operations over the whole model, and not a byte more kept for the backward pass than inputs."""
    run = session(base=str(tiny_model(architecture)))
    batch = collate(run.inputs.train, [0, 1], run.inputs.tokenizer.pad_token_id, torch.device("cpu"))
    stock = AutoModelForCausalLM.from_pretrained(tiny_model(architecture), config=run.inputs.model_config).train()
    stock.requires_grad_(False)
    for target in run.targets:  # what dense fine-tuning of the same weights does
        stock.get_parameter(target.name).requires_grad_(True)
    found = []
    for model in (run.model, stock):
        assert why_all_logits(model) is None, "and the loss is proved, once, before it is counted"
        saved: list[Tensor] = []
        keep = lambda tensor, saved=saved: saved.append(tensor) or tensor
        hooks = torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor)
        with hooks, Operations(set(), []) as operations:
            token_loss_sum(model, batch)
        sizes = {tensor.data_ptr(): tensor.untyped_storage().nbytes() for tensor in saved}
        found.append((operations.names, sum(sizes.values())))
    (own_names, own_bytes), (stock_names, stock_bytes) = found
    if quantity == "bytes":
        assert own_bytes <= stock_bytes
    else:
        assert set(own_names - stock_names) <= {"detach", "alias", "view_as"} and not stock_names - own_names


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("method", ["ag", "ma"])
def test_over_whole_steps_no_more_than_one_gradient_of_a_weights_size_is_ever_alive(
    session, method: str, checkpointing: bool, monkeypatch
) -> None:
    """Proposing, estimating, updating: beside one layer's gradient there is nothing. Long vectors are read in chunks,
    here shorter than these small weights."""
    monkeypatch.setattr(topk, "CHUNK_ENTRIES", 100)
    monkeypatch.setattr(topk, "SAMPLE_ENTRIES", 100)
    options = {"method": method, "micro_batch_size": 1, "gradient_checkpointing": checkpointing}
    run = session(**options, max_length=13)  # no activation has as many entries as a weight
    sizes = {target.numel for target in run.targets}
    for step in (1, 2, 3):
        with Operations(sizes, list(run.model.parameters())) as operations:
            one_step(run, step)
        gc.collect()
        assert operations.most_alive == 1 and operations.alive() == 0


def test_only_inputs_are_saved_for_the_backward_pass(session) -> None:
    """What autograd keeps over a tapped model is as large as over the stock one: no weight, no copy of one."""
    run = session()
    batch = collate(run.inputs.train, [0, 1], run.inputs.tokenizer.pad_token_id, torch.device("cpu"))
    weights = {target.module.weight.data_ptr() for target in run.targets}
    saved: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: saved.append(tensor) or tensor, lambda tensor: tensor):
        token_loss_sum(run.model, batch).backward()
    assert saved and not weights & {tensor.data_ptr() for tensor in saved}


def recorded_gradients(run) -> dict[str, Tensor]:
    """The dense gradient of every target weight in one micro-batch of the first four examples."""
    found: dict[str, Tensor] = {}
    for target in run.targets:
        tap = target.module.forward.__func__.__closure__[0].cell_contents
        tap.record = lambda name, left, right: found.__setitem__(name, left.t() @ right)
    batch = collate(run.inputs.train, [0, 1, 2, 3], run.inputs.tokenizer.pad_token_id, torch.device("cpu"))
    token_loss_sum(run.model, batch).backward()
    return found


def test_gradient_checkpointing_on_and_off_give_the_same_gradients(session, tiny_model, architecture) -> None:
    on, off = (
        recorded_gradients(session(base=str(tiny_model(architecture)), gradient_checkpointing=choice))
        for choice in (True, False)
    )
    assert list(on) and set(on) == set(off)
    for name in on:
        assert torch.equal(on[name], off[name]), name
