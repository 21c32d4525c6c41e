"""A plan says what a run will need: checked against what runs do need, and against arithmetic."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig

from scale_sft.cli.main import main
from scale_sft.config.loading import load
from scale_sft.config.options import SparseConfig
from scale_sft.model import reach
from scale_sft.model.empty import empty_model
from scale_sft.planning.meta_trace import step_memory
from scale_sft.planning.planner import GIB, Planner
from scale_sft.planning.suggestions import smallest_change

LLAMA = {
    "vocab_size": 4096, "hidden_size": 512, "intermediate_size": 1376, "num_hidden_layers": 6, "num_attention_heads": 8,
    "num_key_value_heads": 4, "max_position_embeddings": 512, "bos_token_id": 256, "eos_token_id": 257, "pad_token_id": 258,
}  # fmt: skip


def command(*arguments):
    return CliRunner().invoke(main, ["plan", *map(str, arguments)])


def plan(shape: str, *arguments):
    result = command("--shape", shape, "--density", 0.01, "--json", *arguments)
    assert result.exit_code == 0, result.output
    return json.loads(result.output[result.output.index("{") :])


def test_a_plan_has_the_learning_rate_of_budget_and_depth() -> None:
    assert (plan("7b")["learning_rate"], plan("7b", "--learning_rate", 0.02)["learning_rate"]) == (0.0019, 0.02)
    assert "learning rate: 0.00019 at its peak" in command("--shape", "7b", "--density", 0.01, "--method", "ag").output


def test_a_deep_model_is_traced_as_its_first_blocks_say() -> None:
    deep = LlamaConfig(**{**LLAMA, "num_hidden_layers": 9})
    from scale_sft.planning import meta_trace as planner_trace

    options = {"sequences": 2, "tokens": 64}
    found = step_memory(deep, torch.float32, **options)
    whole = planner_trace._trace(deep, torch.float32, 2, 64, SparseConfig(), {}, True, False, "sdpa", False)
    assert vars(found) == pytest.approx(vars(whole), rel=0.01)


def test_blocks_of_a_model_that_was_probed_are_traced_without_a_probe_of_their_own(monkeypatch) -> None:
    deep, options = LlamaConfig(**{**LLAMA, "num_hidden_layers": 9}), {"sequences": 2, "tokens": 64}
    probed: dict = {}
    monkeypatch.setattr(reach, "_PROBED", probed)
    faults = reach.reach_of(empty_model(deep)).faults
    found = step_memory(deep, torch.float32, faults=faults, **options)
    assert len(probed) == 1
    assert found == step_memory(deep, torch.float32, **options)
    assert len(probed) == 3


def test_the_sums_of_a_first_choice_are_counted_in_units_of_what_it_looks_at() -> None:
    row = lambda *given: plan("7b", "--method", "static", *given)["rows"]["sums of the first choice"]
    active, entries = (plan("7b")[key] for key in ("active", "entries"))
    assert row() == pytest.approx(4 * 8 * active, rel=1e-6)
    assert row("--gpus", 4) == pytest.approx(8 * active, rel=1e-6)
    assert row("--score", "snr") == pytest.approx(12 * 8 * active, rel=1e-6)
    assert 0.9 * 4 * entries < row("--selection_pool", "none") < 4 * entries
    assert row("--selection_batches", 0, "--score", "gradient") == 0


def test_checkpointing_keeps_one_activation_per_block() -> None:
    config = LlamaConfig(**LLAMA)
    kept = step_memory(config, torch.float32, sequences=2, tokens=128).activations
    recomputed = step_memory(config, torch.float32, sequences=2, tokens=128, checkpointing=True).activations
    assert recomputed < 0.2 * kept
    assert recomputed > LLAMA["num_hidden_layers"] * 2 * 128 * LLAMA["hidden_size"] * 4


def test_whole_columns_keep_less_for_the_backward_pass_and_form_no_gradient_of_a_weights_size() -> None:
    options = {method: ("--method", method) for method in ("random", "columns")}
    options["moving"] = ("--method", "ag", "--granularity", "column")
    chosen = {name: plan("7b", *given)["rows"] for name, given in options.items()}
    assert chosen["columns"]["activations"] < 0.85 * chosen["random"]["activations"]
    for name in ("columns", "moving"):
        assert chosen[name]["largest weight gradient"] < 0.02 * chosen["random"]["largest weight gradient"]
    assert chosen["moving"]["activations"] == chosen["random"]["activations"]  # in phases
    assert 0 < chosen["moving"]["candidates"] < 0.6 * plan("7b", "--method", "ag")["rows"]["candidates"]


def test_eager_attention_keeps_its_square_matrices() -> None:
    config = LlamaConfig(**LLAMA)
    fused = step_memory(config, torch.float32, sequences=1, tokens=256).activations
    eager = step_memory(config, torch.float32, sequences=1, tokens=256, attention="eager").activations
    assert eager - fused > 6 * 8 * 256 * 256 * 4


def test_a_base_of_seven_billion_weights_has_their_size() -> None:
    found = plan("7b", "--global_batch_size", 1, "--gpu-memory", 80)
    assert found["entries"] == 6738415616
    assert found["rows"]["base"] == 2 * 6738415616
    assert found["rows"]["optimizer state"] == 6 * found["active"]  # of a bf16 base
    assert found["fits"] and found["traffic"] == {}


def test_a_shard_is_a_part_of_the_base_and_costs_gathering() -> None:
    one = plan("13b", "--global_batch_size", 8, "--base_placement", "replicate", "--gpus", 8)
    many = plan("13b", "--global_batch_size", 8, "--base_placement", "shard", "--gpus", 8)
    assert many["rows"]["base"] == one["rows"]["base"] // 8
    assert many["traffic"]["gathering of the base"] > one["rows"]["base"]
    assert "gathering of the base" not in one["traffic"]


def test_what_does_not_fit_is_told_with_a_change_that_does() -> None:
    arguments = ("--shape", "7b", "--density", 0.01, "--global_batch_size", 16, "--gpu-memory", 24)
    result = command(*arguments)
    assert result.exit_code == 0 and "does not fit" in result.output
    assert command(*arguments, "--check").exit_code == 1
    assert "smallest change that fits: --micro_batch_size 1 --gradient_checkpointing true" in result.output
    fixed = command(*arguments, "--micro_batch_size", 1, "--gradient_checkpointing", "true", "--check")
    assert fixed.exit_code == 0 and "\nfits: " in fixed.output


def test_the_proposed_change_fits_when_it_is_made() -> None:
    config = load(None, {"base": str(Path(__file__).parents[3] / "scale_sft/assets/shapes/70b"), "density": 0.001,
                         "global_batch_size": 8})  # fmt: skip
    from scale_sft.model.loading import load_model_config

    planner = Planner(load_model_config(config.model))
    assert not planner.plan(config, gpus=2, gpu_memory_gb=80).fits
    told, found = smallest_change(planner, config, gpus=2, gpu_memory_gb=80)
    assert found.fits and found.peak <= found.room < 80 * GIB
    assert "gradient_checkpointing" in told


def test_wrong_requests_are_told() -> None:
    assert "did you mean '70b'" in command("--shape", "700b", "--density", 0.1).output
    assert "does not divide over 3 ranks" in command("--shape", "7b", "--density", 0.1, "--gpus", 3).output
    assert "budget" in command("--shape", "7b").output
    assert (
        "rank_equivalent: got 9,999, expected 1 to 2,048" in command("--shape", "7b", "--rank_equivalent", 9999).output
    )
    assert "--check needs --gpu-memory" in command("--shape", "7b", "--density", 0.1, "--check").output
    assert "did you mean 'density'" in command("--shape", "7b", "--densty", 0.1).output


# fmt: off
MEASURED = {
    "llama": {"model": "llama", "dtype": "float32", "density": 0.02, "global_batch_size": 2},
    "llama in bf16": {
        "model": "llama", "dtype": "bfloat16", "density": 0.02, "global_batch_size": 2, "attention": "sdpa"
    },  # a plan is for a GPU; on a CPU `auto` takes eager here
    "checkpointing": {
        "model": "llama", "dtype": "float32", "density": 0.02, "global_batch_size": 4, "gradient_checkpointing": True
    },
    "SM3, two micro-steps": {
        "model": "llama", "dtype": "float32", "method": "ma", "density": 0.05, "global_batch_size": 4, "micro_batch_size": 2
    },
    "many deltas": {
        "model": "llama", "dtype": "float32", "density": 0.2, "global_batch_size": 1, "steps": 2, "estimation_steps": 2,
        "update_interval_steps": 2,
    },  # candidates are all there from the second step of their phase on
    "transposed weights": {"model": "gpt2", "dtype": "float32", "density": 0.02, "global_batch_size": 2},
    "eager attention": {"model": "llama", "dtype": "float32", "rank_equivalent": 8, "global_batch_size": 1, "attention": "eager"},
}
# fmt: on


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads RssAnon from /proc")
def test_plans_are_within_a_tenth_of_the_measured_peak(tmp_path, tokenizer, tiny_model) -> None:
    """The base is stored in the other dtype, so that all of it is private memory once it is converted."""
    bases = {"llama": LlamaConfig(**LLAMA | {"num_hidden_layers": 4}), "gpt2": GPT2Config(
        vocab_size=4096, n_embd=512, n_layer=4, n_head=8, n_positions=512, bos_token_id=256, eos_token_id=257
    )}  # fmt: skip
    data = tmp_path / "long.jsonl"
    data.write_text((json.dumps({"prompt": "x", "completion": "abc" * 200}) + "\n") * 8)
    common = {"train_data": str(data), "method": "ag", "loss_on": "all", "steps": 1, "update_interval_steps": 1, "estimation_steps": 1,
              "base_placement": "replicate", "max_length": 256}  # fmt: skip
    runs, planned = [], []
    for number, options in enumerate(MEASURED.values()):
        options = dict(options)
        model = options.pop("model")
        stored = "bfloat16" if options["dtype"] == "float32" else "float32"
        folder = tmp_path / f"{model}-{stored}"
        if not folder.exists():
            AutoModelForCausalLM.from_config(bases[model]).to(getattr(torch, stored)).save_pretrained(folder)
            tokenizer.save_pretrained(folder)
        runs.append({**common, **options, "base": str(folder), "output_dir": str(tmp_path / f"run{number}")})
        config = load(None, runs[-1])
        from scale_sft.model.loading import load_model_config

        planned.append(Planner(load_model_config(config.model)).plan(config).peak)
    warm_up = {**runs[0], "base": str(tiny_model("llama")), "max_length": 32, "output_dir": str(tmp_path / "warm")}
    environment = {
        **os.environ, "PYTHONPATH": str(Path(__file__).parents[3]), "OMP_NUM_THREADS": "1",
        "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_ARENA_MAX": "1",
    }  # fmt: skip
    done = subprocess.run(
        [sys.executable, str(Path(__file__).with_name("measure_run.py")), *map(json.dumps, [warm_up, *runs])],
        env=environment, capture_output=True, text=True, timeout=800,
    )  # fmt: skip
    measured = [int(line.split()[1]) for line in done.stdout.splitlines() if line.startswith("PEAK")]
    assert len(measured) == len(runs), done.stderr[-3000:]
    table = {
        name: (round(plan / 2**20, 1), round(peak / 2**20, 1), round(plan / peak, 3))
        for name, plan, peak in zip(MEASURED, planned, measured, strict=True)
    }
    print(table)
    assert all(0.95 <= ratio <= 1.1 for _, _, ratio in table.values()), table
