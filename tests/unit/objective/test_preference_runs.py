"""Runs of preference tuning: cut, packed, resumed, evaluated and described as those of sft."""

from __future__ import annotations

import json

import pytest
import torch

from scale_sft import train
from scale_sft.config.loading import load
from scale_sft.config.options import ConfigError
from scale_sft.reporting.metrics_file import read_metrics
from scale_sft.training.best import best_step

FILE = "adapter/adapter_model.safetensors"


def records(run, event):
    return [record for record in read_metrics(run / "metrics.jsonl") if record["event"] == event]


@pytest.fixture
def options(preferences_file, marked_file):
    """(objective) -> options of a short run."""

    def get(objective="dpo"):
        data = str(marked_file if objective == "kto" else preferences_file)
        return {"objective": objective, "train_data": data, "max_length": 64, "log_every_steps": 1}

    return get


@pytest.mark.parametrize("objective", ["dpo", "orpo", "kto"])
@pytest.mark.parametrize("packing", [False, True], ids=["padded", "packed"])
def test_the_cut_into_micro_batches_does_not_change_loss_and_gradient(prefer, step_of, objective, packing):
    batch = [2, 17, 6, 12, 20, 9]
    whole = step_of(prefer(objective), batch)
    for size in (1, 2):
        part = step_of(prefer(objective, packing=packing, micro_batch_size=size, global_batch_size=6), batch)
        assert part.loss == pytest.approx(whole.loss, rel=1e-5)
        torch.testing.assert_close(part.gradient, whole.gradient, rtol=1e-4, atol=1e-6)
        for name in ("reward_chosen", "reward_rejected", "length_chosen", "chosen_nll"):
            assert part.counts[name] == pytest.approx(whole.counts[name], rel=1e-4)


def test_a_shared_prompt_is_computed_once(prefer, step_of):
    padded, packed = (step_of(prefer(packing=packing), [1, 9]).counts for packing in (False, True))
    shared = [prefer().inputs.train.shared_tokens(n) for n in (1, 9)]
    assert min(shared) > 5 and padded["all"] - packed["all"] == sum(shared)
    assert packed["tokens_per_example"] == packed["all"] / 2 and packed["target"] == padded["target"]


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("architecture", ["gpt2", "opt", "qwen2"])
def test_prompts_are_shared_in_every_architecture_that_follows_a_mask(
    prefer, step_of, tiny_model, architecture, attention
):
    base = {"base": str(tiny_model(architecture)), "attention": attention}
    alone, packed = prefer(**base), prefer(**base, packing=True)
    one, other = (step_of(run, [3, 4]) for run in (alone, packed))
    assert other.loss == pytest.approx(one.loss, rel=1e-5)
    torch.testing.assert_close(other.gradient, one.gradient, rtol=1e-4, atol=1e-6)
    assert packed.objective.batches.layout.shared


def test_where_a_mask_cannot_say_it_the_sides_stand_side_by_side_and_that_is_said(prefer, step_of, monkeypatch):
    whole = step_of(prefer(), [3, 4])
    monkeypatch.setattr("scale_sft.objective.layouts.shares", lambda *_: False)
    run = prefer(packing=True)
    assert (
        not run.objective.batches.layout.shared
        and "each side of a pair has a prompt of its own" in run.objective.notes[0]
    )
    assert step_of(run, [3, 4]).loss == pytest.approx(whole.loss, rel=1e-5)


class Crash(Exception):
    """Stands for whatever ends a process."""


@pytest.mark.parametrize(
    ("objective", "more"),
    [("dpo", {"packing": True}), ("dpo", {"reference": "swapped", "method": "ma"}), ("kto", {}), ("orpo", {})],
    ids=str,
)
def test_a_resumed_run_leaves_the_same_bits(objective, more, options, train_run, tmp_path, monkeypatch):
    given = options(objective) | more | {"save_every_steps": 2, "eval_every_steps": 3}
    given |= {"eval_data": given["train_data"], "max_eval_examples": 8, "cache_dir": str(tmp_path / "cache")}
    whole = train_run(**given, output_dir=str(tmp_path / "whole"))
    original = train.forward_backward

    def crashing(session, batch):
        if session.step == 4:
            raise Crash
        return original(session, batch)

    with monkeypatch.context() as patch:
        patch.setattr(train, "forward_backward", crashing)
        with pytest.raises(Crash):
            train_run(**given)
    for file in (tmp_path / "cache").glob("reference-*"):
        file.unlink()  # measured again, with the deltas of step 4 in the model
    run = train_run(**given)
    assert (run / FILE).read_bytes() == (whole / FILE).read_bytes()
    for event in ("step", "eval"):
        mine, theirs = (
            [{k: v for k, v in r.items() if k not in ("time", "seconds", "tokens_per_second", "memory_bytes")} for r in records(folder, event)]
            for folder in (run, whole)
        )  # fmt: skip
        assert mine == theirs


def test_what_is_reported_before_training_is_that_of_the_reference_and_training_moves_it(options, train_run):
    given = options() | {
        "eval_data": options()["train_data"],
        "steps": 12,
        "learning_rate": 0.05,
        "eval_every_steps": 4,
    }
    run = train_run(**given, best_by="accuracy")
    first, *_, last = records(run, "eval")
    assert first["loss"] == pytest.approx(0.693147, rel=1e-5)
    assert (first["reward_margin"], first["reward_accuracy"], first["kl_per_token"]) == (0, 0, 0)
    assert last["loss"] < 0.6 and last["reward_accuracy"] > 0.7 and last["reward_margin"] > 0
    step = records(run, "step")[0]
    assert {"reward_chosen", "length_rejected", "tokens_per_example", "chosen_nll"} <= step.keys()
    assert json.loads((run / "best_adapter" / "adapter_config.json").read_text())["step"] > 0


def test_the_best_step_is_chosen_by_loss_or_by_accuracy():
    from scale_sft.evaluation.held_out import Evaluation

    seen = {
        step: Evaluation(loss, 1, rewards={"reward_accuracy": accuracy})
        for step, (loss, accuracy) in enumerate([(0.7, 0.0), (0.3, 0.8), (0.5, 0.9), (0.4, 0.9)])
    }
    assert (best_step(seen), best_step(seen, "accuracy")) == (1, 3)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"objective": "dpo", "beta": 0}, "beta: got 0.0, must be above 0"),
        ({"objective": "dpo", "label_smoothing": 0.5}, r"label_smoothing: got 0.5, must be in \[0, 0.5\)"),
        ({"objective": "ipo", "label_smoothing": 0.1}, "label_smoothing: got 0.1 with objective ipo, expected objective dpo"),
        ({"objective": "kto", "sft_weight": 1}, "sft_weight: got 1.0 with objective kto, expected objective dpo or ipo"),
        ({"objective": "dpo", "reference": "none"}, "reference: got none with objective dpo, expected precomputed or"),
        ({"objective": "orpo", "reference": "swapped"}, "reference: got swapped with objective orpo, which has no ref"),
        ({"reference_adapter": "there"}, "reference_adapter: got there with objective sft"),
        ({"objective": "dpo", "loss_on": "all"}, "loss_on: got all with objective dpo, expected completion or"),
        ({"objective": "kto", "loss_on": "assistant"}, "loss_on: got assistant with objective kto, expected completion"),
        ({"objective": "kto", "best_by": "accuracy"}, "best_by: got accuracy with objective kto"),
        ({"objective": "dop"}, "did you mean .dpo"),
    ],
    ids=str,
)  # fmt: skip
def test_options_that_do_not_go_together_are_refused(given, message):
    with pytest.raises(ConfigError, match=message):
        load("demo", given)


def test_the_report_shows_rewards_accuracy_and_distance(options, train_run):
    from scale_sft.reporting.run_report import write_report

    run = train_run(**options(), eval_data=options()["train_data"], max_eval_examples=8, steps=4)
    page = write_report(run).read_text()
    assert {"rewards.png", "distance.png"} <= {path.name for path in run.glob("*.png")}
    assert "Held-out accuracy" in page and "dpo, beta 0.1" in page


def test_a_plan_counts_both_sides_of_a_pair(run_options):
    from scale_sft.model.loading import load_model_config
    from scale_sft.planning.planner import Planner

    given = {**run_options, "global_batch_size": 4}
    configs = [
        load(None, given | more) for more in ({"micro_batch_size": 4}, {"micro_batch_size": 2, "objective": "dpo"})
    ]
    planner = Planner(load_model_config(configs[0].model))
    sft, pairs = (planner.plan(config).peak for config in configs)
    assert sft == pairs
