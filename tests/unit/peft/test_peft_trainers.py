"""Under the Trainers of transformers and TRL: the callback, resuming, and the examples as they are."""

from __future__ import annotations

import importlib.util
import re
import runpy
import sys
import types
from pathlib import Path

import pytest
import torch
from tiny_peft import batches, same, session_of, tiny, weights_of, wrapped
from transformers import AutoModelForCausalLM, Trainer, TrainerCallback, TrainingArguments
from transformers.trainer import DEFAULT_CALLBACKS

from scale_sft.adapters.format import Adapter
from scale_sft.errors import UserError
from scale_sft.files import ASSETS
from scale_sft.peft import SpielCallback, SpielConfig

EXAMPLES = Path(__file__).resolve().parents[3] / "examples"
ROWS = [{"input_ids": row, "labels": row} for batch in batches(16) for row in batch["input_ids"]]


def trainer(model, folder: Path, steps: int = 12, rows=ROWS, optimizers=(None, None), callbacks=None, **options):
    arguments = TrainingArguments(
        str(folder), max_steps=steps, per_device_train_batch_size=4, learning_rate=1e-2, use_cpu=True, report_to=[],
        disable_tqdm=True, dataloader_pin_memory=False, **{"save_strategy": "no", "logging_steps": 4, **options},
    )  # fmt: skip
    return Trainer(
        model, arguments, train_dataset=rows, eval_dataset=ROWS[:8], optimizers=optimizers, callbacks=callbacks
    )


def test_a_trainer_has_the_callback_and_resumes_bit_for_bit_within_an_estimation_phase(tmp_path) -> None:
    options = {"total_steps": None, "update_interval_steps": 4, "estimation_steps": 3}
    whole = wrapped(tiny(), **options)
    trainer(whole, tmp_path, save_strategy="steps", save_steps=9, gradient_accumulation_steps=2).train()
    assert session_of(whole).total_steps == 12 and session_of(whole).reallocations == [3, 7, 11]
    resumed = wrapped(tiny(), **options)
    again = trainer(resumed, tmp_path, gradient_accumulation_steps=2)
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-9"))
    assert session_of(resumed).reallocations == [3, 7, 11] and same(weights_of(whole), weights_of(resumed))
    assert Adapter.load(tmp_path / "checkpoint-9").active() == session_of(whole).store.active


def test_the_best_checkpoint_is_loaded_into_the_weights(tmp_path) -> None:
    model = wrapped(tiny(), total_steps=None)
    run = trainer(
        model, tmp_path, steps=8, save_strategy="steps", eval_strategy="steps", save_steps=4, eval_steps=4,
        load_best_model_at_end=True,
    )  # fmt: skip
    run.train()
    best = run.state.best_model_checkpoint
    held = run.evaluate()["eval_loss"]
    assert held == pytest.approx(min(row["eval_loss"] for row in run.state.log_history if "eval_loss" in row))
    saved = Adapter.load(best)
    for layer in model.base_model.spiel_layers():
        assert torch.equal(layer.spiel_values["default"], saved.deltas[layer.weight_name])


def test_a_second_training_begins_its_own_schedule_with_the_entries_of_the_first(tmp_path) -> None:
    model = wrapped(tiny(), total_steps=None)
    for _ in range(2):
        trainer(model, tmp_path, steps=6).train()
        assert session_of(model).steps == 6
    assert session_of(model).chosen and session_of(model).schedule.replaced(2, 100) != 100


def test_the_same_trainer_trains_twice(tmp_path) -> None:
    run = trainer(wrapped(tiny(), total_steps=None), tmp_path, steps=6)
    for _ in range(2):
        run.train()
        assert session_of(run.model).steps == 6


def test_an_optimizer_made_before_the_adapter_is_refused(tmp_path) -> None:
    base = tiny()
    optimizer = torch.optim.AdamW(base.parameters())
    with pytest.raises(UserError, match="expected one made after get_peft_model"):
        trainer(wrapped(base), tmp_path, optimizers=(optimizer, None)).train()


def test_a_step_that_a_scaler_has_skipped_is_no_error() -> None:
    model = wrapped(tiny())
    model(**batches(1)[0]).loss.backward()
    stepped = types.SimpleNamespace(step_was_skipped=True)  # Accelerate's, with fp16=True on a GPU
    SpielCallback().on_step_end(None, None, None, model=model, optimizer=stepped)
    model(**batches(1)[0]).loss.backward()
    stepped.step_was_skipped = False
    with pytest.raises(UserError, match="without torch's step hooks"):
        SpielCallback().on_step_end(None, None, None, model=model, optimizer=stepped)


@pytest.mark.parametrize("fused", [False, True])  # a scaler does call a fused optimizer, whose kernel then skips
def test_steps_that_a_scaler_skips_are_no_steps_of_drop_and_grow_and_resume(fused) -> None:
    model, skipped = wrapped(tiny(seed=3)), {1, 4, 6}
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, fused=fused)
    scaler, callback = torch.amp.GradScaler("cpu", init_scale=1024.0, growth_interval=100), SpielCallback()
    arguments = types.SimpleNamespace(deepspeed=None, fsdp=None)
    begun = {"model": model, "optimizer": optimizer}
    callback.on_train_begin(arguments, types.SimpleNamespace(max_steps=12, global_step=0), None, **begun)
    for number, batch in enumerate(batches(9)):
        scaler.scale(model(**batch).loss).backward()
        if number in skipped:
            next(one for one in model.parameters() if one.grad is not None).grad[0] = torch.inf
        before = scaler.get_scale()
        scaler.step(optimizer)
        scaler.update()
        seen = types.SimpleNamespace(step_was_skipped=not fused and scaler.get_scale() < before)  # as Accelerate's
        callback.on_step_end(None, None, None, model=model, optimizer=seen)
        optimizer.zero_grad()
    session = model.base_model.sessions["default"]
    assert (session.steps, session.skipped, session.reallocations) == (6, 3, [2, 6])
    assert all(bool(one.isfinite().all()) for state in optimizer.state.values() for one in state.values())
    callback.on_train_begin(arguments, types.SimpleNamespace(max_steps=12, global_step=9), None, **begun)
    assert model.base_model.sessions["default"].skipped == 3


def test_without_the_callback_of_itself_one_argument_does(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(
        "transformers.trainer.DEFAULT_CALLBACKS", [one for one in DEFAULT_CALLBACKS if one is not SpielCallback]
    )
    with pytest.raises(UserError, match=r"total_steps: got none.*callbacks=\[scale_sft.peft.SpielCallback\(\)\]"):
        trainer(wrapped(tiny(), total_steps=None), tmp_path, steps=2).train()
    model = wrapped(tiny(), total_steps=None)
    trainer(model, tmp_path, steps=2, callbacks=[SpielCallback()]).train()
    assert session_of(model).total_steps == 2


class _NoHooks:
    """An optimizer of its own kind, as some libraries have them."""

    def __init__(self, parameters):
        self.parameters = [one for one in parameters if one.requires_grad]
        self.param_groups = [{"params": self.parameters, "lr": 1e-3}]
        self.state, self.defaults = {}, {}

    def step(self, closure=None):
        for one in self.parameters:
            one.data.add_(one.grad, alpha=-1e-3)

    def zero_grad(self, set_to_none=True):
        for one in self.parameters:
            one.grad = None


def test_an_optimizer_that_steps_unseen_stops_the_training_at_once() -> None:
    model = wrapped(tiny())
    optimizer = _NoHooks(model.parameters())
    arguments, state = (
        types.SimpleNamespace(deepspeed=None, fsdp=None),
        types.SimpleNamespace(max_steps=4, global_step=0),
    )
    callback, given = SpielCallback(), {"model": model, "optimizer": optimizer}
    callback.on_train_begin(arguments, state, None, **given)
    model(**batches(1)[0]).loss.backward()
    optimizer.step()
    with pytest.raises(UserError, match="_NoHooks has stepped without torch's step hooks"):
        callback.on_step_end(arguments, state, None, **given)


@pytest.mark.parametrize(("name", "said"), [("deepspeed", "DeepSpeed"), ("fsdp", "FSDP")])
def test_a_trainer_that_shards_the_model_is_refused_with_the_way_that_works(name, said) -> None:
    model = wrapped(tiny())
    arguments = types.SimpleNamespace(**({"deepspeed": None, "fsdp": None} | {name: "full_shard"}))
    with pytest.raises(UserError, match=f"{said}: got a Trainer that uses it.*`scale-sft train`"):
        SpielCallback().on_train_begin(arguments, None, None, model=model, optimizer=None)


def test_a_checkpoint_without_the_state_of_its_optimizer_is_refused(tmp_path) -> None:
    model = wrapped(tiny())
    arguments, state = (
        types.SimpleNamespace(deepspeed=None, fsdp=None),
        types.SimpleNamespace(max_steps=9, global_step=5),
    )
    with pytest.raises(UserError, match="resume_from_checkpoint: got a checkpoint of step 5 .* 0 steps"):
        SpielCallback().on_train_begin(
            arguments, state, None, model=model, optimizer=torch.optim.AdamW(model.parameters())
        )


def test_models_without_such_layers_train_as_ever(tmp_path) -> None:
    trainer(tiny(), tmp_path, steps=1, callbacks=[TrainerCallback()]).train()


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("trl") is None, reason="needs trl")
@pytest.mark.parametrize(
    ("script", "moves"),
    [("peft_trainer", [5]), ("trl_sft", []), ("trl_dpo", []), ("trl_kto", []), ("trl_grpo", [3])],
)
def test_an_example_trains_and_its_reference_is_the_base(script, moves, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(sys, "argv", [script, str(tmp_path), "6"])
    names = runpy.run_path(str(EXAMPLES / f"{script}.py"), run_name="__main__")
    model = names["trainer"].model
    assert session_of(model).reallocations[:1] == moves
    assert type(model.peft_config["default"]) is SpielConfig
    base = AutoModelForCausalLM.from_pretrained(ASSETS / "demo" / "base", dtype="float32").eval()
    ids = torch.arange(3, 40)[None]
    with torch.no_grad():
        tuned = model.eval()(ids).logits
        with model.disable_adapter():
            assert torch.equal(model(ids).logits, base(ids).logits)
    assert not torch.equal(tuned, base(ids).logits)
    assert Adapter.load(tmp_path / "adapter").active() == session_of(model).store.active


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("trl") is None, reason="needs trl")
def test_the_examples_of_the_page_run_one_after_the_other(tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    names: dict = {}
    page = (EXAMPLES.parent / "docs" / "peft.md").read_text(encoding="utf-8")
    for code in re.findall(r"```python\n(.*?)```", page, re.DOTALL):
        exec(compile(code, "docs/peft.md", "exec"), names)
    assert set(names["model"].peft_config) == {"default", "both"} and (tmp_path / "copy").is_dir()
