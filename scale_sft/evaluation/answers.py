"""Held-out loss and exact match: the same figures for any number of ranks and any batch size.

Shapes: B sequences, L tokens, V vocabulary.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from scale_sft.data.examples import Examples
from scale_sft.data.micro_batches import micro_batches
from scale_sft.distributed.cluster import Cluster
from scale_sft.errors import UserError

from .held_out import _evaluating, _split

ANSWER_PATTERNS = {"gsm8k": r"####\s*(.+)"}
"""Named values of `answer_pattern`."""


@dataclass(frozen=True)
class Answer:
    """A generated answer beside the one that was expected."""

    prompt: str
    generated: str
    reference: str


def exact_match(answers: Sequence[Answer], pattern: str | None = None) -> float:
    """Fraction of the answers that equal their reference; see `extract_answer`. One that is not found is wrong."""
    pairs = [(extract_answer(a.generated, pattern), extract_answer(a.reference, pattern)) for a in answers]
    return sum(generated is not None and generated == wanted for generated, wanted in pairs) / len(pairs)


def extract_answer(text: str, pattern: str | None) -> str | None:
    """The part of a text that counts as its answer, without spaces at its ends; None if there is none.

    Args:
        pattern: None for the whole text; a name in ANSWER_PATTERNS; or a regular expression, whose last match (its
            first group, where it has one) is the answer. Numbers lose thousands separators and a final period.
    """
    if pattern is None:
        return text.strip()
    found = list(re.finditer(ANSWER_PATTERNS.get(pattern, pattern), text))
    if not found:
        return None
    answer = (found[-1].group(1) if found[-1].re.groups else found[-1].group()) or ""
    answer = answer.strip()
    number = answer.replace(",", "").removeprefix("$").rstrip(".")
    return number if re.fullmatch(r"[+-]?(\d+\.?\d*|\.\d+)", number) else answer


@torch.no_grad()
def greedy_answers(
    model: nn.Module,
    tokenizer: Any,
    examples: Examples,
    cluster: Cluster,
    *,
    count: int,
    batch_size: int,
    max_new_tokens: int,
) -> list[Answer]:
    """Greedy answers to the prompts of the first `count` examples, in their order, on every rank.

    Raises:
        UserError: a prompt with its answer would be longer than the model's positions.
    """
    chosen = range(min(count, len(examples)))
    _refuse_long_prompts(model, examples, chosen, max_new_tokens)
    stops = _stop_tokens(model, tokenizer, examples, chosen)
    own: dict[int, Answer] = {}
    with _evaluating(model):
        for start in range(0, len(chosen), batch_size * cluster.size):
            cluster.agree_to_stop()
            group = list(chosen[start : start + batch_size * cluster.size])
            for members in micro_batches(group, cluster.rank, cluster.size, batch_size):
                present = [n for n in members if n is not None]
                texts = _generate(model, tokenizer, examples, present or [0], cluster, max_new_tokens, stops)
                for n, text in zip(
                    present, texts, strict=False
                ):  # a rank without a share generates too: others may wait for it
                    prompt, reference = (
                        tokenizer.decode(part, skip_special_tokens=True) for part in _split(examples, n)
                    )
                    own[n] = Answer(prompt.strip(), text.strip(), reference.strip())
    everyone: dict[int, Answer] = {}
    for answers in cluster.gather_objects(own):
        everyone |= answers
    return [everyone[n] for n in chosen]


def _refuse_long_prompts(model: nn.Module, examples: Examples, members: Sequence[int], max_new_tokens: int) -> None:
    """Raises UserError, on every rank alike, if a prompt with its answer has more tokens than the model has positions."""
    length = max(len(_split(examples, n)[0]) for n in members)
    positions = getattr(model.config, "max_position_embeddings", None)
    if positions and length + max_new_tokens > positions:
        raise UserError(
            f"max_new_tokens: got {max_new_tokens}, but with a prompt of {length} tokens this base has room for "
            f"{positions - length}; lower it, or max_length"
        )


def _generate(
    model: nn.Module,
    tokenizer: Any,
    examples: Examples,
    members: Sequence[int],
    cluster: Cluster,
    max_new_tokens: int,
    stops: list[int] | None,
) -> list[str]:
    """Greedy continuations of the members' prompts, as text."""
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
        eos_token_id=stops,
        synced_gpus=cluster.sharded and cluster.size > 1,
    )
    return [tokenizer.decode(row[length:], skip_special_tokens=True) for row in output]


def _stop_tokens(model: nn.Module, tokenizer: Any, examples: Examples, members: Sequence[int]) -> list[int] | None:
    """What ends an answer: the model's and the tokenizer's end tokens, and the special tokens that end references (the
    end of a turn, which a base model does not know as an end).
    """
    config = model.generation_config.eos_token_id
    stops = set(config if isinstance(config, list) else [config]) | {tokenizer.eos_token_id}
    stops |= {_split(examples, n)[1][-1] for n in members} & set(tokenizer.all_special_ids)
    return sorted(stops - {None}) or None
