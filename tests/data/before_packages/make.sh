#!/usr/bin/env bash
# Makes the files of this folder with an older version of scale_sft: the one whose modules lay flat in one folder.
#     make.sh CHECKOUT      (a checkout of commit 9751981)
# All paths in the files are relative to this folder, so they resolve wherever it is copied.
set -euo pipefail
cd "$(dirname "$0")"
export PYTHONPATH=$1 HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 CUDA_VISIBLE_DEVICES=
rm -rf base ag ma train.jsonl eval.jsonl expected.json

python - <<'PYTHON'
import json
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
raw = Tokenizer(models.BPE(vocab={token: n for n, token in enumerate([*alphabet, "<s>", "</s>", "<pad>"])}, merges=[]))
raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
raw.decoder = decoders.ByteLevel()
raw.post_processor = processors.TemplateProcessing(single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", 256)])
PreTrainedTokenizerFast(
    tokenizer_object=raw, bos_token="<s>", eos_token="</s>", pad_token="<pad>"
).save_pretrained("base")
torch.manual_seed(0)
LlamaForCausalLM(LlamaConfig(
    vocab_size=259, bos_token_id=256, eos_token_id=257, pad_token_id=258, hidden_size=16, intermediate_size=24,
    num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1, max_position_embeddings=64,
    initializer_range=0.1, tie_word_embeddings=True,
)).save_pretrained("base")
for file, numbers in (("train.jsonl", range(24)), ("eval.jsonl", range(24, 28))):
    with open(file, "w") as lines:
        for n in numbers:
            lines.write(json.dumps({"prompt": f"{n} + {n * n} = ", "completion": str(n + n * n)}) + "\n")
PYTHON

for method in ag ma; do
    python "$1/scale_sft/train.py" --base base --train_data train.jsonl --eval_data eval.jsonl --method $method \
        --density 0.05 --steps 12 --global_batch_size 4 --update_interval_steps 4 --estimation_steps 3 \
        --learning_rate 0.01 --initial_replacement_fraction 0.6 --max_length 32 --base_placement replicate --kernels off --log_every_steps 1 \
        --save_every_steps 6 --keep_last 9 --output_dir $method --save_merged true
done

# What a kill after step 6 of 12 would have left: in the middle of the second estimation phase (steps 5 to 7).
python - <<'PYTHON'
import hashlib, json, shutil
from pathlib import Path
import torch
from safetensors.torch import load_file

expected = {"torch": torch.__version__, "cpu_capability": torch.backends.cpu.get_cpu_capability(), "merged": {}}
for method in ("ag", "ma"):
    run = Path(method)
    merged = load_file(run / "merged/model.safetensors")
    expected["merged"][method] = {
        name: hashlib.sha256(value.contiguous().view(-1).view(torch.uint8).numpy().tobytes()).hexdigest()
        for name, value in sorted(merged.items())
    }
    lines = (run / "metrics.jsonl").read_text().splitlines(keepends=True)
    records = [json.loads(line) for line in lines]
    expected.setdefault("losses", {})[method] = [r["loss"] for r in records if r["event"] == "step"]
    last = next(n for n, r in enumerate(records) if r["event"] == "checkpoint" and r["step"] == 6)
    (run / "metrics.jsonl").write_text("".join(lines[: last + 1]))
    for path in run.iterdir():
        if path.name not in ("adapter", "checkpoints", "config.yaml", "metrics.jsonl"):
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    shutil.rmtree(run / "checkpoints/step_000012")
    (run / "adapter").rename(run / "adapter_after_12_steps")
Path("expected.json").write_text(json.dumps(expected, indent=1) + "\n")
PYTHON
