import json

import pytest
import torch
from transformers import AutoModelForCausalLM


def test_held_out_loss_is_the_mean_over_target_tokens_for_any_batch_size(session, pairs_file) -> None:
    found = {}
    for size in (1, 5, 16):
        run = session(eval_data=str(pairs_file), max_eval_examples=13, eval_batch_size=size)
        found[size] = run.evaluate()
    stock, total, tokens = AutoModelForCausalLM.from_pretrained(run.inputs.config.model.base).eval(), 0.0, 0
    with torch.no_grad():
        for ids, labels in zip(run.inputs.eval.input_ids, run.inputs.eval.labels, strict=True):
            count = sum(label != -100 for label in labels[1:])
            total += stock(input_ids=torch.tensor([ids]), labels=torch.tensor([labels])).loss.item() * count
            tokens += count
    for result in found.values():
        assert result.loss == pytest.approx(total / tokens, rel=1e-5) and result.target_tokens == tokens
        assert result.exact_match is None


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
