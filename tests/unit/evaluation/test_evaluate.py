"""Figures of an evaluation: the same however it is cut, and of the answers that were meant."""

from __future__ import annotations

import json
import math
import sys
import types

import pytest
import torch
from click.testing import CliRunner

from scale_sft.adapters.format import Adapter
from scale_sft.adapters.merge import merge
from scale_sft.cli.main import main
from scale_sft.config.options import DataConfig, ModelConfig
from scale_sft.data.cache import load_examples
from scale_sft.evaluation.answers import Answer, exact_match, extract_answer, greedy_answers
from scale_sft.evaluation.evaluate_model import for_people
from scale_sft.evaluation.held_out import Evaluation, held_out_loss, loss_by_example
from scale_sft.model.loading import load_base, load_model_config
from scale_sft.training.best import best_step, hopeless

CPU = torch.device("cpu")


@pytest.fixture
def base(tiny_model):
    config = ModelConfig(base=str(tiny_model("llama")))
    return load_base(config, load_model_config(config), CPU)


@pytest.fixture
def examples(pairs_file, tokenizer, tmp_path):
    config = DataConfig(max_length=64, cache_dir=str(tmp_path / "cache"))
    return load_examples(str(pairs_file), "eval", tokenizer, config, None)


def test_the_loss_does_not_depend_on_the_batch_size(base, examples, cluster):
    results = [held_out_loss(base, examples, cluster, size, 258) for size in (1, 3, 8, 24)]
    assert max(result.loss for result in results) - min(result.loss for result in results) < 1e-6
    assert results[0].perplexity == pytest.approx(math.exp(results[0].loss))


def test_the_loss_is_that_of_transformers_weighted_by_tokens(base, examples, cluster):
    sums = []
    for n in range(len(examples)):
        ids, labels = (torch.from_numpy(part.astype("int64"))[None] for part in examples.tokens(n))
        sums.append(float(base(input_ids=ids, labels=labels).loss) * examples.target_tokens([n]))
    assert loss_by_example(base, examples, cluster, 5, 258) == pytest.approx(sums, abs=1e-4)
    expected = sum(sums) / examples.target_tokens(range(len(examples)))
    assert held_out_loss(base, examples, cluster, 5, 258).loss == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_answers_do_not_depend_on_the_batch_size(tiny_model, architecture, examples, tokenizer, cluster):
    config = ModelConfig(base=str(tiny_model(architecture)), gradient_checkpointing=True)
    model = load_base(config, load_model_config(config), CPU)
    answer = lambda size: greedy_answers(
        model, tokenizer, examples, cluster, count=7, batch_size=size, max_new_tokens=5
    )
    assert answer(1) == answer(3) and model.training
    assert [given.reference for given in answer(7)] == [str(n + n * n) for n in range(7)]
    assert answer(7)[3].prompt == "3 + 9 ="


@pytest.mark.parametrize(
    ("text", "pattern", "answer"),
    [
        (" 42 \n", None, "42"),
        ("6 * 7 = 42\n#### 1,042.", "gsm8k", "1042"),
        ("#### 1\nno:\n#### $7", "gsm8k", "7"),
        ("42", "gsm8k", None),
        ("#### seven apples", "gsm8k", "seven apples"),
        ("first A then B", r"\b[A-D]\b", "B"),
        ("The answer is (C).", r"answer is \(([A-D])\)", "C"),
    ],
)
def test_answers_are_extracted_by_pattern(text, pattern, answer):
    assert extract_answer(text, pattern) == answer


def test_an_answer_that_is_not_found_is_wrong_even_where_the_reference_has_none():
    answers = [Answer("", "#### 5", "five\n#### 5"), Answer("", "5", "#### 5"), Answer("", "5", "5")]
    assert exact_match(answers, "gsm8k") == pytest.approx(1 / 3)
    assert exact_match(answers) == pytest.approx(1 / 3)


def test_a_prompt_that_leaves_no_room_for_an_answer_is_an_error(base, examples, tokenizer, cluster):
    from scale_sft.errors import UserError

    with pytest.raises(UserError, match=r"max_new_tokens: got 125, expected at most 119: the longest prompt has 9 of"):
        greedy_answers(base, tokenizer, examples, cluster, count=1, batch_size=1, max_new_tokens=125)


def records(folder, event):
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return [record for record in map(json.loads, lines) if record["event"] == event]


def test_the_best_adapter_is_kept_and_a_hopeless_run_stops_early(train_run, pairs_file):
    options = {"eval_data": str(pairs_file), "eval_every_steps": 1, "steps": 20, "learning_rate": 0.05}
    folder = train_run(**options, early_stopping_steps=2, generation_samples=2, max_new_tokens=3)
    losses = {record["step"]: record["loss"] for record in records(folder, "eval")}
    best = min(losses, key=losses.get)
    info = Adapter.load(folder / "best_adapter").info
    assert info["step"] == best and info["held_out_loss"] == losses[best]
    assert max(losses) == min(20, best + 2)
    samples = records(folder, "samples")
    assert [len(record["answers"]) for record in samples] == [2] * len(records(folder, "eval"))
    assert samples[0]["answers"][1]["reference"] == "2"


def test_the_best_is_the_first_of_the_lowest_and_hope_ends_after_so_many_steps():
    seen = {step: Evaluation(loss, 1) for step, loss in [(0, 3.0), (2, 1.0), (4, 1.0), (6, 2.0)]}
    assert best_step(seen) == 2
    assert [hopeless(seen, step, 4) for step in (2, 4, 6)] == [False, False, True]
    assert not hopeless(seen, 6, None) and not hopeless(seen, 7, 4), "7 was not evaluated"


def run(*arguments) -> str:
    result = CliRunner().invoke(main, [str(argument) for argument in arguments])
    assert result.exit_code == 0, result.output + result.stderr
    return result.stdout


def evaluate(*arguments) -> dict:
    return json.loads(run("eval", *arguments, "--json"))


def test_eval_of_base_with_adapter_equals_that_of_the_merged_model_and_of_training(train_run, pairs_file, tmp_path):
    folder = train_run(eval_data=str(pairs_file), exact_match_examples=3, max_new_tokens=4)
    last = records(folder, "eval")[-1]
    merge(folder / "adapter", tmp_path / "merged")
    options = ["--eval_data", pairs_file, "--max_length", 32, "--exact_match_examples", 3, "--max_new_tokens", 4]
    by_adapter = evaluate(folder / "adapter", *options, "--output", tmp_path / "result.json")
    merged = evaluate("--base", tmp_path / "merged", *options, "--eval_batch_size", 5)
    for found in (by_adapter, merged):
        assert found["held_out"]["loss"] == pytest.approx(last["loss"], abs=1e-6)
        assert found["held_out"]["exact_match"] == last["exact_match"]
    assert json.loads((tmp_path / "result.json").read_text()) == by_adapter
    base = evaluate("--config", folder / "config.yaml", "--max_length", 32)
    assert base["held_out"]["loss"] == pytest.approx(records(folder, "eval")[0]["loss"], abs=1e-6)


def test_eval_prints_lines_for_people_and_writes_json_into_its_file(tiny_model, pairs_file, tmp_path):
    options = ["--base", tiny_model("llama"), "--eval_data", pairs_file, "--max_length", 32, "--max_new_tokens", 4]
    shown = run(
        "eval", *options, "--exact_match_examples", 3, "--generation_samples", 1, "--output", tmp_path / "r.json"
    )
    held_out = json.loads((tmp_path / "r.json").read_text())["held_out"]
    lines = shown.splitlines()
    assert lines[0].startswith(f"held-out loss {held_out['loss']:.4f}  perplexity {held_out['perplexity']:,.2f}")
    assert lines[0].endswith("exact match 0.0% of 3  (24 examples, 83 target tokens)")
    assert lines[1:4] == ["", "prompt     0 + 0 =", f"generated  {held_out['samples'][0]['generated']}"]
    assert lines[4] == "reference  0"


def test_results_of_tasks_are_one_line_each():
    results = {"mmlu": {"alias": "mmlu", "acc,none": 0.4567, "acc_stderr,none": 0.0123, "exact_match,strict": 0.5}}
    assert for_people({"tasks": results}) == "mmlu  acc 0.4567 ± 0.0123  exact_match (strict) 0.5000"


def test_tasks_without_the_harness_say_what_to_install(tiny_model, monkeypatch):
    monkeypatch.setattr("scale_sft.evaluation.harness.find_spec", lambda name: None)
    result = CliRunner().invoke(main, ["eval", "--base", str(tiny_model("llama")), "--tasks", "mmlu"])
    assert result.exit_code == 1 and "pip install 'lm-eval[hf]" in result.stderr


def test_tasks_go_to_the_harness_with_the_adapter_applied(train_run, monkeypatch):
    """A stand-in with the harness's names: what it is handed is what counts here."""
    folder = train_run()
    asked = []

    def simple_evaluate(model, tasks, num_fewshot, limit, confirm_run_unsafe_code):
        asked.append((tasks[0], num_fewshot, limit, confirm_run_unsafe_code))
        return {
            "results": {tasks[0]: {"weights": float(sum(p.double().abs().sum() for p in model.model.parameters()))}}
        }

    class HFLM:
        def __init__(self, pretrained, tokenizer, batch_size):
            self.model = pretrained

    modules = {name: types.ModuleType(name) for name in ("lm_eval", "lm_eval.models", "lm_eval.models.huggingface")}
    modules["lm_eval"].simple_evaluate, modules["lm_eval.models.huggingface"].HFLM = simple_evaluate, HFLM
    for name, module in modules.items():
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setattr("scale_sft.evaluation.harness.find_spec", lambda name: object())
    result = evaluate(folder / "adapter", "--tasks", "paper", "--limit", 5)
    assert asked[:2] == [("mmlu", 5, 5, False), ("gsm8k_cot", 8, 5, False)] and asked[-1] == ("humaneval", 0, 5, True)
    base = evaluate("--config", folder / "config.yaml", "--tasks", "mmlu")
    assert base["tasks"]["mmlu"]["weights"] != result["tasks"]["mmlu"]["weights"]


def test_preprocess_and_data_show_tell_what_a_run_would_see(tiny_model, pairs_file, tmp_path):
    common = ["--base", tiny_model("llama"), "--train_data", pairs_file, "--max_length", 12, "--cache_dir", tmp_path]
    told = run("preprocess", *common)
    assert "train_data" in told and "6 examples cut to max_length, 14 dropped" in told
    shown = run("data", "show", *common, "--count", 1, "--first", 1)
    assert "<s>1 + 1 = «2</s>»" in shown.replace("\n", "")
    assert "lengths in tokens" in shown and "cut to max_length" in shown


def test_recipes_of_the_papers_data_are_complete():
    from scale_sft.config.loading import load
    from scale_sft.data.sources import parse_sources
    from scale_sft.files import PACKAGE

    for name in ("flan_v2", "gpt4_alpaca", "tulu_v2"):
        config = load(PACKAGE / "recipes" / f"llama2_{name}.yaml", {})
        (source,) = parse_sources(config.data.train_data, "train")
        assert source.path is None and config.data.chat_template == "tulu" and config.run.epochs == 2


def test_evaluation_changes_nothing(session, pairs_file) -> None:
    run = session(eval_data=str(pairs_file), exact_match_examples=3, max_new_tokens=4)
    before = {name: weight.clone() for name, weight in run.model.named_parameters()}
    torch.manual_seed(0)
    state = torch.random.get_rng_state()
    first, second = run.evaluate(answers=True), run.evaluate(answers=True)
    assert first == second and run.model.training and torch.equal(torch.random.get_rng_state(), state)
    assert all(torch.equal(weight, before[name]) for name, weight in run.model.named_parameters())
    assert not run.tuning.recorder.received


def test_exact_match_counts_the_answers_that_are_right(train_run, tmp_path) -> None:
    """A model that has learned two answers by heart gets those right and others wrong."""
    rows = [{"prompt": f"{n}=", "completion": word} for n, word in enumerate(["no", "yes", "maybe", "never"])]
    for name, part in (("train", rows[:2]), ("eval", rows)):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in part))
    run = train_run(
        train_data=str(tmp_path / "train.jsonl"), eval_data=str(tmp_path / "eval.jsonl"), exact_match_examples=4,
        max_new_tokens=6, density=1.0, steps=40, global_batch_size=2, learning_rate=0.02, eval_batch_size=3,
    )  # fmt: skip
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [line["exact_match"] for line in lines if line["event"] == "eval"] == [0.0, 0.5]
