"""PEFT's MetaMathQA comparison runs end to end, here on a tiny model, and at its size fits the GPU it is for."""

import importlib.util
import json
from pathlib import Path

import pytest
from click.testing import CliRunner

from scale_sft.cli.main import main
from scale_sft.errors import UserError
from scale_sft.evaluation.answers import extract_answer

ROOT = Path(__file__).parents[3]


@pytest.fixture(scope="module")
def board():
    spec = importlib.util.spec_from_file_location("peft_board", ROOT / "launch" / "peft_board.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_answers_of_both_data_sets_are_read_alike(board):
    for text in ("so 16 - 3 = 1,013.\n#### 1,013", "It is 3.\nThe answer is: 1013", "The answer is: $1013."):
        assert extract_answer(text, board.ANSWER) == "1013"
    assert extract_answer("There is no answer.", board.ANSWER) is None
    assert extract_answer("#### -5", board.ANSWER) == "-5"


def test_data_of_other_sources_are_not_taken_for_those_asked_for(board, tmp_path):
    files = [tmp_path / name for name in ("a.jsonl", "b.jsonl", "c.jsonl", "d.jsonl")]
    rows = [{"query": "1?", "response": "1"}, {"question": "2?", "answer": "2"}, {"text": "3"}, {"text": "4"}]
    for file, row in zip(files, rows, strict=True):
        file.write_text(json.dumps(row) + "\n")
    *same, text, other = map(str, files)
    assert board.prepare(tmp_path / "data", *same, text) == board.prepare(tmp_path / "data", *same, text)
    with pytest.raises(UserError, match="--text: got .*d.jsonl, but"):
        board.prepare(tmp_path / "data", *same, other)


def test_the_recipe_fits_the_gpu_that_it_is_for():
    arguments = ["plan", "metamathqa_llama32_3b", "--shape", "3b", "--gpu-memory", "48", "--json", "--check"]
    result = CliRunner().invoke(main, arguments)
    assert result.exit_code == 0, result.output
    found = json.loads(result.output[result.output.index("{") :])
    assert found["entries"] == 3_212_749_824  # Llama 3.2 3B
    assert found["active"] == 32 * 28 * (2 * 3072 + 3072 + 1024) and found["fits"]


def test_data_of_the_same_columns_become_a_board_entry(board, tmp_path, tiny_model):
    peft = pytest.importorskip("peft")
    from transformers import AutoModelForCausalLM

    def lines(name, rows):
        (tmp_path / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
        return str(tmp_path / name)

    sums = [{"type": "a", "query": f"{n} + 1?", "response": f"The answer is: {n + 1}"} for n in range(12)]
    sums.append({"type": "a", "query": "x" * 1300, "response": "too long"})
    exam = [{"question": f"{n} + 2?", "answer": f"#### {n + 2}"} for n in range(3)]
    base, output = str(tiny_model("llama")), tmp_path / "run"
    arguments = [
        *("--base", base, "--train", lines("a.jsonl", sums), "--test", lines("b.jsonl", exam)),
        *("--text", lines("c.jsonl", [{"text": "It rained on Tuesday."}])),
        *("--test_examples", "2", "--answer_tokens", "4", "--text_tokens", "64", "--output_dir", str(output)),
        *("--dtype", "float32", "--rank_equivalent", "2", "--steps", "3", "--selection_batches", "2"),
        *("--max_length", "64"),
    ]
    result = CliRunner().invoke(board.main, arguments)
    assert result.exit_code == 0, result.output
    rows = [json.loads(line) for line in (output / "data" / "train.jsonl").read_text().splitlines()]
    assert len(rows) == 12 and rows[3]["prompt"] == "Question: 3 + 1? Think step by step.\nAnswer:"
    entry = json.loads((output / "board.json").read_text())
    assert 0 <= entry["accuracy"] <= 1 and entry["forgetting"] != 0 and entry["bytes"] > 0
    config = json.loads((output / "shira" / "adapter_config.json").read_text())
    assert config["peft_type"] == "SHIRA" and config["r"] == 2
    peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), output / "shira")
    again = CliRunner().invoke(board.main, arguments)
    assert again.exit_code == 0 and json.loads((output / "board.json").read_text()) == entry
    assert "expected --option VALUE pairs" in CliRunner().invoke(board.main, ["--steps"]).output
