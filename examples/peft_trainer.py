"""Train a SpIEL adapter of PEFT with transformers.Trainer, on the demo model that ships with scale_sft.

    python examples/peft_trainer.py [FOLDER [STEPS]]

Importing scale_sft.peft adds its callback to every Trainer. PEFT and scale_sft both read FOLDER/adapter.
"""

import json
import sys
from pathlib import Path

from peft import get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer, DataCollatorForSeq2Seq, Trainer, TrainingArguments

import scale_sft
from scale_sft.peft import SpielConfig

folder = Path(sys.argv[1] if len(sys.argv) > 1 else "runs/peft_trainer")
steps = int(sys.argv[2]) if len(sys.argv) > 2 else 100

demo = Path(scale_sft.__file__).parent / "assets" / "demo"
tokenizer = AutoTokenizer.from_pretrained(demo / "base")


def rows(file: Path) -> list[dict]:
    """Token ids and labels of each example; only completions count."""
    found = []
    for example in map(json.loads, file.read_text().splitlines()):
        prompt = tokenizer(example["prompt"]).input_ids
        completion = [*tokenizer(example["completion"]).input_ids, tokenizer.eos_token_id]
        found.append({"input_ids": prompt + completion, "labels": [-100] * len(prompt) + completion})
    return found


model = AutoModelForCausalLM.from_pretrained(demo / "base", dtype="float32")
model = get_peft_model(model, SpielConfig(method="ag", density=0.03, task_type="CAUSAL_LM"))
model.print_trainable_parameters()
trainer = Trainer(
    model,
    TrainingArguments(
        output_dir=str(folder),
        max_steps=steps,
        per_device_train_batch_size=16,
        learning_rate=1e-2,
        logging_steps=20,
        report_to=[],
    ),
    data_collator=DataCollatorForSeq2Seq(tokenizer, padding=True),
    train_dataset=rows(demo / "train.jsonl"),
    eval_dataset=rows(demo / "eval.jsonl")[:64],
)
with model.disable_adapter():  # the base, bit for bit
    before = trainer.evaluate()["eval_loss"]
trainer.train()
after = trainer.evaluate()["eval_loss"]
model.save_pretrained(folder / "adapter")
print(f"held-out loss {before:.3f} before, {after:.3f} after; {scale_sft.Adapter.load(folder / 'adapter')}")
