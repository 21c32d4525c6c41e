"""GSM8K and T0 train and are evaluated."""

from __future__ import annotations

import json

import pytest

pytestmark = pytest.mark.slow


@pytest.mark.parametrize(
    ("train", "test", "options"),
    [
        ("gsm8k_train_messages", "gsm8k_test_messages", {"answer_pattern": "gsm8k", "packing": True}),
        ("t0_train", "t0_eval", {}),
    ],
)
def test_a_real_set_trains_and_is_evaluated(train, test, options, shared, train_run):
    folder = train_run(
        base=str(shared("models/llama-7m")),
        train_data=str(shared(f"data/{train}.jsonl")),
        eval_data=str(shared(f"data/{test}.jsonl")),
        max_train_examples=100, max_eval_examples=16, max_length=256, global_batch_size=8, micro_batch_size=4,
        exact_match_examples=2, max_new_tokens=8, steps=6, **options,
    )  # fmt: skip
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    losses = [record["loss"] for record in records if record["event"] == "eval"]
    assert losses[-1] < losses[0]
    assert all("padding_fraction" in record for record in records if record["event"] == "step")
