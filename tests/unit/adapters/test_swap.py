"""Adapters on a resident model: in place, exchanged at any time, undone bit for bit."""

import json
import random
import threading

import pytest
import torch
from adapter_factory import load, make_adapter
from safetensors.torch import load_file, save_file

import scale_sft
from scale_sft.adapters.apply import apply_adapter
from scale_sft.adapters.format import Adapter
from scale_sft.adapters.live import Gate
from scale_sft.errors import UserError

IDS = torch.arange(24).view(2, 12)


def content(model) -> dict[str, torch.Tensor]:
    return {name: tensor.clone().view(-1).view(torch.uint8) for name, tensor in model.state_dict().items()}


def unchanged(model, before) -> bool:
    return all(torch.equal(tensor, before[name]) for name, tensor in content(model).items())


@pytest.fixture
def base(tiny_model):
    return tiny_model("llama", "bfloat16")


@pytest.fixture
def adapters(base, tmp_path):
    """Three adapters of one base: all layers, all layers at other places, and a part of the layers."""
    return [
        make_adapter(base, tmp_path / "a", dtype="bfloat16", seed=1),
        make_adapter(base, tmp_path / "b", dtype="bfloat16", seed=2, density=0.1),
        make_adapter(base, tmp_path / "c", dtype="bfloat16", seed=3, targets=("q_proj", "down_proj")),
    ]


def logits_under(base, adapter) -> torch.Tensor:
    model = load(base, torch.bfloat16)
    apply_adapter(model, Adapter.load(adapter))
    with torch.inference_mode():
        return model(input_ids=IDS).logits


def test_a_thousand_swaps_and_an_undo_leave_the_original_bytes(base, adapters) -> None:
    model = load(base, torch.bfloat16)
    before = content(model)
    live = scale_sft.load_adapter(model, adapters[0])
    ready = [live.prepare(adapter) for adapter in adapters] + [None]
    order = random.Random(0)
    for _ in range(1000):
        live.swap(order.choice(ready))
    live.swap(ready[2])
    with torch.inference_mode():
        assert torch.equal(model(input_ids=IDS).logits, logits_under(base, adapters[2]))
    live.undo()
    assert unchanged(model, before)
    assert not model._forward_hooks and not model._forward_pre_hooks


def test_loading_a_second_adapter_is_a_swap(base, adapters) -> None:
    model = load(base, torch.bfloat16)
    first = scale_sft.load_adapter(model, adapters[0])
    assert scale_sft.load_adapter(model, adapters[1]) is first
    with torch.inference_mode():
        assert torch.equal(model(input_ids=IDS).logits, logits_under(base, adapters[1]))


def test_leaving_the_block_gives_the_base_back_even_for_weights_made_under_inference_mode(base, adapters) -> None:
    with torch.inference_mode():
        model = load(base, torch.bfloat16)
        model = type(model)(model.config).bfloat16().eval()
        model.load_state_dict(load(base, torch.bfloat16).state_dict())
        assert model.model.layers[0].mlp.up_proj.weight.is_inference()
    before = content(model)
    with scale_sft.load_adapter(model, adapters[0]) as live:
        with torch.inference_mode():
            live.swap(adapters[1])
        live.swap(adapters[2])
        assert not unchanged(model, before)
    assert unchanged(model, before)


def test_every_forward_pass_sees_one_adapter_while_another_thread_swaps(base, adapters) -> None:
    model = load(base, torch.bfloat16)
    wanted = [logits_under(base, adapter) for adapter in adapters]
    live = scale_sft.load_adapter(model, adapters[0])
    ready = [live.prepare(adapter) for adapter in adapters]
    seen, strange, stop = set(), [], threading.Event()

    def serve() -> None:
        with torch.inference_mode():
            while not stop.is_set():
                logits = model(input_ids=IDS).logits
                matches = [n for n, expected in enumerate(wanted) if torch.equal(logits, expected)]
                seen.update(matches)
                if not matches:
                    strange.append(logits)

    threads = [threading.Thread(target=serve) for _ in range(2)]
    for thread in threads:
        thread.start()
    order = random.Random(1)
    for n in range(2000):
        live.swap(order.choice(ready))
        if n >= 300 and seen == {0, 1, 2}:
            break
    stop.set()
    for thread in threads:
        thread.join(timeout=60)
        assert not thread.is_alive()
    assert not strange and seen == {0, 1, 2}


def test_no_swap_happens_within_hold(base, adapters) -> None:
    model = load(base, torch.bfloat16)
    live = scale_sft.load_adapter(model, adapters[0])
    swapped = threading.Event()
    thread = threading.Thread(target=lambda: (live.swap(adapters[1]), swapped.set()))
    with torch.inference_mode(), live.hold():
        first = model(input_ids=IDS).logits
        thread.start()
        assert not swapped.wait(0.3)
        assert torch.equal(model(input_ids=IDS).logits, first), "a pass within hold goes before the waiting swap"
        with pytest.raises(UserError, match="hold"):
            live.swap(None)
    thread.join(timeout=60)
    assert swapped.is_set()
    with torch.inference_mode():
        assert torch.equal(model(input_ids=IDS).logits, logits_under(base, adapters[1]))


def test_a_pipeline_answers_under_the_adapter_of_its_model(base, adapters) -> None:
    from transformers import AutoTokenizer, pipeline

    model = load(base, torch.bfloat16)
    pipe = pipeline("text-generation", model=model, tokenizer=AutoTokenizer.from_pretrained(base), device="cpu")
    ask = lambda: pipe("abc", max_new_tokens=8, do_sample=False)[0]["generated_text"]
    plain = ask()
    live = scale_sft.load_adapter(pipe.model, adapters[1])
    adapted = ask()
    live.undo()
    assert ask() == plain != adapted


def test_a_forward_pass_that_fails_lets_go_of_the_model(base, adapters) -> None:
    model = load(base, torch.bfloat16)
    live = scale_sft.load_adapter(model, adapters[0])
    with pytest.raises(IndexError):
        model(input_ids=torch.tensor([[10**6]]))
    live.swap(adapters[1])


def test_memory_of_a_swap_is_that_of_the_entries(base, adapters) -> None:
    model = load(base, torch.bfloat16)
    live = scale_sft.load_adapter(model, adapters[0])
    entries = sum(indices.numel() for indices in Adapter.load(adapters[0]).indices.values())
    ready = live.prepare(adapters[0])
    live.swap(ready)
    tensors = [
        *ready.indices.values(),
        *ready.deltas.values(),
        *(one for pair in ready.values.values() for one in pair),
    ]
    assert sum(tensor.numel() * tensor.element_size() for tensor in tensors) == (4 + 4 + 2 + 2) * entries


def test_what_was_undone_is_not_swapped_again(base, adapters) -> None:
    model = load(base, torch.bfloat16)
    live = scale_sft.load_adapter(model, adapters[0])
    ready = live.prepare(adapters[1])
    live.undo()
    with pytest.raises(UserError, match="load_adapter again"):
        live.swap(ready)
    other = scale_sft.load_adapter(model, adapters[0])
    with pytest.raises(UserError, match="another model"):
        other.swap(ready)


def _break(adapter, change) -> None:
    path = adapter / "adapter_model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)


NAME = "model.layers.0.mlp.up_proj.weight"
DAMAGES = {
    "an index outside": (lambda t: t[f"{NAME}.indices"].__setitem__(-1, 10**6), "outside"),
    "indices out of order": (lambda t: t.__setitem__(f"{NAME}.indices", t[f"{NAME}.indices"].flip(0)), "sorted"),
    "a delta that is no number": (lambda t: t[f"{NAME}.deltas"].__setitem__(0, float("nan")), "finite"),
    "a missing tensor": (lambda t: t.pop(f"{NAME}.deltas"), "disagree"),
    "too few deltas": (lambda t: t.__setitem__(f"{NAME}.deltas", t[f"{NAME}.deltas"][1:]), "indices for"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_adapter_touches_no_weight(base, adapters, damage) -> None:
    model = load(base, torch.bfloat16)
    before = content(model)
    change, message = DAMAGES[damage]
    _break(adapters[0], change)
    with pytest.raises(UserError, match=message):
        scale_sft.load_adapter(model, adapters[0])
    assert unchanged(model, before)
    live = scale_sft.load_adapter(model, adapters[1])
    under = content(model)
    with pytest.raises(UserError, match=message):
        live.swap(adapters[0])
    assert unchanged(model, under)


def test_the_wrong_base_touches_no_weight(tiny_model, base, adapters) -> None:
    model = load(base, torch.bfloat16)
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight[0, 0] += 1
    before = content(model)
    with pytest.raises(UserError, match="not the one it was trained on"):
        scale_sft.load_adapter(model, adapters[0])
    assert unchanged(model, before)
    with pytest.raises(UserError, match="no weight"):
        scale_sft.load_adapter(load(tiny_model("gpt2"), torch.bfloat16), adapters[0])
    with pytest.raises(UserError, match="float32 in the model"):
        scale_sft.load_adapter(load(base, torch.float32), adapters[0])


def test_names_and_files_that_do_not_exist_are_told(base, adapters, tmp_path) -> None:
    model = load(base, torch.bfloat16)
    with pytest.raises(UserError, match="adapter_config.json"):
        scale_sft.load_adapter(model, tmp_path / "nothing")
    config = json.loads((adapters[0] / "adapter_config.json").read_text())
    config["shapes"]["model.layers.7.mlp.up_proj.weight"] = [4, 4]
    (adapters[0] / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match=r"layers\.7"):
        scale_sft.load_adapter(model, adapters[0])


def test_a_model_that_was_converted_meanwhile_is_not_written(base, adapters) -> None:
    model = load(base, torch.bfloat16)
    live = scale_sft.load_adapter(model, adapters[0])
    model.float()
    with pytest.raises(UserError, match="undo before"):
        live.undo()


def test_a_waiting_writer_goes_before_new_readers() -> None:
    gate, order = Gate(), []
    entered, release = threading.Event(), threading.Event()

    def read_first() -> None:
        with gate.shared():
            entered.set()
            release.wait(30)

    def write() -> None:
        with gate.alone():
            order.append("write")

    def read_late() -> None:
        with gate.shared():
            order.append("read")

    threads = [threading.Thread(target=work, daemon=True) for work in (read_first, write, read_late)]
    threads[0].start()
    assert entered.wait(30)
    threads[1].start()
    while not gate._waiting:
        pass
    threads[2].start()
    release.set()
    for thread in threads:
        thread.join(30)
    assert order == ["write", "read"]
