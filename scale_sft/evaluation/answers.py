"""Greedy answers and exact match: the same for any number of ranks and any batch size."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from scale_sft.data.examples import Examples
from scale_sft.data.micro_batches import micro_batches
from scale_sft.data.turn_ends import ids_of, special_tokens, taught_end
from scale_sft.distributed.cluster import Cluster
from scale_sft.errors import UserError
from scale_sft.model.empty import text_config

from .held_out import evaluating, split
from .padding import ONE_BY_ONE, ignores_left_padding

if TYPE_CHECKING:
    from transformers import GenerationConfig

ANSWER_PATTERNS = {"gsm8k": r"####\s*(.+)"}
"""Named values of `answer_pattern`."""


@dataclass(frozen=True)
class Answer:
    """A generated answer and the expected one."""

    prompt: str
    generated: str
    reference: str


def exact_match(answers: Sequence[Answer], pattern: str | None = None) -> float:
    """Compute the fraction of answers that equal their reference; one that `extract_answer` does not find is wrong."""
    pairs = [(extract_answer(a.generated, pattern), extract_answer(a.reference, pattern)) for a in answers]
    return sum(generated is not None and generated == wanted for generated, wanted in pairs) / len(pairs)


def extract_answer(text: str, pattern: str | None) -> str | None:
    """Find the part of a text that counts as its answer, without spaces at its ends; None if there is none.

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


@dataclass(frozen=True)
class _Ends:
    """The tokens that end an answer."""

    stops: tuple[int, ...]  # generation stops at each of these
    silent: frozenset[int]  # padding, and the end tokens of model and tokenizer
    taught: int | None  # the token that ends the references; None: text does

    def bare(self, ids: Sequence[int]) -> list[int]:
        """Drop padding and end from the end of an answer; special tokens inside it stay, and so does a lone one."""
        length = len(ids)
        while length and ids[length - 1] in self.silent:
            length -= 1
        if length > 1 and ids[length - 1] == self.taught:
            length -= 1
        return list(ids[:length])


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
    """Answer the prompts of the first `count` examples greedily; returns them in order, on every rank.

    Generated and expected answers lose padding and the token that ends them, nothing else: an answer that is a special
    token is compared like any other. Only the token ids of the base's generation configuration matter here; its
    penalties, beams and forced tokens do not.

    Args:
        model: to answer.
        tokenizer: of the model.
        examples: held-out ones.
        cluster: the ranks that share the prompts.
        count: of examples.
        batch_size: of one rank; 1 where `why_one_by_one` says so.
        max_new_tokens: of an answer.

    Raises:
        UserError: a prompt with its answer would be longer than the model's positions.
    """
    chosen = range(min(count, len(examples)))
    _refuse_long_prompts(model, examples, chosen, max_new_tokens)
    ends = _ends_of(model, tokenizer, examples, chosen)
    settings = _greedy(model, tokenizer, ends, max_new_tokens)
    text = lambda ids: tokenizer.decode(ends.bare(ids)).strip()
    own: dict[int, Answer] = {}
    with evaluating(model, settings):
        for start in range(0, len(chosen), batch_size * cluster.size):
            cluster.agree_to_stop()
            group = list(chosen[start : start + batch_size * cluster.size])
            for members in micro_batches(group, cluster.rank, cluster.size, batch_size):
                present = [n for n in members if n is not None]
                # A rank without a share generates too: the others may wait for its part of the base.
                generated = _generate(model, tokenizer, examples, present or [0], cluster, settings)
                for n, ids in zip(present, generated, strict=False):
                    prompt, reference = split(examples, n)
                    shown = tokenizer.decode(prompt, skip_special_tokens=True).strip()
                    own[n] = Answer(shown, text(ids), text(reference))
    everyone: dict[int, Answer] = {}
    for answers in cluster.gather_objects(own):
        everyone |= answers
    return [everyone[n] for n in chosen]


def why_one_by_one(model: nn.Module, tokenizer: Any, cluster: Cluster) -> str | None:
    """Say that prompts are answered one at a time, and why; None: they are answered in batches.

    Raises:
        UserError: the model cannot generate.
    """
    settings = _greedy(model, tokenizer, _Ends((), frozenset(), None), 1)
    with evaluating(model, settings):
        synced = cluster.sharded and cluster.size > 1
        return None if ignores_left_padding(model, settings, cluster.device, synced=synced) else ONE_BY_ONE


def _refuse_long_prompts(model: nn.Module, examples: Examples, members: Sequence[int], max_new_tokens: int) -> None:
    """Raise UserError, on every rank alike, if a prompt and its answer need more positions than the model has."""
    length = max(len(split(examples, n)[0]) for n in members)
    positions = getattr(text_config(model.config), "max_position_embeddings", None)
    if positions and length + max_new_tokens > positions:
        raise UserError(
            f"max_new_tokens: got {max_new_tokens}, expected at most {positions - length}: the longest prompt has "
            f"{length} of the base's {positions} positions. Fix: lower it, or max_length"
        )


def _generate(
    model: Any,
    tokenizer: Any,
    examples: Examples,
    members: Sequence[int],
    cluster: Cluster,
    settings: GenerationConfig,
) -> list[list[int]]:
    """Continue the members' prompts; returns the new ids of each, padded to one length."""
    prompts = [split(examples, n)[0] for n in members]
    length = max(map(len, prompts))
    ids = torch.full((len(prompts), length), tokenizer.pad_token_id, dtype=torch.int64)
    mask = torch.zeros_like(ids)
    for row, prompt in enumerate(prompts):  # padded on the left, so that all answers start at the same column
        ids[row, length - len(prompt) :] = torch.tensor(prompt)
        mask[row, length - len(prompt) :] = 1
    output = model.generate(
        input_ids=ids.to(cluster.device),
        attention_mask=mask.to(cluster.device),
        generation_config=settings,
        synced_gpus=cluster.sharded and cluster.size > 1,
    )
    return output[:, length:].tolist()


def _greedy(model: Any, tokenizer: Any, ends: _Ends, max_new_tokens: int) -> GenerationConfig:
    """Settings of greedy decoding that take nothing but token ids from the base."""
    from transformers import GenerationConfig

    return GenerationConfig(
        do_sample=False,
        num_beams=1,
        use_cache=True,
        max_new_tokens=max_new_tokens,
        bos_token_id=model.generation_config.bos_token_id,
        decoder_start_token_id=model.generation_config.decoder_start_token_id,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=list(ends.stops) or None,
    )


def _ends_of(model: Any, tokenizer: Any, examples: Examples, members: Sequence[int]) -> _Ends:
    """Find what ends the answers to these examples.

    Generation stops at the end tokens of the model and of the tokenizer, at the one that the data teach, and at special
    tokens that end references.
    """
    taught = taught_end(examples, tokenizer, members)
    known = set(ids_of(model.generation_config.eos_token_id)) | set(ids_of(tokenizer.eos_token_id))
    last = {split(examples, n)[1][-1] for n in members} & set(special_tokens(tokenizer))
    stops = known | last | set(ids_of(taught))
    return _Ends(tuple(sorted(stops)), frozenset(known | {tokenizer.pad_token_id}), taught)
