"""Reinforce what a function rewards with TRL's GRPOTrainer and a SpIEL adapter; transformers generates.

    pip install "scale_sft[trl]"
    python examples/trl_grpo.py [FOLDER [STEPS]]

While an answer is generated, and in the reference, no weight is composed or copied: the weights hold the adapter.
"""

import json
import sys
from pathlib import Path

from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import GRPOConfig, GRPOTrainer

import scale_sft
from scale_sft.peft import SpielConfig

folder = Path(sys.argv[1] if len(sys.argv) > 1 else "runs/trl_grpo")
steps = int(sys.argv[2]) if len(sys.argv) > 2 else 12

demo = Path(scale_sft.__file__).parent / "assets" / "demo"
tokenizer = AutoTokenizer.from_pretrained(demo / "base")
model = AutoModelForCausalLM.from_pretrained(demo / "base", dtype="float32")
examples = [json.loads(line) for line in (demo / "train.jsonl").read_text().splitlines()]


def is_short_and_lower(completions: list[str], **_: object) -> list[float]:
    """Reward lower-case letters, and an early end."""
    return [sum(c.islower() for c in text) / max(1, len(text)) - len(text) / 64 for text in completions]


trainer = GRPOTrainer(
    model,
    reward_funcs=is_short_and_lower,
    args=GRPOConfig(
        output_dir=str(folder),
        max_steps=steps,
        per_device_train_batch_size=8,
        num_generations=4,
        max_completion_length=16,
        learning_rate=5e-3,
        beta=0.01,
        bf16=False,
        logging_steps=1,
        report_to=[],
    ),
    train_dataset=Dataset.from_list([{"prompt": row["prompt"]} for row in examples]),
    processing_class=tokenizer,
    peft_config=SpielConfig(method="ag", density=0.03, update_interval_steps=6, estimation_steps=3),
)
trainer.train()
trainer.save_model(str(folder / "adapter"))
rewards = [row["reward"] for row in trainer.state.log_history if "reward" in row]
print(f"reward {rewards[0]:.3f} -> {rewards[-1]:.3f}")
