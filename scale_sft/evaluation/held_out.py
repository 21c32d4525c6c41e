"""Held-out loss of a model."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from scale_sft.data.examples import Examples
from scale_sft.data.micro_batches import by_length, collate, micro_batches
from scale_sft.distributed.cluster import Cluster
from scale_sft.model.loss import IGNORED, token_losses


@dataclass(frozen=True)
class Evaluation:
    """Held-out loss, and exact match where it was asked for."""

    loss: float  # mean over target tokens, natural logarithm; of preferences the mean of the objective's loss
    target_tokens: int
    exact_match: float | None = None  # fraction in [0, 1]; None: not asked for
    rewards: Mapping[str, float] | None = None  # what `objective.rewards` reports; None: the objective is sft

    def record(self) -> dict[str, Any]:
        """Return the fields as a checkpoint keeps them; `rewards` only where there are any."""
        fields = {"loss": self.loss, "target_tokens": self.target_tokens, "exact_match": self.exact_match}
        return fields if self.rewards is None else {**fields, "rewards": dict(self.rewards)}

    @property
    def perplexity(self) -> float:
        """The exponential of the cross entropy per target token, of preferences that of the chosen answers."""
        loss = self.loss if self.rewards is None else self.rewards.get("chosen_nll", math.nan)
        return math.exp(min(loss, 700.0))


def held_out_loss(model: nn.Module, examples: Examples, cluster: Cluster, batch_size: int, pad_id: int) -> Evaluation:
    """Compute the mean loss per target token over all examples, spread over the ranks, summed in double precision."""
    loss = sum(loss_by_example(model, examples, cluster, batch_size, pad_id))
    tokens = examples.target_tokens(range(len(examples)))
    return Evaluation(loss=loss / tokens, target_tokens=tokens)


@torch.no_grad()
def loss_by_example(
    model: nn.Module, examples: Examples, cluster: Cluster, batch_size: int, pad_id: int
) -> list[float]:
    """Sum the losses of the target tokens of each example, in double precision; every rank gets all sums."""
    sums = [0.0] * len(examples)
    for group in by_length(examples, batch_size * cluster.size):
        cluster.agree_to_stop()
        for members in micro_batches(group, cluster.rank, cluster.size, batch_size):
            losses = token_losses(model, collate(examples, members, pad_id, cluster.device)).cpu().double()
            counts = [0 if n is None else examples.target_tokens([n]) for n in members]
            for n, own in zip(members, losses.split(counts), strict=True):
                if n is not None:
                    sums[n] = own.sum().item()
    return cluster.sum_floats(*sums)


@contextmanager
def evaluating(model: Any, settings: Any) -> Iterator[None]:
    """Take the model out of training mode, and give it other generation settings, inside the `with` block.

    Generation needs its cache, which checkpointing forbids in training mode. transformers fills what a call's settings
    leave open from those of the model (a base's repetition penalty, say), so both must be replaced.
    """
    was_training, was_set = model.training, model.generation_config
    model.eval()
    model.generation_config = settings
    try:
        yield
    finally:
        model.generation_config = was_set
        model.train(was_training)


def split(examples: Examples, n: int) -> tuple[list[int], list[int]]:
    """Split an example into prompt and answer.

    The prompt is what comes before the first target token, the answer the unbroken run of target tokens from there on:
    in a conversation, the next turn's question ends it.
    """
    ids, labels = examples.tokens(n)
    counts = [label != IGNORED for label in labels]
    first = next(place for place in range(1, len(ids)) if counts[place])
    last = next((place for place in range(first, len(ids)) if not counts[place]), len(ids))
    return ids[:first].tolist(), ids[first:last].tolist()
