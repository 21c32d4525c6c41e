"""Train sparse deltas in a plain PyTorch loop, on the demo model that ships with scale_sft.

    python examples/plain_loop.py [FOLDER [STEPS]]

Writes FOLDER/adapter, which `scale-sft merge` and `scale_sft.load_adapter` read. A minute on a CPU.
"""

import json
import random
import sys
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import scale_sft

folder = Path(sys.argv[1] if len(sys.argv) > 1 else "runs/plain_loop")
steps = int(sys.argv[2]) if len(sys.argv) > 2 else 200

demo = Path(scale_sft.__file__).parent / "assets" / "demo"
tokenizer = AutoTokenizer.from_pretrained(demo / "base")
model = AutoModelForCausalLM.from_pretrained(demo / "base")
examples = [json.loads(line) for line in (demo / "train.jsonl").read_text().splitlines()]


def batch_of(some: list[dict]) -> dict:
    """Pad prompts and completions to [B, L]; only completions count."""
    pairs = [(tokenizer(e["prompt"]).input_ids, tokenizer(e["completion"]).input_ids) for e in some]
    pairs = [(prompt, [*completion, tokenizer.eos_token_id]) for prompt, completion in pairs]
    longest = max(len(prompt) + len(completion) for prompt, completion in pairs)
    pad = lambda tokens, value: tokens + [value] * (longest - len(tokens))
    ids = torch.tensor([pad(prompt + completion, 0) for prompt, completion in pairs])
    labels = torch.tensor([pad([-100] * len(prompt) + completion, -100) for prompt, completion in pairs])
    return {"input_ids": ids, "labels": labels}  # padding comes last: causal attention does not see it


# --- the part that matters: ten lines -------------------------------------------------------------------------------
sparse = scale_sft.attach(model, method="ag", density=0.03, total_steps=steps, base="demo")
optimizer = sparse.optimizer(lr=1e-2)
scheduler = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, total_iters=steps)
for step in range(1, steps + 1):
    loss = model(**batch_of(random.Random(step).sample(examples, 16))).loss
    loss.backward()
    optimizer.step()
    scheduler.step()
    if step == 1 or step % 20 == 0:
        print(f"step {step:4d}  loss {loss.item():.3f}")
sparse.save(folder / "adapter")
# --------------------------------------------------------------------------------------------------------------------

held_out = batch_of([json.loads(line) for line in (demo / "eval.jsonl").read_text().splitlines()[:64]])
with torch.no_grad():
    tuned = model(**held_out).loss.item()
    with sparse.base():
        before = model(**held_out).loss.item()
print(f"held-out loss {before:.3f} before, {tuned:.3f} after; adapter in {folder / 'adapter'}")
