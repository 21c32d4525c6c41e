"""The walk through types of models: tiny models like a user's, findings that are kept, processes that may die."""

import os
import time
from functools import partial

import pytest
from click.testing import CliRunner
from transformers import (
    DeepseekV3Config,
    GraniteMoeHybridConfig,
    LlamaConfig,
    LlavaConfig,
    MistralConfig,
    NemotronHConfig,
    Qwen2Config,
)

from scale_sft.cli.main import main
from scale_sft.errors import UserError
from scale_sft.model.empty import empty_model
from scale_sft.model_check import findings
from scale_sft.model_check.checks import Checker
from scale_sft.model_check.findings import FAILED, Findings, code_version
from scale_sft.model_check.processes import Child, Died
from scale_sft.model_check.ranks import _compare
from scale_sft.model_check.tiny import tiny_config, tiny_like

LLAMA3 = {"rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
LLAMA3["original_max_position_embeddings"] = 8192
MAMBA, ATTENTION = "linear_attention", "full_attention"
LIKE = {
    "llama": (LlamaConfig(rope_parameters=LLAMA3, num_key_value_heads=32), {"num_key_value_heads": 4}),
    "qwen2": (Qwen2Config(tie_word_embeddings=True, hidden_act="gelu", num_key_value_heads=1),
              {"tie_word_embeddings": True, "hidden_act": "gelu", "num_key_value_heads": 1}),
    "deepseek_v3": (DeepseekV3Config(q_lora_rank=None), {"q_lora_rank": None, "kv_lora_rank": 16}),
    "granitemoehybrid": (GraniteMoeHybridConfig(num_hidden_layers=6, layers_block_type=["mamba"] * 5 + ["attention"]),
                         {"layer_types": [MAMBA, ATTENTION], "num_hidden_layers": 2}),
    "nemotron_h": (NemotronHConfig(), {"num_hidden_layers": 4}),
    "llava": (LlavaConfig(text_config=MistralConfig()), {"model_type": "mistral"}),
}  # fmt: skip


@pytest.mark.parametrize("name", LIKE)
def test_a_tiny_model_has_the_switches_of_a_base_and_none_of_its_sizes(name: str) -> None:
    config, expected = LIKE[name]
    tiny = tiny_like(config)
    assert {key: getattr(tiny.get_text_config(), key) for key in expected} == expected
    assert sum(weight.numel() for weight in empty_model(tiny).parameters()) < 400_000


def test_a_base_with_code_of_its_own_is_refused() -> None:
    config = LlamaConfig()
    config.auto_map = {"AutoModelForCausalLM": "modeling_mine.Mine"}
    with pytest.raises(UserError, match="base: got a model with code of its own.*expected a type of transformers"):
        tiny_like(config)


def test_two_runs_are_the_same_or_the_comparison_says_how_they_differ(tmp_path) -> None:
    checker = Checker("llama", tmp_path, partial(tiny_config, "llama"))
    checker.make()
    checker._run()
    checker._run(seed=1, output_dir=str(tmp_path / "other"))
    assert _compare(tmp_path / "run", tmp_path / "run") == "yes"
    assert _compare(tmp_path / "run", tmp_path / "other").startswith(FAILED)


class _Walk:
    """Stands for a walk: finds what `cells` says, and notes whom it was asked for."""

    asked: list = []  # noqa: RUF012
    cells: dict = {}  # noqa: RUF012

    def __init__(self, **_):
        pass

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass

    def check(self, model_type, like=None):
        self.asked.append(model_type)
        return Findings(model_type, self.cells.get(model_type, {"trains": "yes"}), code=code_version())


@pytest.fixture
def command(monkeypatch):
    """command(*arguments) -> result of `scale-sft models check`, types asked for; only three types exist."""
    monkeypatch.setattr("scale_sft.model_check.walk.Walk", _Walk)
    monkeypatch.setattr("scale_sft.model_check.tiny.types", lambda: ["llama", "mamba", "rwkv"])

    def run(*arguments, **cells):
        _Walk.asked, _Walk.cells = [], cells
        return CliRunner().invoke(main, ["models", "check", *arguments]), _Walk.asked

    return run


def test_a_walk_continues_where_it_was_stopped_and_checks_again_what_other_code_has_found(command, tmp_path) -> None:
    folder = tmp_path / "docs"
    result, asked = command("rwkv", "--write", str(folder))
    assert result.exit_code == 0 and asked == ["rwkv"]
    result, asked = command("--write", str(folder))
    assert asked == ["llama", "mamba"] and "1 types are checked already" in result.output
    table = (folder / "models.md").read_text()
    assert "3 types were tried: 3 train, 3 of them without a failure" in table and "| rwkv | yes |" in table
    kept = findings.read(folder / "models.jsonl")
    kept["mamba"].code = "older"
    findings.write(folder / "models.jsonl", kept.values())
    assert command("--write", str(folder))[1] == ["mamba"]
    assert command("--write", str(folder), "--again")[1] == ["llama", "mamba", "rwkv"]


def test_the_status_is_1_if_something_failed_and_0_for_a_refusal(command) -> None:
    refused = {"trains": "yes", "packing": "refused"}
    assert command("llama", llama=refused)[0].exit_code == 0
    result, _ = command("llama", "mamba", llama=refused, mamba={"trains": f"{FAILED}: KeyError"})
    assert result.exit_code == 1 and "  mamba: trains\n" in result.output and "packing in 1" in result.output


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["lama"], "unknown type 'lama'; did you mean 'llama'?"),
        (["llama", "--base", "x"], "--base goes without TYPES"),
        (["--base", "/nowhere"], "base: '/nowhere' is neither a model folder here"),
    ],
)
def test_what_cannot_be_checked_is_said_before_any_work(command, arguments, said: str) -> None:
    result, asked = command(*arguments)
    assert result.exit_code in (1, 2) and said in result.output and not asked


def test_findings_of_another_kind_are_not_overwritten(command, tmp_path) -> None:
    (tmp_path / "models.jsonl").write_text('{"mine": 1}\n')
    result, asked = command("--write", str(tmp_path))
    assert "does not hold findings" in result.output and not asked
    assert (tmp_path / "models.jsonl").read_text() == '{"mine": 1}\n'


def _serve(pipe, greeting: str) -> None:
    while True:
        word = pipe.recv()
        if word == "die":
            os.write(2, b"out of luck\n")
            os._exit(3)
        if word == "sleep":
            time.sleep(60)
        pipe.send(greeting + word)


def test_a_process_that_dies_or_hangs_is_noticed() -> None:
    child = Child(_serve, "hello ")
    child.send("you")
    assert child.answer(30) == "hello you" and child.answered
    child.send("die")
    with pytest.raises(Died, match="out of luck"):
        child.answer(30)
    child.stop()
    child = Child(_serve, "")
    child.send("sleep")
    assert child.answer(0.1, late="late") == "late" and not child.answered
    child.stop()


@pytest.mark.distributed
@pytest.mark.timeout(600)
def test_on_two_ranks_under_zero3_types_train_as_on_one_or_are_refused() -> None:
    from scale_sft.model_check.walk import Walk

    with Walk(seconds=300) as walk:
        found = {name: walk.check(name) for name in ("llama", "mixtral", "rwkv", "mamba")}
    cells = {name: one.cells["ZeRO-3"] for name, one in found.items()}
    assert cells == {"llama": "yes", "mixtral": "yes", "rwkv": "refused", "mamba": "yes"}, found
