"""What a step on pairs costs, compared with a step of sft on the same tokens. A race: `pytest -m hardware`."""

from __future__ import annotations

import json
import statistics
import time

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from scale_sft.bench.peak import peak_of

pytestmark = [pytest.mark.hardware]

WORDS = ["lock", "your", "price", "send", "many", "dry", "lemons", "trim", "closed", "villages", "of", "questions"]


@pytest.fixture
def runs(session, tokenizer, tmp_path):
    """Sessions of sft and of dpo over the same 8 sequences of about 128 tokens."""
    config = LlamaConfig(
        vocab_size=8000, hidden_size=384, intermediate_size=1024, num_hidden_layers=4, num_attention_heads=6,
        max_position_embeddings=256, tie_word_embeddings=False, bos_token_id=256, eos_token_id=257, pad_token_id=258,
    )  # fmt: skip
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    text = lambda start, length, end: " ".join(WORDS[(start + n) % len(WORDS)] for n in range(30))[:length].ljust(
        length, end
    )
    pairs = [
        {"prompt": text(n, 60, " "), "chosen": text(n + 1, 66, "."), "rejected": text(n + 2, 66, "-")} for n in range(8)
    ]
    answers = [{"prompt": row["prompt"], "completion": row[side]} for row in pairs for side in ("chosen", "rejected")]
    for name, rows in (("pairs", pairs), ("answers", answers)):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    common = {
        "base": str(tmp_path / "base"), "density": 0.02, "max_length": 128, "steps": 200, "update_interval_steps": 100,
        "estimation_steps": 5,
    }  # fmt: skip
    sft = session(**common, train_data=str(tmp_path / "answers.jsonl"), global_batch_size=8)
    dpo = {"objective": "dpo", "train_data": str(tmp_path / "pairs.jsonl"), "global_batch_size": 4}
    made = {"sft": sft, "dpo": session(**common, **dpo), "packed": session(**common, **dpo, packing=True)}
    for name in ("dpo", "packed"):
        made[name].objective.prepare()
    return made


def step(session):
    from scale_sft.train import forward_backward

    optimizer, size = session.optimizer, session.inputs.config.run.global_batch_size
    optimizer.begin(50)  # neither estimates nor reallocates
    forward_backward(session, list(range(size)))
    optimizer.reduce()
    optimizer.update()
    optimizer.end()


def test_a_step_on_pairs_costs_what_a_step_of_sft_on_the_same_tokens_costs(runs, set_threads):
    set_threads(1)
    seconds = {name: [] for name in runs}
    for number in range(8):
        for name, run in runs.items():
            began = time.process_time()
            step(run)
            if number:
                seconds[name].append(time.process_time() - began)
    median = {name: statistics.median(values) for name, values in seconds.items()}
    assert median["dpo"] <= 1.05 * median["sft"] and median["packed"] <= median["dpo"], median


def test_a_step_on_pairs_needs_the_memory_of_a_step_of_sft_on_the_same_tokens(runs):
    for run in runs.values():
        step(run)
    added = {name: peak_of(lambda run=run: step(run), torch.device("cpu")).added for name, run in runs.items()}
    assert added["dpo"] <= 1.02 * added["sft"] and added["packed"] <= added["dpo"], added
