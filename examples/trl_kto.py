"""Learn from good and bad answers with TRL's KTOTrainer and a SpIEL adapter; the base is the reference.

pip install "scale_sft[trl]"
python examples/trl_kto.py [FOLDER [STEPS]]
"""

import json
import sys
from pathlib import Path

from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import KTOConfig, KTOTrainer

import scale_sft
from scale_sft.peft import SpielConfig

folder = Path(sys.argv[1] if len(sys.argv) > 1 else "runs/trl_kto")
steps = int(sys.argv[2]) if len(sys.argv) > 2 else 30

demo = Path(scale_sft.__file__).parent / "assets" / "demo"
tokenizer = AutoTokenizer.from_pretrained(demo / "base")
model = AutoModelForCausalLM.from_pretrained(demo / "base", dtype="float32")
examples = [json.loads(line) for line in (demo / "train.jsonl").read_text().splitlines()]
answers = [
    {"prompt": row["prompt"], "completion": row["completion"] if good else row["completion"].upper(), "label": good}
    for row in examples[:400]
    for good in (True, False)
]

trainer = KTOTrainer(
    model,
    args=KTOConfig(
        output_dir=str(folder),
        max_steps=steps,
        per_device_train_batch_size=8,
        learning_rate=5e-3,
        bf16=False,
        logging_steps=5,
        report_to=[],
    ),
    train_dataset=Dataset.from_list(answers),
    processing_class=tokenizer,
    peft_config=SpielConfig(density=0.03),
)
trainer.train()
trainer.save_model(str(folder / "adapter"))
losses = [row["loss"] for row in trainer.state.log_history if "loss" in row]
print(f"loss {losses[0]:.3f} -> {losses[-1]:.3f}")
