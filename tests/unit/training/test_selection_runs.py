"""Runs that choose their entries before the first update, or from the seed alone."""

import pytest
import torch

from scale_sft.adapters.export import export
from scale_sft.adapters.format import Adapter
from scale_sft.adapters.verify import verify
from scale_sft.errors import UserError
from scale_sft.reporting.metrics_file import read_metrics
from scale_sft.spiel.seeding import random_indices
from scale_sft.spiel.tiles import Tiling


def test_the_seed_alone_rebuilds_the_entries_of_a_random_run(train_run):
    run = train_run(method="random", seed=3)
    adapter = Adapter.load(run / "adapter")
    for name, indices in adapter.indices.items():
        assert torch.equal(indices, random_indices(adapter.shapes[name], indices.numel(), 3, name))
    assert not [record for record in read_metrics(run / "metrics.jsonl") if record["event"] == "reallocation"]


@pytest.mark.parametrize(
    ("method", "score", "what"),
    [("static", "balanced", "entries"), ("static", "gradient_weight", "entries"), ("columns", "balanced", "columns")],
)
def test_a_quantised_base_chooses_as_well(method, score, what, train_run, capsys):
    run = train_run(method=method, selection_batches=2, score=score, draw="top", quantization="nf4")
    records = read_metrics(run / "metrics.jsonl")
    losses = [record["loss"] for record in records if record["event"] == "step"]
    assert losses[-1] < losses[0]
    assert f"{what}: the best by {score} (selection_batches 2), before the first update" in capsys.readouterr().out


@pytest.mark.parametrize("quantization", ["none", "nf4"])
def test_columns_move_and_stay_whole_also_in_files_for_others(quantization, train_run, tmp_path):
    moving = {"method": "ag", "granularity": "column", "draw": "sample", "drop_criterion": "age", "density": 0.2}
    run = train_run(**moving, quantization=quantization)
    records = read_metrics(run / "metrics.jsonl")
    losses = [record["loss"] for record in records if record["event"] == "step"]
    moves = [record["replaced"] for record in records if record["event"] == "reallocation"]
    assert losses[-1] < losses[0] and len(moves) == 3 and all(moves[:2])
    adapter = Adapter.load(run / "adapter")
    for name, (rows, columns) in adapter.shapes.items():
        Tiling((rows, columns), rows, 1).chosen_in(adapter.indices[name])
    assert "columns" in (run / "adapter" / "README.md").read_text()
    if quantization == "none":
        export(run / "adapter", "shira", tmp_path / "out")
        assert verify(run / "adapter", "shira", tmp_path / "out").identical


def test_lora_like_shares_give_each_weight_its_rows_and_columns(train_run):
    run = train_run(method="random", density=0.05, budget="rank")
    adapter = Adapter.load(run / "adapter")
    counts = {name: adapter.indices[name].numel() / sum(shape) for name, shape in adapter.shapes.items()}
    assert max(counts.values()) / min(counts.values()) < 1.05


def test_a_global_ranking_keeps_the_total_and_each_floor(train_run, tmp_path):
    options = {"method": "static", "selection_batches": 2, "density": 0.05}
    even = Adapter.load(train_run(**options, output_dir=str(tmp_path / "even")) / "adapter")
    run = train_run(**options, budget="global", budget_floor=0.5, output_dir=str(tmp_path / "ranked"))
    ranked = Adapter.load(run / "adapter")
    counts = [{name: indices.numel() for name, indices in adapter.indices.items()} for adapter in (even, ranked)]
    assert sum(counts[0].values()) == sum(counts[1].values()) and counts[0] != counts[1]
    assert all(counts[1][name] >= 0.5 * count - 1 for name, count in counts[0].items())


def test_an_unknown_score_is_refused_before_the_base_is_loaded(train_run, monkeypatch):
    from scale_sft.training import inputs

    monkeypatch.setattr(inputs, "load_model_config", lambda *_: pytest.fail("the base was opened"))
    with pytest.raises(UserError, match="score: got 'gradeint', expected one of"):
        train_run(score="gradeint")
