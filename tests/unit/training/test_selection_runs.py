"""Runs that choose their entries before the first update, or from the seed alone."""

import pytest
import torch

from scale_sft.adapters.format import Adapter
from scale_sft.errors import UserError
from scale_sft.reporting.metrics_file import read_metrics
from scale_sft.spiel.seeding import random_indices


def test_the_seed_alone_rebuilds_the_entries_of_a_random_run(train_run):
    run = train_run(method="random", seed=3)
    adapter = Adapter.load(run / "adapter")
    for name, indices in adapter.indices.items():
        assert torch.equal(indices, random_indices(adapter.shapes[name], indices.numel(), 3, name))
    assert not [record for record in read_metrics(run / "metrics.jsonl") if record["event"] == "reallocation"]


@pytest.mark.parametrize("score", ["balanced", "gradient_weight"])
def test_a_quantised_base_chooses_as_well(score, train_run, capsys):
    run = train_run(method="static", selection_batches=2, score=score, quantization="nf4")
    records = read_metrics(run / "metrics.jsonl")
    losses = [record["loss"] for record in records if record["event"] == "step"]
    assert losses[-1] < losses[0]
    assert f"entries: the best by {score} (selection_batches 2), before the first update" in capsys.readouterr().out


def test_lora_like_shares_give_each_weight_its_rows_and_columns(train_run):
    run = train_run(method="random", density=0.05, budget="rank")
    adapter = Adapter.load(run / "adapter")
    counts = {name: adapter.indices[name].numel() / sum(shape) for name, shape in adapter.shapes.items()}
    assert max(counts.values()) / min(counts.values()) < 1.05


def test_an_unknown_score_is_refused_before_the_base_is_loaded(train_run, monkeypatch):
    from scale_sft.training import inputs

    monkeypatch.setattr(inputs, "load_model_config", lambda *_: pytest.fail("the base was opened"))
    with pytest.raises(UserError, match="score: got 'gradeint', expected one of"):
        train_run(score="gradeint")
