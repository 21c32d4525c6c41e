"""Held-out loss and exact match: the same figures for any number of ranks and any batch size.

Shapes: B sequences, L tokens, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from .data import IGNORED, Examples, by_length, collate, micro_batches
from .distributed import Cluster


@dataclass(frozen=True)
class Evaluation:
    """Figures of one evaluation."""

    loss: float  # mean over target tokens, natural logarithm
    target_tokens: int
    exact_match: float | None = None  # fraction in [0, 1]; None: not asked for

    @property
    def perplexity(self) -> float:
        return math.exp(min(self.loss, 700.0))


def token_loss_sum(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    """Sum of the cross entropies of all target tokens of a batch of [B, L]: fp32 scalar with gradient.

    Only the logits of target positions are taken to fp32.
    """
    logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], use_cache=False).logits
    labels = batch["labels"][:, 1:]
    wanted = labels != IGNORED
    return functional.cross_entropy(logits[:, :-1][wanted].float(), labels[wanted], reduction="sum")


@torch.no_grad()
def held_out_loss(model: nn.Module, examples: Examples, cluster: Cluster, batch_size: int, pad_id: int) -> Evaluation:
    """Token-weighted mean loss over all examples, spread over the ranks."""
    loss = 0.0
    for group in by_length(examples, batch_size * cluster.size):
        cluster.agree_to_stop()
        for members in micro_batches(group, cluster.rank, cluster.size, batch_size):
            loss += token_loss_sum(model, collate(examples, members, pad_id, cluster.device)).double().item()
    tokens = examples.target_tokens(range(len(examples)))
    (total,) = cluster.sum_floats(loss)
    return Evaluation(loss=total / tokens, target_tokens=tokens)


@torch.no_grad()
def exact_match(
    model: nn.Module,
    tokenizer: Any,
    examples: Examples,
    cluster: Cluster,
    *,
    count: int,
    batch_size: int,
    max_new_tokens: int,
) -> float:
    """Fraction of the first `count` examples whose greedy answer equals the reference, spaces at the ends aside."""
    chosen = range(min(count, len(examples)))
    right = 0
    was_training = model.training
    model.eval()
    try:
        for start in range(0, len(chosen), batch_size * cluster.size):
            cluster.agree_to_stop()
            group = list(chosen[start : start + batch_size * cluster.size])
            for members in micro_batches(group, cluster.rank, cluster.size, batch_size):
                present = [n for n in members if n is not None]
                answers = _answers(model, tokenizer, examples, present or [0], cluster, max_new_tokens)
                right += sum(answers[place] == _reference(tokenizer, examples, n) for place, n in enumerate(present))
    finally:
        model.train(was_training)
    (total,) = cluster.sum_floats(right)
    return total / len(chosen)


def _split(examples: Examples, n: int) -> tuple[list[int], list[int]]:
    """The prompt and the answer of an example: what comes before its first target token, and from there on."""
    labels = examples.labels[n]
    first = next(place for place in range(1, len(labels)) if labels[place] != IGNORED)
    return examples.input_ids[n][:first], examples.input_ids[n][first:]


def _reference(tokenizer: Any, examples: Examples, n: int) -> str:
    return tokenizer.decode(_split(examples, n)[1], skip_special_tokens=True).strip()


def _answers(model, tokenizer, examples, members: Sequence[int], cluster: Cluster, max_new_tokens: int) -> list[str]:
    prompts = [_split(examples, n)[0] for n in members]
    length = max(map(len, prompts))
    ids = torch.full((len(prompts), length), tokenizer.pad_token_id, dtype=torch.int64)
    mask = torch.zeros_like(ids)
    for row, prompt in enumerate(prompts):  # padded on the left, so that answers start side by side
        ids[row, length - len(prompt) :] = torch.tensor(prompt)
        mask[row, length - len(prompt) :] = 1
    output = model.generate(
        input_ids=ids.to(cluster.device),
        attention_mask=mask.to(cluster.device),
        do_sample=False,
        use_cache=True,
        max_new_tokens=max_new_tokens,
        pad_token_id=tokenizer.pad_token_id,
        synced_gpus=cluster.sharded and cluster.size > 1,
    )
    return [tokenizer.decode(row[length:], skip_special_tokens=True).strip() for row in output]
