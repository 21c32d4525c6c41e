"""Train sparse deltas with transformers.Trainer, on the demo model that ships with scale_sft.

    python examples/hf_trainer.py [FOLDER [STEPS]]

The Trainer's checkpoints hold all that resuming needs; FOLDER/adapter is what `scale-sft merge` reads.
"""

import json
import sys
from pathlib import Path

from transformers import AutoModelForCausalLM, AutoTokenizer, DataCollatorForSeq2Seq, Trainer, TrainingArguments

import scale_sft

folder = Path(sys.argv[1] if len(sys.argv) > 1 else "runs/hf_trainer")
steps = int(sys.argv[2]) if len(sys.argv) > 2 else 200

demo = Path(scale_sft.__file__).parent / "assets" / "demo"
tokenizer = AutoTokenizer.from_pretrained(demo / "base")
model = AutoModelForCausalLM.from_pretrained(demo / "base")


def rows(file: Path) -> list[dict]:
    """Token ids and labels of each example; only completions count."""
    found = []
    for example in map(json.loads, file.read_text().splitlines()):
        prompt = tokenizer(example["prompt"]).input_ids
        completion = [*tokenizer(example["completion"]).input_ids, tokenizer.eos_token_id]
        found.append({"input_ids": prompt + completion, "labels": [-100] * len(prompt) + completion})
    return found


sparse = scale_sft.attach(model, method="ag", density=0.03, total_steps=steps, max_grad_norm=1.0, base="demo")
trainer = Trainer(
    model,
    TrainingArguments(
        output_dir=str(folder),
        max_steps=steps,
        per_device_train_batch_size=16,
        max_grad_norm=0.0,  # attach clips, over all ranks
        logging_steps=20,
        report_to=[],
    ),
    data_collator=DataCollatorForSeq2Seq(tokenizer, padding=True),
    train_dataset=rows(demo / "train.jsonl"),
    eval_dataset=rows(demo / "eval.jsonl")[:64],
    optimizers=(sparse.optimizer(lr=1e-2), None),
)
with sparse.base():
    before = trainer.evaluate()["eval_loss"]
trainer.train()
after = trainer.evaluate()["eval_loss"]
sparse.save(folder / "adapter")
print(f"held-out loss {before:.3f} before, {after:.3f} after; adapter in {folder / 'adapter'}")
