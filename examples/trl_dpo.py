"""Teach a preference with TRL's DPOTrainer and a SpIEL adapter: the base is the reference, exactly, without a copy.

pip install "scale_sft[trl]"
python examples/trl_dpo.py [FOLDER [STEPS]]
"""

import json
import sys
from pathlib import Path

from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import DPOConfig, DPOTrainer

import scale_sft
from scale_sft.peft import SpielConfig

folder = Path(sys.argv[1] if len(sys.argv) > 1 else "runs/trl_dpo")
steps = int(sys.argv[2]) if len(sys.argv) > 2 else 40

demo = Path(scale_sft.__file__).parent / "assets" / "demo"
tokenizer = AutoTokenizer.from_pretrained(demo / "base")
model = AutoModelForCausalLM.from_pretrained(demo / "base", dtype="float32")
examples = [json.loads(line) for line in (demo / "train.jsonl").read_text().splitlines()]
pairs = [
    {"prompt": row["prompt"], "chosen": row["completion"], "rejected": row["completion"].upper()} for row in examples
]

trainer = DPOTrainer(
    model,
    args=DPOConfig(
        output_dir=str(folder),
        max_steps=steps,
        per_device_train_batch_size=8,
        learning_rate=5e-3,
        beta=0.1,
        bf16=False,
        logging_steps=5,
        report_to=[],
    ),
    train_dataset=Dataset.from_list(pairs),
    processing_class=tokenizer,
    peft_config=SpielConfig(density=0.03),
)
trainer.train()
trainer.save_model(str(folder / "adapter"))
logs = [row for row in trainer.state.log_history if "rewards/margins" in row]
print(f"margin {logs[0]['rewards/margins']:.3f} -> {logs[-1]['rewards/margins']:.3f}")
