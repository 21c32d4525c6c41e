"""Make the demo's base model from nothing: `python -m tools.demo.pretrain --output DIR`.

A Llama of 0.8 million parameters that reads characters is trained on the generated word tasks of `tasks.py`. The
folder it leaves is an ordinary Hugging Face model: it loads with AutoModelForCausalLM and AutoTokenizer.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from pathlib import Path

import click
import torch
from tokenizers import Tokenizer, decoders, models, processors
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from tools.demo.tasks import pretraining_documents

# A user turn is the prompt and a newline, an assistant turn the completion and the end mark: a chat of one question
# and one answer is exactly the text that a {"prompt", "completion"} row is.
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{% if message['role'] == 'assistant' %}"
    "{% generation %}{{ message['content'] + eos_token }}{% endgeneration %}"
    "{% else %}{{ message['content'] + '\\n' }}{% endif %}"
    "{% endfor %}"
)
MAX_LENGTH_TOKENS = 256


def make_tokenizer() -> PreTrainedTokenizerFast:
    """One token per printable ASCII character or newline: tokenising in parts or in one piece gives the same ids."""
    special = ["<pad>", "<s>", "</s>", "<unk>"]
    vocab = {token: i for i, token in enumerate([*special, "\n", *map(chr, range(ord(" "), ord("~") + 1))])}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[], unk_token="<unk>"))
    tokenizer.decoder = decoders.Fuse()
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", vocab["<s>"])])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        chat_template=CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,
        model_max_length=MAX_LENGTH_TOKENS,
        padding_side="left",
    )


def make_model(tokenizer: PreTrainedTokenizerFast, seed: int) -> LlamaForCausalLM:
    """A randomly initialised Llama: 4 blocks, width 128, 4 query heads that share 2 key-value heads, fp32."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=MAX_LENGTH_TOKENS,
        tie_word_embeddings=True,
        initializer_range=0.05,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    return AutoModelForCausalLM.from_config(config, attn_implementation="eager")  # the fastest on a CPU at this size


def batches(
    tokenizer: PreTrainedTokenizerFast, seed: int, batch_size: int
) -> Iterator[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
    """Endless batches of `[bos] prompt completion [eos]`, padded on the right to the longest.

    Yields input ids, next tokens and weights of the token losses, each [batch_size, T]; int64, int64, fp32. Completion
    tokens weigh 1, prompt tokens 0.1 (mostly chance), padding 0.
    """
    documents = pretraining_documents(str(seed))
    while True:
        rows = []
        for _ in range(batch_size):
            prompt, completion = next(documents)
            prompt_ids, completion_ids = (tokenizer.encode(t, add_special_tokens=False) for t in (prompt, completion))
            ids = [tokenizer.bos_token_id, *prompt_ids, *completion_ids, tokenizer.eos_token_id]
            rows.append((ids, [0.1] * len(prompt_ids) + [1.0] * (len(completion_ids) + 1)))
        longest = max(len(ids) for ids, _ in rows)
        ids = torch.tensor([ids + [tokenizer.pad_token_id] * (longest - len(ids)) for ids, _ in rows])
        weights = torch.tensor([w + [0.0] * (longest - 1 - len(w)) for _, w in rows])
        yield ids[:, :-1], ids[:, 1:], weights


def train(
    model: LlamaForCausalLM,
    data: Iterator[tuple[torch.Tensor, torch.Tensor, torch.Tensor]],
    steps: int,
    learning_rate: float,
) -> None:
    """AdamW with a short warmup and a linear decay to zero; the matmuls run in bf16 over fp32 weights."""
    decayed = [p for p in model.parameters() if p.ndim == 2]
    others = [p for p in model.parameters() if p.ndim != 2]
    optimizer = torch.optim.AdamW(
        [{"params": decayed, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}], betas=(0.9, 0.98)
    )
    started = time.monotonic()
    for step in range(steps):
        inputs, targets, weights = next(data)
        with torch.autocast("cpu", torch.bfloat16):
            logits = model(input_ids=inputs, use_cache=False).logits
        losses = torch.nn.functional.cross_entropy(logits.float().flatten(0, 1), targets.flatten(), reduction="none")
        loss = (losses * weights.flatten()).sum() / weights.sum()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate * min((step + 1) / 100, 1 - step / steps)
        optimizer.step()
        optimizer.zero_grad()
        if step % 100 == 0 or step == steps - 1:
            click.echo(f"step {step:5d}  loss {loss.item():.4f}  {time.monotonic() - started:.0f} s")


def save(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, output: Path) -> None:
    """The weights in bf16, the configuration and the tokenizer, in files that every user may read."""
    model.to(torch.bfloat16).save_pretrained(output)
    tokenizer.save_pretrained(output)
    # The class is written under the name that transformers 4 and 5 both know.
    path = output / "tokenizer_config.json"
    settings = json.loads(path.read_text(encoding="utf-8"))
    settings.pop("backend", None)
    settings["tokenizer_class"] = "PreTrainedTokenizerFast"
    path.write_text(json.dumps(settings, indent=2, sort_keys=True) + "\n", encoding="utf-8", newline="\n")
    (output / "model.safetensors").chmod(0o644)


@click.command(help=__doc__, context_settings={"show_default": True})
@click.option("--output", type=click.Path(path_type=Path), required=True, help="Folder to write the model to.")
@click.option("--steps", type=click.IntRange(min=1), default=2000, help="Optimizer steps; fewer make a weaker base.")
@click.option("--batch-size", type=click.IntRange(min=1), default=64, help="Documents per step, of about 50 tokens.")
@click.option("--learning-rate", type=float, default=3e-3, help="Peak rate of AdamW.")
@click.option("--seed", type=int, default=0, help="Seed of the initial weights and of the text.")
@click.option("--threads", type=click.IntRange(min=1), default=2, help="CPU threads; the last bits depend on it.")
def main(output: Path, steps: int, batch_size: int, learning_rate: float, seed: int, threads: int) -> None:
    """Pretrain the demo's base model on word tasks."""
    torch.set_num_threads(threads)
    tokenizer = make_tokenizer()
    model = make_model(tokenizer, seed)
    click.echo(f"{model.num_parameters():,} parameters, {len(tokenizer)} tokens in the vocabulary")
    train(model, batches(tokenizer, seed, batch_size), steps, learning_rate)
    save(model, tokenizer, output)
    click.echo(f"wrote {output}")


if __name__ == "__main__":
    main()
