"""Held-out loss of a model."""

from __future__ import annotations

import math
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import nn

from scale_sft.data.examples import Examples
from scale_sft.data.micro_batches import by_length, collate, micro_batches
from scale_sft.distributed.cluster import Cluster
from scale_sft.model.loss import IGNORED, token_losses


@dataclass(frozen=True)
class Evaluation:
    """Figures of one evaluation."""

    loss: float  # mean over target tokens, natural logarithm
    target_tokens: int
    exact_match: float | None = None  # fraction in [0, 1]; None: not asked for

    @property
    def perplexity(self) -> float:
        return math.exp(min(self.loss, 700.0))


@torch.no_grad()
def held_out_loss(model: nn.Module, examples: Examples, cluster: Cluster, batch_size: int, pad_id: int) -> Evaluation:
    """Token-weighted mean loss over all examples, spread over the ranks, summed in double precision."""
    loss = 0.0
    for group in by_length(examples, batch_size * cluster.size):
        cluster.agree_to_stop()
        for members in micro_batches(group, cluster.rank, cluster.size, batch_size):
            loss += token_losses(model, collate(examples, members, pad_id, cluster.device)).double().sum().item()
    tokens = examples.target_tokens(range(len(examples)))
    (total,) = cluster.sum_floats(loss)
    return Evaluation(loss=total / tokens, target_tokens=tokens)


@contextmanager
def _evaluating(model: nn.Module):
    """The model out of training mode for a while: generation wants its cache, which checkpointing forbids."""
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)


def _split(examples: Examples, n: int) -> tuple[list[int], list[int]]:
    """The prompt and the answer of an example: what comes before its first target token, and those that count from
    there on without a gap (the next turn's question is no answer).
    """
    ids, labels = examples.tokens(n)
    counts = [label != IGNORED for label in labels]
    first = next(place for place in range(1, len(ids)) if counts[place])
    last = next((place for place in range(first, len(ids)) if not counts[place]), len(ids))
    return ids[:first].tolist(), ids[first:last].tolist()
