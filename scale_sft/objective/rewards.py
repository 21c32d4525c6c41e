"""What is reported of preferences, as sums over examples, which ranks and micro-batches add up, and as means.

reward_chosen, reward_rejected  beta times the log-ratio to the reference (orpo: beta times the mean log-probability per
                                token); of kto, those of the good and of the bad answers
reward_margin, reward_accuracy  mean difference of both, and how often it is above 0; pairs only
kl_per_token                    mean of log ref - log pi over the tokens of all answers: estimates the KL divergence
                                from the reference to the model on the answers of the data
kl                              kto: z of its loss, estimated from mismatched answers
chosen_nll                      cross entropy per token of the chosen (good) answers
length_chosen, length_rejected  target tokens per answer
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

FIELDS = (
    "chosen", "rejected", "reward_chosen", "reward_rejected", "wins", "log_ratio", "log_chosen", "tokens_chosen",
    "tokens_rejected",
)  # fmt: skip


@dataclass(frozen=True)
class Answers:
    """Log-probabilities of S answers: all tensors [S]."""

    policy: Tensor  # fp32, with gradient in training
    reference: Tensor | None  # fp32; None: there is no reference
    tokens: Tensor  # target tokens, fp32
    good: Tensor  # bool; of pairs the chosen side, which comes first

    @property
    def log_ratios(self) -> Tensor:
        """Compute h of each answer: log pi - log ref."""
        assert self.reference is not None, "this objective has no reference"
        return self.policy - self.reference

    @property
    def pairs(self) -> tuple[slice, slice]:
        """Where the chosen and the rejected sides of pairs are."""
        return slice(0, None, 2), slice(1, None, 2)


REPORTED = (
    "reward_chosen", "reward_rejected", "reward_margin", "reward_accuracy", "kl_per_token", "kl", "chosen_nll",
    "length_chosen", "length_rejected",
)  # fmt: skip


def rewards_of(record: Mapping[str, float]) -> dict[str, float] | None:
    """Find what is reported of preferences in a record of metrics.jsonl; None: the objective was sft."""
    found = {name: record[name] for name in REPORTED if name in record}
    return found or None


def sums_of(answers: Answers, rewards: Tensor, paired: bool) -> Tensor:
    """Add up what is reported of some answers: [FIELDS] fp64, in their order."""
    good, rewards, tokens = answers.good, rewards.detach().double(), answers.tokens.double()
    policy = answers.policy.detach().double()
    wins = rewards.new_zeros(())
    if paired:
        chosen, rejected = answers.pairs
        wins = (rewards[chosen] > rewards[rejected]).sum()
    ratio = policy - answers.reference.double() if answers.reference is not None else torch.zeros_like(policy)
    of = lambda values, where: (values * where).sum()
    return torch.stack(
        [
            good.sum(), (~good).sum(), of(rewards, good), of(rewards, ~good), wins, ratio.sum(), of(policy, good),
            of(tokens, good), of(tokens, ~good),
        ]
    ).double()  # fmt: skip


def means_of(sums: list[float], *, paired: bool, referenced: bool) -> dict[str, float]:
    """Turn sums over all ranks into means by name; those of nothing are left out."""
    total = dict(zip(FIELDS, sums, strict=True))
    means: dict[str, float] = {}
    for side in ("chosen", "rejected"):
        if total[side]:
            means[f"reward_{side}"] = total[f"reward_{side}"] / total[side]
            means[f"length_{side}"] = total[f"tokens_{side}"] / total[side]
    if paired:
        means["reward_margin"] = means["reward_chosen"] - means["reward_rejected"]
        means["reward_accuracy"] = total["wins"] / total["chosen"]
    if referenced:
        means["kl_per_token"] = -total["log_ratio"] / (total["tokens_chosen"] + total["tokens_rejected"])
    if total["tokens_chosen"]:
        means["chosen_nll"] = -total["log_chosen"] / total["tokens_chosen"]
    return means
