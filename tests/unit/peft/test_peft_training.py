"""Training under somebody else's optimizer: the weights follow every step, entries are dropped and grown."""

from __future__ import annotations

import copy
import io
import types

import pytest
import torch
from tiny_peft import SCHEDULE, batches, same, session_of, tiny, train, weights_of, wrapped

import scale_sft
from scale_sft.errors import UserError
from scale_sft.model.resident import effective_values
from scale_sft.peft import resume, write
from scale_sft.peft.session import Session
from tests.methods import ESTIMATED

ADAMW = {"lr": 1e-2, "weight_decay": 0.0, "foreach": False, "fused": False}


def indices_of(model) -> dict[str, torch.Tensor]:
    return {layer.weight_name: layer.spiel_indices["default"].clone() for layer in model.base_model.spiel_layers()}


def holds_its_deltas(model, base: dict[str, torch.Tensor]) -> bool:
    for layer in model.base_model.spiel_layers():
        wanted = base[layer.weight_name].clone().view(-1)
        indices = layer.spiel_indices["default"].long()
        wanted[indices] = effective_values(wanted[indices], layer.spiel_values["default"].detach())
        if not torch.equal(layer.weight.view(-1), wanted):
            return False
    return True


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("method", "equal_steps", "rule"),
    [
        ("ag", 6, {}),
        ("static", 10, {}),
        ("random", 10, {}),
        ("ag", 6, {"score": "balanced", "draw": "sample"}),
        ("static", 10, {"score": "gradient_weight"}),
    ],
)
def test_a_training_is_that_of_attach_until_cohorts_differ(method, equal_steps, rule, dtype) -> None:
    options = SCHEDULE | {"density": 0.05, "total_steps": 10, "kernels": "off", "method": method} | rule
    plain, model = tiny(dtype), wrapped(tiny(dtype), **options)
    own = ESTIMATED | rule if method == "static" else {}
    sparse = scale_sft.attach(plain, **options | own, moments="float32", betas=(0.9, 0.999))
    optimizer, other = sparse.optimizer(lr=1e-2), torch.optim.AdamW(model.parameters(), **ADAMW)
    for number, batch in enumerate(batches(10), start=1):
        losses = []
        for one, stepper in ((plain, optimizer), (model, other)):
            loss = one(**batch).loss
            loss.backward()
            stepper.step()
            stepper.zero_grad()
            losses.append(loss.item())
        if number <= equal_steps:
            assert same(weights_of(model), {target.name: target.weight for target in sparse.targets}), number
    assert losses[0] == pytest.approx(losses[1], rel=2e-3)
    assert session_of(model).reallocations == {"ag": [2, 6, 10], "static": [2], "random": []}[method]


@pytest.mark.parametrize("kind", ["fused", "foreach", "sgd", "rmsprop", "lion-like"])
def test_weights_follow_every_optimizer_of_torch(kind) -> None:
    model = wrapped(tiny(torch.bfloat16))
    base = weights_of(model)
    optimizer = {
        "fused": lambda p: torch.optim.AdamW(p, lr=1e-2, fused=True),
        "foreach": lambda p: torch.optim.AdamW(p, lr=1e-2, foreach=True, amsgrad=True),
        "sgd": lambda p: torch.optim.SGD(p, lr=1e-1, momentum=0.9),
        "rmsprop": lambda p: torch.optim.RMSprop(p, lr=1e-3),
        "lion-like": _SignOfMomentum,
    }[kind](model.parameters())
    before = indices_of(model)
    train(model, 7, optimizer)
    assert holds_its_deltas(model, base) and not same(weights_of(model), base)
    assert session_of(model).reallocations == [2, 6] and not same(indices_of(model), before)


class _SignOfMomentum(torch.optim.Optimizer):
    """The first of Lion's two lines; with `eight_bits` it keeps a state that no one else understands."""

    eight_bits = False

    def __init__(self, parameters):
        super().__init__(parameters, {"lr": 1e-3, "betas": (0.9, 0.99)})

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for one in group["params"]:
                if one.grad is not None:
                    moment = self.state[one].setdefault("exp_avg", torch.zeros_like(one))
                    moment.lerp_(one.grad, 0.1)
                    one.add_(moment.sign(), alpha=-group["lr"])
                    if self.eight_bits:
                        self.state[one]["state1"] = moment.to(torch.uint8)


def test_grown_entries_begin_with_their_estimates_as_moments() -> None:
    model = wrapped(tiny())
    optimizer = train(model, 1)
    estimates = dict(session_of(model).recorder.candidates)
    before = indices_of(model)
    batch = batches(2)[1]
    model(**batch).loss.backward()
    optimizer.step()
    grown = 0
    for layer in model.base_model.spiel_layers():
        values, name = layer.spiel_values["default"], layer.weight_name
        state, now = optimizer.state[values], layer.spiel_indices["default"]
        new = ~torch.isin(now, before[name])
        place = torch.searchsorted(estimates[name].indices, now[new])
        seeds = estimates[name].mean[place] * (1 - 0.9**2)
        torch.testing.assert_close(state["exp_avg"][new], seeds)
        assert bool((values.detach()[new] == 0).all())
        grown += int(new.sum())
    assert grown > 100


def test_accumulated_and_clipped_gradients_of_candidates_follow_those_of_the_entries() -> None:
    whole, cut = wrapped(tiny(), kernels="off"), wrapped(tiny(), kernels="off")
    estimates = []
    for model, parts, scale in ((whole, 1, 1.0), (cut, 2, 0.25)):
        optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
        for batch in batches(1):
            ids = torch.cat([batch["input_ids"]] * 2)
            for part in ids.chunk(parts):
                (model(input_ids=part, labels=part).loss / parts).backward()
            for layer in model.base_model.spiel_layers():
                layer.spiel_values["default"].grad.mul_(scale)
            optimizer.step()
        estimates.append({name: one.mean.clone() for name, one in session_of(model).recorder.candidates.items()})
    for name, mean in estimates[0].items():
        torch.testing.assert_close(estimates[1][name], mean * 0.25, rtol=1e-4, atol=1e-9)


@pytest.mark.parametrize("to_none", [True, False])
def test_gradients_that_are_dropped_leave_no_trace_in_the_candidates(to_none) -> None:
    one, other = wrapped(tiny()), wrapped(tiny())
    for model in (one, other):
        optimizer = torch.optim.AdamW(model.parameters(), **ADAMW)
        for step, batch in enumerate(batches(3)):
            if model is other:
                model(**batches(5, seed=9)[step]).loss.backward()
                optimizer.zero_grad(set_to_none=to_none)
            model(**batch).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    assert same(indices_of(one), indices_of(other)) and same(weights_of(one), weights_of(other))


def test_a_loop_of_ones_own_resumes_bit_for_bit_within_an_estimation_phase() -> None:
    options = {"drop_criterion": "change", "update_interval_steps": 4, "estimation_steps": 3}
    model = wrapped(tiny(), **options)
    optimizer = train(model, 9)
    file = io.BytesIO()
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, file)
    file.seek(0)
    saved = torch.load(file, weights_only=True)

    again = wrapped(tiny(), **options)
    other = torch.optim.AdamW(again.parameters(), lr=1e-2)
    again.load_state_dict(saved["model"])
    other.load_state_dict(saved["optimizer"])
    assert session_of(model).recorder.candidates
    resume(again, other)
    for one, stepper in ((model, optimizer), (again, other)):
        for batch in batches(12)[9:]:
            one(**batch).loss.backward()
            stepper.step()
            stepper.zero_grad()
    assert same(indices_of(model), indices_of(again)) and same(weights_of(model), weights_of(again))

    hurried = wrapped(tiny(), **options | {"update_interval_steps": 3})
    fourth = torch.optim.AdamW(hurried.parameters(), lr=1e-2)
    fourth.load_state_dict(saved["optimizer"])
    with pytest.raises(UserError, match=r"update_interval_steps: got 3, expected 4, with which the checkpoint's"):
        resume(hurried, fourth)

    forgotten = wrapped(tiny(), **options)
    third = torch.optim.AdamW(forgotten.parameters(), lr=1e-2)
    third.load_state_dict(saved["optimizer"])
    with pytest.raises(UserError, match=r"state of step 9, expected that of step 0.*scale_sft.peft.resume"):
        train(forgotten, 1, third)


def test_an_adapter_that_is_trained_further_keeps_what_it_has_learned() -> None:
    model = wrapped(tiny(), method="static", total_steps=None)
    train(model, 4)
    further = wrapped(tiny(), method="static", total_steps=None)
    further.load_state_dict(model.state_dict())
    further.base_model._warm.add("default")  # as load_adapter does
    train(further, 4)
    assert session_of(further).reallocations == [] and same(indices_of(model), indices_of(further))


def test_steps_that_nobody_saw_are_noticed_and_can_be_written() -> None:
    model = wrapped(tiny())
    base = weights_of(model)
    train(model, 1)
    with torch.no_grad():
        for layer in model.base_model.spiel_layers():
            layer.spiel_values["default"].data.add_(0.01)
    batch = batches(1)[0]
    with pytest.raises(UserError, match=r"nobody has written them.*scale_sft.peft.write"):
        model(**batch)
    write(model)
    model(**batch)
    assert holds_its_deltas(model, base)


def test_training_survives_a_move_of_its_parameters_and_a_copy_of_the_model() -> None:
    model = wrapped(tiny(), kernels="off")
    reference = wrapped(tiny(), kernels="off")
    train(reference, 6)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for step, batch in enumerate(batches(6)):
        if step == 3:
            for layer in model.base_model.spiel_layers():
                layer.spiel_values["default"].data = layer.spiel_values["default"].data.clone()
        model(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert same(weights_of(model), weights_of(reference)) and same(indices_of(model), indices_of(reference))
    twin = copy.deepcopy(model)
    before = weights_of(model)
    train(twin, 1)
    assert not same(weights_of(twin), before) and same(weights_of(model), before)


def test_a_backward_pass_looks_at_all_parameters_once(monkeypatch) -> None:
    model, looks = wrapped(tiny()), []
    train(model, 1)
    held = Session.holds
    monkeypatch.setattr(
        Session, "holds", lambda session, layer: looks.append(layer.weight_name) or held(session, layer)
    )
    train(model, 3)
    assert len(looks) == 3 * (2 * len(session_of(model).layers) - 1)  # all of them, then each of the others its own


def test_nothing_of_a_weights_size_is_kept_for_backward() -> None:
    model = wrapped(tiny(hidden_size=128, intermediate_size=256), method="random")
    kept: list[int] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(id(t)) or t, lambda t: t):
        model(**batches(1)[0]).loss.backward()
    weights = {id(layer.weight) for layer in model.base_model.spiel_layers()}
    assert kept and not weights & set(kept)
    assert all(layer.weight.grad is None for layer in model.base_model.spiel_layers())


def test_autocast_and_checkpointing_train_too() -> None:
    reference, model = wrapped(tiny()), wrapped(tiny())
    model.gradient_checkpointing_enable({"use_reentrant": False})
    model.train()
    train(reference, 3)
    train(model, 3)
    assert same(weights_of(model), weights_of(reference))
    with torch.autocast("cpu", torch.bfloat16):
        train(model, 1)
    assert all(bool(weight.isfinite().all()) for weight in weights_of(model).values())


def test_candidates_that_overflow_in_fp16_leave_numbers_finite() -> None:
    model = wrapped(tiny())
    optimizer = torch.optim.AdamW(model.parameters(), **ADAMW)
    for step, batch in enumerate(batches(4)):
        model(**batch).loss.backward()
        if step == 0:
            session = session_of(model)
            session.recorder.flat[session.store.active :: 2] = torch.inf
        optimizer.step()
        optimizer.zero_grad()
    assert session.reallocations == [2]
    assert all(bool(weight.isfinite().all()) for weight in weights_of(model).values())
    assert all(bool(state["exp_avg"].isfinite().all()) for state in optimizer.state.values())


def test_reentrant_checkpointing_needs_gradients_of_the_input_and_says_so() -> None:
    model = wrapped(tiny())
    model.train()
    model.gradient_checkpointing_enable({"use_reentrant": True})
    model.base_model.model.disable_input_require_grads()
    with pytest.raises((UserError, RuntimeError), match="use_reentrant|does not require grad"):
        train(model, 1)
    model = wrapped(tiny())
    reference = wrapped(tiny())
    model.train()
    model.gradient_checkpointing_enable({"use_reentrant": True})
    model.enable_input_require_grads()
    train(model, 3)
    train(reference, 3)
    assert same(weights_of(model), weights_of(reference))


# --- what cannot work says so ---------------------------------------------------------------------------------------


def test_drop_and_grow_need_the_number_of_steps() -> None:
    with pytest.raises(UserError, match=r"total_steps: got none.*SpielCallback"):
        train(wrapped(tiny(), total_steps=None), 1)


def test_a_swap_between_forward_and_backward_is_refused() -> None:
    model = wrapped(tiny())
    loss = model(**batches(1)[0]).loss
    with model.disable_adapter(), pytest.raises(UserError, match="between the forward and the backward pass"):
        loss.backward()


def test_a_layer_that_gets_no_gradient_is_named() -> None:
    model = wrapped(tiny())
    frozen = next(model.base_model.spiel_layers()).spiel_values["default"]
    frozen.requires_grad_(False)
    with pytest.raises(UserError, match="no gradient reached 'model.layers.0.self_attn.q_proj.weight' at step 1"):
        train(model, 1, torch.optim.AdamW([one for one in model.parameters() if one.requires_grad]))


def test_an_optimizer_of_some_of_the_deltas_is_refused() -> None:
    model = wrapped(tiny())
    values = [layer.spiel_values["default"] for layer in model.base_model.spiel_layers()]
    with pytest.raises(UserError, match="optimizer: got one without the deltas of"):
        train(model, 1, torch.optim.AdamW(values[1:]))


def test_an_optimizer_made_before_the_adapter_is_refused() -> None:
    base = tiny()
    optimizer = torch.optim.AdamW(base.parameters())
    with pytest.raises(UserError, match="of the base's weights, which are frozen.*after get_peft_model"):
        train(wrapped(base), 1, optimizer)


def test_the_first_step_that_nobody_wrote_is_refused_as_any_other() -> None:
    for step in range(2):
        model = wrapped(tiny(), method="random")
        train(model, step)
        values = [one for one in model.parameters() if one.requires_grad]
        model(**batches(1)[0]).loss.backward()
        with torch.no_grad():
            for one in values:
                one.sub_(0.01)
        with pytest.raises(UserError, match="nobody has written them"):
            model(**batches(1)[0])


def test_zero_gradients_on_one_of_several_ranks_do_not_make_it_choose_again_alone() -> None:
    model = wrapped(tiny())
    session, calls = model.base_model.session("default"), []

    def of_both(gradient, count):  # the other rank's gradients are not zero
        calls.append(count)
        return torch.arange(count)

    session.group = types.SimpleNamespace(size=2, select_candidates=of_both)
    (model(**batches(1)[0]).loss * 0).backward()  # a group of equal rewards, in GRPO
    chosen = dict(session.recorder.candidates)
    model(**batches(1)[0]).loss.backward()
    assert len(calls) == len(chosen) == len(session.layers) and session.recorder.candidates == chosen


def test_a_batch_that_mixes_adapters_is_refused() -> None:
    model = wrapped(tiny()).eval()
    with pytest.raises(UserError, match="adapter_names: got one for each row"):
        model(**batches(1)[0], adapter_names=["default"] * 4)


class _Momentum8bit(_SignOfMomentum):
    eight_bits = True


def test_an_optimizer_whose_state_cannot_follow_is_named_and_may_be_reset() -> None:
    model = wrapped(tiny())
    with pytest.raises(UserError, match=r"_Momentum8bit keeps 'state1' \(uint8.*optimizer_state='reset'"):
        train(model, 1, _Momentum8bit(model.parameters()))
    adadelta = wrapped(tiny())
    with pytest.raises(UserError, match="Adadelta keeps 'square_avg' without the option 'alpha'"):
        train(adadelta, 1, torch.optim.Adadelta(adadelta.parameters()))
    model = wrapped(tiny(), optimizer_state="reset")
    base = weights_of(model)
    optimizer = train(model, 6, _Momentum8bit(model.parameters()))
    assert session_of(model).reallocations == [2, 6] and holds_its_deltas(model, base) and not optimizer.state
    train(wrapped(tiny(), method="random"), 2, _Momentum8bit(model.parameters()))


def test_a_model_in_shards_is_refused() -> None:
    model = tiny()
    model.model.layers[0].mlp.up_proj.weight.ds_id = 3  # as DeepSpeed marks a parameter
    with pytest.raises(UserError, match=r"'model.layers.0.mlp.up_proj' in shards.*scale-sft train"):
        wrapped(model)
