"""Adapters of two tasks can be added, and merged and unmerged, with figures that say what is lost."""

import json

import pytest
import torch
from click.testing import CliRunner
from torch import nn

from scale_sft.bench.quality.drift import restored, subtracted
from scale_sft.bench.quality.merging import add_updates
from scale_sft.bench.quality.updates import peft_updates
from scale_sft.cli.main import main


def test_stored_values_restore_the_base_and_subtraction_moves_it():
    generator = torch.Generator().manual_seed(0)
    base = torch.randn(64, 32, generator=generator).to(torch.bfloat16)
    change = torch.zeros(64, 32)
    change.view(-1)[::5] = 0.3 * torch.randn(len(change.view(-1)[::5]), generator=generator)
    weight, changed = restored(base, change, 3)
    assert torch.equal(weight, base) and changed == 0
    weight, changed = subtracted(base, change, 1000)
    moved = (weight != base).view(-1)
    assert 0 < changed < 1000 and moved[::5].any() and not moved.view(-1)[1::5].any()
    assert torch.equal(subtracted(weight, change, 5)[0], weight)  # it has settled: further cycles change nothing


def small_peft(dtype=torch.float32):
    import peft

    torch.manual_seed(0)
    model = peft.get_peft_model(
        nn.Sequential(nn.Linear(24, 16)).to(dtype), peft.LoraConfig(r=2, target_modules=["0"], use_rslora=True)
    )
    nn.init.normal_(model.base_model.model[0].lora_B["default"].weight, std=0.5)
    return model


def test_subtraction_is_what_peft_does():
    model = small_peft(torch.bfloat16)
    layer = model.base_model.model[0].base_layer
    before, (update,) = layer.weight.detach().clone(), peft_updates(model)
    for _ in range(4):
        model.merge_adapter()
        model.unmerge_adapter()
    found, _ = subtracted(before, update.change, 4)
    assert not torch.equal(layer.weight, before) and torch.equal(layer.weight, found)


def test_an_update_of_peft_is_merged_minus_base():
    model = small_peft()
    (update,) = peft_updates(model)
    plain = nn.Sequential(nn.Linear(24, 16))
    plain.load_state_dict({"0.weight": update.base, "0.bias": model.base_model.model[0].base_layer.bias})
    merged = model.merge_and_unload()
    assert update.name == "0.weight" and torch.allclose(merged[0].weight - plain[0].weight, update.change, atol=1e-6)
    add_updates(plain, {update.name: update.change})
    assert torch.allclose(plain[0].weight, merged[0].weight, atol=1e-6)


def test_the_command_merges_and_drifts_at_the_best_rates(tmp_path, tiny_model, pairs_file):
    arguments = [
        *("--base", str(tiny_model("llama")), "--dtype", "float32", "--steps", "2", "--seeds", "1", "--drift"),
        *("--methods", "random,lora", "--learning-rates", "random=0.05", "--learning-rates", "lora=0.05"),
        *("--task", f"a={pairs_file},{pairs_file}", "--task", f"b={pairs_file},{pairs_file},max_length=12"),
        *("--global-batch-size", "2", "--validation-examples", "4", "--jobs", "1", "--output", str(tmp_path)),
    ]
    command = ["bench", "quality", *arguments, "--merging"]
    result = CliRunner().invoke(main, command)
    assert result.exit_code == 0, result.output
    rows = lambda name: [json.loads(line) for line in (tmp_path / f"{name}.jsonl").read_text().splitlines()]
    quality, (base, *added), drift = rows("quality"), rows("merging"), rows("drift")
    losses = {
        (row["settings"]["shared"]["task"], row["settings"]["method"]): row["result"]["held_out_loss"]
        for row in quality
    }
    assert base["result"]["merged"] == base["result"]["alone"] == [losses["a", "base"], losses["b", "base"]]
    for row in added:
        method, found = row["settings"]["method"], row["result"]
        assert found["alone"] == pytest.approx([losses["a", method], losses["b", method]])
        assert found["merged"][0] != found["alone"][0] and found["merged"][0] < base["result"]["alone"][0]
    assert [sorted(row["result"]["ways"]) for row in drift] == [["restore", "subtract"], ["subtract"]] * 2
    for row in drift[::2]:
        assert row["result"]["ways"]["restore"]["moved_fraction"] == 0
        assert row["result"]["ways"]["restore"]["loss"] == row["result"]["base_loss"]
    text = (tmp_path / "bench.html").read_text()
    assert "Merging: two adapters added" in text and "Drift: merged and unmerged in bfloat16" in text
    again = CliRunner().invoke(main, command)
    assert "merging: 3 of 3 runs are done already" in again.output
    assert "drift: 4 of 4 runs are done already" in again.output


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--merging"], "--merging: got 1 task, expected two or more"),
        (["--drift", "--quantization", "nf4"], "--drift: got a base in nf4, expected one that is not quantised"),
    ],
)
def test_a_report_that_cannot_be_made_is_refused_before_anything_runs(tmp_path, arguments, message):
    result = CliRunner().invoke(main, ["bench", "quality", *arguments, "--output", str(tmp_path / "out")])
    assert result.exit_code == 1 and message in result.stderr
    assert not (tmp_path / "out").exists()
