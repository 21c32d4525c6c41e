"""A model with sparse deltas and its optimizer, as the Python API gives them."""

import copy
import json
import warnings

import pytest
import torch
from tiny_loop import SCHEDULE, batch, same, train
from torch import nn
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

import scale_sft
from scale_sft.adapters.format import Adapter
from scale_sft.adapters.merge import merge
from scale_sft.errors import UserError
from scale_sft.model.exposure import ANCHOR, PARAMETER
from tests.methods import ESTIMATED


def weights(model) -> dict:
    return {name: value.clone() for name, value in model.state_dict().items()}


# --- training -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["ag", "ma", "static"])
def test_a_plain_loop_lowers_the_loss_and_reallocates_on_schedule(load, method) -> None:
    model = load()
    sparse = scale_sft.attach(model, **SCHEDULE | (ESTIMATED if method == "static" else {"method": method}))
    optimizer = sparse.optimizer(lr=1e-2)
    before = model(**batch(1)).loss.item()
    for _ in range(9):
        model(**batch(1)).loss.backward()
        optimizer.step()
    assert model(**batch(1)).loss.item() < before - 0.1
    expected = [2] if method == "static" else [2, 5, 8]
    assert [turnover.step for turnover in optimizer.turnovers] == expected


def test_the_loop_is_the_trainers_step_bit_for_bit(load, session) -> None:
    """The API and the trainer share their middle: same batches, same bits."""
    options = {
        "update_interval_steps": 2,
        "estimation_steps": 2,
        "learning_rate": 0.01,
        "density": 0.05,
        "method": "ag",
    }
    run = session()
    model = load()
    sparse = scale_sft.attach(model, total_steps=6, **options)
    optimizer = sparse.optimizer()  # the schedule of the options
    for step in range(1, 7):
        run.optimizer.begin()
        for one in (run.model, model):
            one(**batch(step), use_cache=False).loss.backward()
        run.optimizer.reduce()
        run.optimizer.clip()
        run.optimizer.update()
        if run.optimizer.reallocates:
            run.optimizer.reallocate()
        run.optimizer.end()
        optimizer.step()
        assert optimizer.learning_rate == run.optimizer.learning_rate
    assert sparse.tuning.digests() == run.tuning.digests()
    assert same(weights(model), weights(run.model))


def test_accumulated_micro_batches_are_one_batch(load) -> None:
    """SFT-MA, which proposes nothing from the first micro-batch."""
    found = []
    for micro in (1, 4):
        model = load()
        sparse = scale_sft.attach(model, **SCHEDULE | {"method": "ma"})
        train(model, sparse.optimizer(lr=1e-2), 1, 4, micro)
        found.append(sparse.tuning.store)
    for one, other in zip(*found, strict=True):
        assert torch.equal(one.indices, other.indices)
        torch.testing.assert_close(one.deltas, other.deltas, rtol=1e-3, atol=1e-5)


def test_a_scheduler_of_torch_sets_the_rate_of_each_step(load) -> None:
    model = load()
    sparse = scale_sft.attach(model, **SCHEDULE)
    optimizer = sparse.optimizer(lr=1e-2)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.0 if step >= 2 else 1.0)
    for number in (1, 2, 3):
        model(**batch(number)).loss.backward()
        held = sparse.tuning.store.flat.clone()
        optimizer.step()
        scheduler.step()
    assert torch.equal(sparse.tuning.store.flat, held) and bool(held.any())  # step 3 has a rate of 0


@pytest.mark.parametrize("gradient_dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("delta_dtype", ["float32", "bfloat16"])
def test_clip_grad_norm_clips_the_deltas_and_the_candidates_along(load, delta_dtype, gradient_dtype) -> None:
    """As option max_grad_norm does, up to one rounding."""
    dtypes = {"delta_dtype": delta_dtype, "gradient_dtype": gradient_dtype}
    states = []
    for outside in (True, False):
        model = load()
        clipping = {} if outside else {"max_grad_norm": 0.01}
        sparse = scale_sft.attach(model, **SCHEDULE, **dtypes, **clipping)
        optimizer = sparse.optimizer(lr=1e-2)
        model(**batch(1)).loss.backward()
        if outside:
            assert nn.utils.clip_grad_norm_(model.parameters(), 0.01) > 0.01
        optimizer.step()
        states.append(optimizer.state_dict()["state"]["weights"])
    for name, state in states[0].items():
        for kind, tensor in state.items():
            rtol = 1e-4 if "bfloat16" not in dtypes.values() else 0.02
            torch.testing.assert_close(tensor.float(), states[1][name][kind].float(), rtol=rtol, atol=1e-9)


@pytest.mark.parametrize("forget", ["optimizer", "model", "model in place"])
def test_gradients_that_were_zeroed_leave_no_trace(load, forget) -> None:
    states = []
    for distracted in (True, False):
        model = load()
        sparse = scale_sft.attach(model, **SCHEDULE)
        optimizer = sparse.optimizer(lr=1e-2)
        for number in range(1, 4):
            if distracted:
                model(**batch(100 + number)).loss.backward()
                (optimizer if forget == "optimizer" else model).zero_grad(set_to_none=forget != "model in place")
            model(**batch(number)).loss.backward()
            optimizer.step()
        states.append(sparse.tuning.digests())
    assert states[0] == states[1]


def test_a_gradient_that_was_replaced_counts_as_one_that_was_changed_in_place(load) -> None:
    digests = []
    for replaced in (True, False):
        model = load()
        sparse = scale_sft.attach(model, **SCHEDULE)
        optimizer = sparse.optimizer(lr=1e-2)
        for number in range(1, 4):
            for part in (0, 1):
                model(**batch(2 * number + part)).loss.backward()
                if replaced:
                    sparse.parameter.grad = sparse.parameter.grad * 0.5
                else:
                    sparse.parameter.grad.mul_(0.5)
            optimizer.step()
        digests.append(sparse.tuning.digests())
    assert digests[0] == digests[1]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_autocast_trains(load, dtype) -> None:
    """As `TrainingArguments(bf16=True)` does it, mostly with a base in float32."""
    model = load(dtype)
    sparse = scale_sft.attach(model, **SCHEDULE)
    optimizer = sparse.optimizer(lr=1e-2)
    losses = []
    for _ in range(6):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = model(**batch(1)).loss
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.1


def test_a_weight_that_no_gradient_reaches_is_named_at_the_first_step(load) -> None:
    model = load()
    model.spare = nn.ModuleList([nn.Sequential(nn.Linear(8, 8))])
    sparse = scale_sft.attach(model, **SCHEDULE)
    optimizer, before = sparse.optimizer(lr=1e-2), sparse.tuning.digests()
    model(**batch(1)).loss.backward()
    with pytest.raises(UserError, match=r"no gradient reached 'spare.0.0.weight' at step 1 \(1 of 15 weights\)"):
        optimizer.step()
    optimizer.zero_grad()
    assert sparse.tuning.digests() == before and optimizer.steps == 0


# --- saved and resumed ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("method", ["ag", "ma"])
@pytest.mark.parametrize("stop", [1, 4, 6])  # proposed; in a phase; between phases
def test_an_interrupted_loop_goes_on_bit_for_bit(load, tmp_path, method, dtype, stop) -> None:
    straight = load(dtype)
    whole = scale_sft.attach(straight, **SCHEDULE | {"method": method})
    train(straight, whole.optimizer(lr=1e-2), 1, 9)

    first = load(dtype)
    optimizer = scale_sft.attach(first, **SCHEDULE | {"method": method}).optimizer(lr=1e-2)
    train(first, optimizer, 1, stop)
    torch.save(optimizer.state_dict(), tmp_path / "optimizer.pt")

    second = load(dtype)
    sparse = scale_sft.attach(second, **SCHEDULE | {"method": method})
    optimizer = sparse.optimizer(lr=0.5)
    optimizer.load_state_dict(torch.load(tmp_path / "optimizer.pt", weights_only=True))
    assert same(weights(second), weights(first))
    train(second, optimizer, stop + 1, 9)
    assert sparse.tuning.digests() == whole.tuning.digests()
    assert same(weights(second), weights(straight))


def test_a_model_that_was_saved_with_its_deltas_resumes_on_the_right_base(load) -> None:
    """As a trainer restores a checkpoint: the weights first, deltas in them, then the state of the optimizer."""
    model = load()
    original = weights(model)
    optimizer = scale_sft.attach(model, **SCHEDULE).optimizer(lr=1e-2)
    train(model, optimizer, 1, 4)
    saved, state = weights(model), copy.deepcopy(optimizer.state_dict())

    again = load()
    sparse = scale_sft.attach(again, **SCHEDULE)
    optimizer = sparse.optimizer(lr=1e-2)
    again.load_state_dict(saved)
    optimizer.load_state_dict(state)
    assert same(weights(again), saved)
    assert same(weights(sparse.detach()), original)


def test_a_state_of_another_budget_method_or_base_is_refused_and_changes_nothing(load) -> None:
    model = load()
    optimizer = scale_sft.attach(model, **SCHEDULE).optimizer(lr=1e-2)
    train(model, optimizer, 1, 2)
    state = optimizer.state_dict()
    cases = {
        "active entries": {**SCHEDULE, "density": 0.1},
        "method": {**SCHEDULE, "method": "ma"},
        "total_steps": {**SCHEDULE, "total_steps": 50},
    }
    for what, options in cases.items():
        other = scale_sft.attach(load(), **options)
        before = other.tuning.digests()
        fresh = other.optimizer(lr=1e-2)
        with pytest.raises(UserError, match=f"load_state_dict: {what}"):
            fresh.load_state_dict(state)
        assert other.tuning.digests() == before and fresh.steps == 0
    damaged = [("base", {}, "got base values none"), ("counters", {}, "counters: got {}")]
    other = scale_sft.attach(load(), **SCHEDULE)
    fresh, before = other.optimizer(lr=1e-2), other.tuning.digests()
    for part, content, message in damaged:
        with pytest.raises(UserError, match=message):
            fresh.load_state_dict({**state, "state": {**state["state"], part: content}})
        assert other.tuning.digests() == before and fresh.steps == 0
    with pytest.raises(UserError, match="expected one that a SparseOptimizer has saved"):
        optimizer.load_state_dict(torch.optim.AdamW(load().parameters()).state_dict())


# --- the base -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_the_base_is_there_for_a_moment_and_comes_back_for_good(load, architecture) -> None:
    model = load("bfloat16", architecture)
    original, trainable = weights(model), [weight.requires_grad for weight in model.parameters()]
    sparse = scale_sft.attach(model, **SCHEDULE)
    train(model, sparse.optimizer(lr=1e-2), 1, 3)
    tuned = weights(model)
    assert not same(tuned, original)
    with sparse.base() as base:
        assert same(weights(base), original)
    assert same(weights(model), tuned)
    assert sparse.detach() is model and same(weights(model), original)
    assert [weight.requires_grad for weight in model.parameters()] == trainable
    assert not any("forward" in vars(module) for module in model.modules())
    assert PARAMETER not in dict(model.named_parameters())
    scale_sft.attach(model, **SCHEDULE)  # again


def test_an_adapter_is_the_command_lines(load, tiny_model, tmp_path) -> None:
    model = load()
    sparse = scale_sft.attach(model, **SCHEDULE)
    train(model, sparse.optimizer(lr=1e-2), 1, 3)
    assert sparse.save(tmp_path / "adapter") == tmp_path / "adapter"
    assert Adapter.load(tmp_path / "adapter").info["base"] == str(tiny_model())
    merged = AutoModelForCausalLM.from_pretrained(merge(tmp_path / "adapter", tmp_path / "merged"))
    assert same(weights(merged), weights(model))
    live = load()
    scale_sft.load_adapter(live, tmp_path / "adapter")
    assert same(weights(live), weights(model))


def test_a_saved_model_holds_its_deltas_and_nothing_of_ours(load, tmp_path) -> None:
    model = load()
    sparse = scale_sft.attach(model, **SCHEDULE)
    train(model, sparse.optimizer(lr=1e-2), 1, 3)
    ours = {PARAMETER, ANCHOR}
    assert ours <= dict(model.named_parameters()).keys() and not ours & model.state_dict().keys()
    model.load_state_dict(model.state_dict())  # strict: nothing is missing
    model.save_pretrained(tmp_path)
    assert same(weights(AutoModelForCausalLM.from_pretrained(tmp_path)), weights(model))


# --- other libraries ------------------------------------------------------------------------------------------------


class Rows(torch.utils.data.Dataset):
    def __len__(self) -> int:
        return 32

    def __getitem__(self, number: int) -> dict:
        return {key: value[0] for key, value in batch(number, rows=1).items()}


def arguments(folder, **more) -> TrainingArguments:
    settings = {
        "max_steps": 6, "per_device_train_batch_size": 2, "use_cpu": True, "report_to": [], "save_steps": 4,
        "disable_tqdm": True, "logging_strategy": "no", "dataloader_pin_memory": False,
    }  # fmt: skip
    return TrainingArguments(output_dir=str(folder), **{**settings, **more})


def test_the_trainer_of_transformers_trains_saves_and_resumes_bit_for_bit(load, tmp_path) -> None:
    digests = []
    for resume in (False, True):
        model = load()
        sparse = scale_sft.attach(model, **SCHEDULE)
        optimizer = sparse.optimizer(lr=1e-2)
        trainer = Trainer(model, arguments(tmp_path, gradient_accumulation_steps=2), train_dataset=Rows(),
                          optimizers=(optimizer, None))  # fmt: skip
        trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4") if resume else None)
        assert optimizer.steps == 6
        digests.append(sparse.tuning.digests())
    assert digests[0] == digests[1]
    trainer.save_model(str(tmp_path / "final"))
    assert same(weights(AutoModelForCausalLM.from_pretrained(tmp_path / "final")), weights(model))
    original = weights(load())
    assert same(weights(sparse.detach()), original)


def test_accelerate_prepares_the_model_and_its_optimizer(load) -> None:
    from accelerate import Accelerator

    plain, prepared = load(), load()
    one = scale_sft.attach(plain, **SCHEDULE)
    train(plain, one.optimizer(lr=1e-2), 1, 3)
    sparse = scale_sft.attach(prepared, **SCHEDULE)
    accelerator = Accelerator(cpu=True)
    model, optimizer = accelerator.prepare(prepared, sparse.optimizer(lr=1e-2))
    for number in range(1, 4):
        accelerator.backward(model(**batch(number)).loss)
        optimizer.step()
        optimizer.zero_grad()
    assert sparse.tuning.digests() == one.tuning.digests()


# --- errors ---------------------------------------------------------------------------------------------------------


def test_what_cannot_be_attached_is_said_and_left_as_it_was(load) -> None:
    config = load().config
    with torch.device("meta"):
        meta = AutoModelForCausalLM.from_config(config)
    foreign = load()
    foreign.config.quantization_config = {"quant_method": "gptq"}
    halves = load().to(torch.float64)
    attached = load()
    scale_sft.attach(attached, **SCHEDULE)
    cases = [
        (meta, {}, "meta device"),
        (foreign, {}, "quantised by 'gptq'"),
        (halves, {}, "expected one of float32, bfloat16"),
        (attached, {}, "carries deltas already"),
        (nn.ReLU(), {}, "no linear layers"),
        (load(), {"target_modules": "nowhere"}, "'nowhere' matches no layer"),
        (load(), {"densty": 0.1}, "unknown option 'densty'; did you mean 'density'"),
        (load(), {"global_batch_size": 8}, "unknown option 'global_batch_size'"),
        (load(), {"density": 2}, "density: got 2"),
        (load(), {"density": 0.1, "rank_equivalent": 4}, "got density and rank_equivalent"),
        (load(), {"tunable_weights": 3}, "tunable_weights: got 3"),
        (load(), {"rank_equivalent": 1000}, "rank_equivalent: got 1,000, expected 1 to [0-9]+: the target 'model"),
        (load(), {"total_steps": 0}, "total_steps: got 0"),
        (load(), {"kernels": "cuda"}, "kernels: unknown 'cuda'; did you mean 'cpu'. Known: off, cpu, auto"),
        (load(), {"estimation_steps": 9, "update_interval_steps": 3}, "estimation_steps: got 9"),
        (load(), {"proposal_batch_size": 4}, "proposal_batch_size"),
    ]
    for model, options, message in cases:
        parameters = {name: weight.requires_grad for name, weight in model.named_parameters()}
        tapped = [name for name, module in model.named_modules() if "forward" in vars(module)]
        with pytest.raises(UserError, match=message) as error:
            scale_sft.attach(model, **options)
        assert "\n  unknown" not in str(error.value)
        assert {name: weight.requires_grad for name, weight in model.named_parameters()} == parameters
        assert [name for name, module in model.named_modules() if "forward" in vars(module)] == tapped


def test_a_failure_in_the_middle_leaves_nothing_attached(load, monkeypatch) -> None:
    from scale_sft.model import sparse_model

    def broken(*_):
        raise UserError("broken")

    monkeypatch.setattr(sparse_model, "ResidentDeltas", broken)
    model = load()
    with pytest.raises(UserError, match="broken"):
        scale_sft.attach(model, **SCHEDULE)
    assert not any("forward" in vars(module) for module in model.modules())
    assert all(weight.requires_grad for weight in model.parameters())


def test_ranks_that_attach_different_bases_are_left_with_their_models(load, monkeypatch) -> None:
    from scale_sft import api
    from scale_sft.model.group import OneProcess

    class Disagreeing(OneProcess):
        def check_identical(self, take_digests, what):
            raise UserError(f"ranks disagree on {what}")

    monkeypatch.setattr(api, "existing_ranks", Disagreeing)
    model = load()
    before = weights(model)
    with pytest.raises(UserError, match="ranks disagree on the base model"):
        scale_sft.attach(model, **SCHEDULE)
    assert not any("forward" in vars(module) for module in model.modules())
    assert all(weight.requires_grad for weight in model.parameters()) and same(weights(model), before)


def test_a_model_that_was_cast_is_refused_before_anything_moves(load) -> None:
    model = load("bfloat16")
    sparse = scale_sft.attach(model, **SCHEDULE)
    optimizer, before = sparse.optimizer(lr=1e-2), sparse.tuning.digests()
    model.float()
    model(**batch(1)).loss.backward()
    with pytest.raises(UserError, match=r"the model is in torch.float32, expected torch.bfloat16"):
        optimizer.step()
    optimizer.zero_grad()
    assert sparse.tuning.digests() == before


def test_misuse_is_one_error_that_says_what_to_do(load) -> None:
    model = load()
    sparse = scale_sft.attach(model, **SCHEDULE)
    with pytest.raises(UserError, match=r"call sparse.optimizer\(lr=...\)"):
        model(**batch(1)).loss.backward()
    with pytest.raises(UserError, match="lr: got -1"):
        sparse.optimizer(lr=-1.0)
    optimizer = sparse.optimizer(lr=1e-2)
    with pytest.raises(UserError, match="one per attached model"):
        sparse.optimizer(lr=1e-2)
    with pytest.raises(UserError, match="call loss.backward"):
        optimizer.step()
    model(**batch(1)).loss.backward()
    with pytest.raises(UserError, match="state_dict: got gradients that no step has used"):
        optimizer.state_dict()
    with sparse.base():
        for call in (optimizer.step, lambda: optimizer.load_state_dict({})):
            with pytest.raises(UserError, match=r"inside sparse.base\(\)"):
                call()
        with pytest.raises(UserError, match=r"inside sparse.base\(\)"):
            model(**batch(1)).loss.backward()
    optimizer.step()
    with pytest.raises(UserError, match="call loss.backward"):
        optimizer.step()
    model(**batch(2)).loss.backward()
    sparse.detach()
    for call in (optimizer.step, sparse.detach, lambda: sparse.save("nowhere")):
        with pytest.raises(UserError, match="was detached"):
            call()


def test_a_gradient_that_is_not_finite_changes_nothing(load) -> None:
    model, untouched = load(), load()
    sparse = scale_sft.attach(model, **SCHEDULE)
    other = scale_sft.attach(untouched, **SCHEDULE)
    optimizer, expected = sparse.optimizer(lr=1e-2), other.optimizer(lr=1e-2)
    for number in range(1, 4):
        (model(**batch(50)).loss * float("nan")).backward()
        with pytest.raises(UserError, match=f"step {number}: the norm of the gradient is nan"):
            optimizer.step()
        train(model, optimizer, number, number)
        train(untouched, expected, number, number)
    assert sparse.tuning.digests() == other.tuning.digests()


def test_beyond_total_steps_training_goes_on_without_reallocation_and_says_so_once(load) -> None:
    model = load()
    sparse = scale_sft.attach(model, **{**SCHEDULE, "total_steps": 3})
    optimizer = sparse.optimizer(lr=1e-2)
    train(model, optimizer, 1, 3)
    before, moved = {d.name: d.indices for d in sparse.tuning.store}, sparse.tuning.store.flat.clone()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        train(model, optimizer, 4, 8)
    assert [str(w.message)[:12] for w in caught if "total_steps" in str(w.message)] == ["total_steps:"]
    assert all(torch.equal(before[delta.name], delta.indices) for delta in sparse.tuning.store)
    assert not torch.equal(sparse.tuning.store.flat, moved) and len(optimizer.turnovers) == 1


def test_the_schedule_of_the_options_ends_at_zero_and_stays_there(load) -> None:
    model = load()
    sparse = scale_sft.attach(model, **{**SCHEDULE, "total_steps": 3}, learning_rate=0.01, warmup_fraction=0.0)
    optimizer = sparse.optimizer()
    rates = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for number in range(1, 6):
            model(**batch(number)).loss.backward()
            rates.append(optimizer.learning_rate)
            optimizer.step()
    assert rates[0] == 0.01 and rates[2] == rates[3] == rates[4] > 0


@pytest.mark.parametrize(
    ("method", "draw", "rate"),
    [
        ("random", "top", 0.01),
        ("columns", "top", 0.01),
        ("ag", "sample", 0.01),
        ("ag", "top", 0.001),
        ("ma", "top", 0.004),
    ],
)
def test_a_learning_rate_that_is_not_given_follows_method_and_budget(load, method, draw, rate) -> None:
    for rank, factor in ((8, 1.0), (2, 4 ** (5 / 6))):
        sparse = scale_sft.attach(load(), method=method, draw=draw, rank_equivalent=rank, warmup_fraction=0.0)
        found = sparse.optimizer().learning_rate
        assert found == pytest.approx(rate * factor, rel=0.05), "columns round the budget down to whole ones"


# --- quantised bases ------------------------------------------------------------------------------------------------


@pytest.mark.quantized
@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_a_base_of_bitsandbytes_gets_transient_deltas(load, tiny_model, tmp_path, kind) -> None:
    from transformers import BitsAndBytesConfig

    four = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
    how = BitsAndBytesConfig(**(four if kind == "nf4" else {"load_in_8bit": True}))
    model = AutoModelForCausalLM.from_pretrained(tiny_model(), quantization_config=how, device_map={"": "cpu"})
    packed = {name: value.clone() for name, value in model.state_dict().items() if torch.is_tensor(value)}
    sparse = scale_sft.attach(model, **SCHEDULE)
    optimizer = sparse.optimizer(lr=1e-2)
    with torch.no_grad():
        untrained = model(**batch(7)).logits
    train(model, optimizer, 1, 4)
    with torch.no_grad():
        tuned = model(**batch(7)).logits
        with sparse.base():
            assert torch.equal(model(**batch(7)).logits, untrained)
        assert torch.equal(model(**batch(7)).logits, tuned) and not torch.equal(tuned, untrained)
    sparse.save(tmp_path / "adapter")
    info = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert info["quantization"] == kind and info["quantized_on"] == "cpu"
    merge(tmp_path / "adapter", tmp_path / "merged")
    sparse.detach().train()  # in evaluation bitsandbytes repacks, which it cannot do with weights as small as these
    assert all(torch.equal(model.state_dict()[name], value) for name, value in packed.items())
    with torch.no_grad():
        assert bool(model(**batch(7)).logits.isfinite().all())  # by bitsandbytes alone
        if kind == "int8":  # its scales have moved; they are found all the same
            scale_sft.attach(model, **SCHEDULE)
        else:
            model.model.layers[0].mlp.up_proj.weight.quant_state.packing_format_for_cpu = True  # as in an evaluation
            with pytest.raises(UserError, match="attach the model before its first forward pass"):
                scale_sft.attach(model, **SCHEDULE)


# --- what must not go wrong silently --------------------------------------------------------------------------------


def test_weights_replaced_after_attach_are_refused_by_all_that_would_use_them(load, tmp_path) -> None:
    model = load()
    sparse = scale_sft.attach(model, **SCHEDULE)
    optimizer = sparse.optimizer(lr=1e-2)
    train(model, optimizer, 1, 2)
    earlier, resume = weights(model), optimizer.state_dict()
    train(model, optimizer, 3, 4)
    model.load_state_dict(earlier)  # as load_best_model_at_end does
    for call in (lambda: sparse.save(tmp_path), sparse.detach, sparse.base().__enter__):
        with pytest.raises(UserError, match="the weights of the model were replaced"):
            call()
    model(**batch(5)).loss.backward()
    with pytest.raises(UserError, match="step: the weights of the model were replaced"):
        optimizer.step()
    optimizer.load_state_dict(resume)  # the deltas that belong to these weights
    sparse.save(tmp_path)
    assert same(weights(sparse.detach()), weights(load()))


def test_a_weight_written_by_hand_is_noticed(load, tmp_path) -> None:
    model = load()
    sparse = scale_sft.attach(model, **SCHEDULE)
    train(model, sparse.optimizer(lr=1e-2), 1, 2)
    with torch.no_grad():
        sparse.targets[-1].weight.mul_(1.5)
    for call in (lambda: sparse.save(tmp_path), sparse.detach):
        with pytest.raises(UserError, match="were replaced, moved or cast"):
            call()


def test_a_live_adapter_and_attached_deltas_exclude_each_other(load, tmp_path) -> None:
    model = load()
    sparse = scale_sft.attach(model, **SCHEDULE)
    sparse.save(tmp_path)
    with pytest.raises(UserError, match="load_adapter: got a model with attached deltas"):
        scale_sft.load_adapter(model, tmp_path)
    sparse.detach()
    live = scale_sft.load_adapter(model, tmp_path)
    with pytest.raises(UserError, match="carries a live adapter"):
        scale_sft.attach(model, **SCHEDULE)
    live.undo()
    scale_sft.attach(model, **SCHEDULE).detach()


def test_dropout_is_off_from_attach_to_detach(load) -> None:
    model = load(architecture="gpt2")
    model.config.attn_pdrop = 0.2
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.1
    model.transformer.h[0].attn.some_dropout = 0.3
    sparse = scale_sft.attach(model, **SCHEDULE)
    model.train()
    assert torch.equal(model(**batch(1)).logits, model(**batch(1)).logits)
    assert model.config.attn_pdrop == 0 and model.transformer.h[0].attn.some_dropout == 0
    sparse.detach()
    assert {module.p for module in model.modules() if isinstance(module, nn.Dropout)} == {0.1}
    assert model.config.attn_pdrop == 0.2 and model.transformer.h[0].attn.some_dropout == 0.3


def test_input_of_the_wrong_kind_is_one_error(load, tmp_path) -> None:
    model = load()
    sparse = scale_sft.attach(model, **SCHEDULE)
    (tmp_path / "file").write_text("")
    for folder in (tmp_path / "file", tmp_path / "file" / "folder", "/proc/nowhere"):
        with pytest.raises(UserError, match=f"save: '{folder}' cannot be written"):
            sparse.save(folder)
    for rate in ("a", float("nan"), float("inf"), True):
        with pytest.raises(UserError, match="lr: got"):
            sparse.optimizer(lr=rate)
    with pytest.raises(UserError, match="got 'demo', expected a model in memory"):
        scale_sft.attach("demo")
    optimizer = sparse.optimizer(lr=1e-2)
    with pytest.raises(UserError, match="add_param_group"):
        optimizer.add_param_group({"params": [nn.Parameter(torch.zeros(1))]})
    assert len(optimizer.param_groups) == 1


def test_an_attached_model_is_not_copied(load) -> None:
    model = load()
    sparse = scale_sft.attach(model, **SCHEDULE)
    with pytest.raises(UserError, match="deepcopy: got a model with attached deltas"):
        copy.deepcopy(model)
    copy.deepcopy(sparse.detach())


def test_a_sparse_model_says_what_it_trains(load) -> None:
    model = load()
    sparse = scale_sft.attach(model, **SCHEDULE | {"method": "ma"})
    train(model, sparse.optimizer(lr=1e-2), 1, 2)
    assert repr(sparse) == (
        "<SparseModel: ma, 760 of 15,360 entries (4.948%) in 14 weights of LlamaForCausalLM, step 2 of 9>"
    )
    sparse.detach()
    assert repr(sparse).endswith("step 2 of 9, detached>")


def test_a_detached_model_lists_nothing_of_ours_and_a_failed_one_neither(load, monkeypatch) -> None:
    from scale_sft.model.sparse_model import SparseModel

    model = load()
    before = dict(model.named_parameters()), set(vars(model))
    scale_sft.attach(model, **SCHEDULE).detach()
    assert (dict(model.named_parameters()), set(vars(model))) == before

    def broken(*_):
        raise UserError("broken")

    for late in ("_fuses", "_make_parameter", "expose"):
        with monkeypatch.context() as patch:
            patch.setattr(SparseModel, late, broken)
            with pytest.raises(UserError, match="broken"):
                scale_sft.attach(model, **SCHEDULE)
        assert not any("forward" in vars(module) for module in model.modules())
        assert all(weight.requires_grad for weight in model.parameters())


def test_processes_that_appear_between_a_backward_pass_and_its_step_are_refused(load, monkeypatch) -> None:
    model = load()
    sparse = scale_sft.attach(model, **SCHEDULE)
    optimizer = sparse.optimizer(lr=1e-2)
    model(**batch(1)).loss.backward()
    monkeypatch.setattr(sparse, "_find_ranks", lambda: sparse.group)
    with pytest.raises(UserError, match="initialised between a backward pass and its step"):
        optimizer.step()


def test_processes_that_meet_later_with_other_deltas_are_refused(load, monkeypatch) -> None:
    from scale_sft.model.group import OneProcess

    class Disagreeing(OneProcess):
        def check_identical(self, take_digests, what):
            if take_digests() and what == "the deltas":
                raise UserError(f"ranks disagree on {what}")

    model = load()
    sparse = scale_sft.attach(model, **SCHEDULE)
    sparse.optimizer(lr=1e-2)
    monkeypatch.setattr(sparse, "_find_ranks", lambda: Disagreeing(sparse.group.device, size=2))
    with pytest.raises(UserError, match="ranks disagree on the deltas"):
        model(**batch(1)).loss.backward()
    assert sparse.group.size == 1
