"""Supervised fine-tuning: the cross entropy per target token."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from torch import Tensor, nn

from scale_sft.data.examples import Examples
from scale_sft.model import loss
from scale_sft.model.router_loss import RouterLoss


class Share(Protocol):
    """The loss of one global batch, as a sum over micro-batches: this rank's part of it."""

    def loss_sum(self, model: nn.Module, micro_batch: Any) -> Tensor:
        """Compute what a micro-batch contributes to the mean loss: fp32 scalar with gradient."""

    @property
    def sums(self) -> list[float]:
        """What was counted on this rank, to be added up over the ranks."""

    def counts(self, sums: list[float]) -> dict[str, Any]:
        """Count the tokens of the global batch: target, all, padding; and what else is reported of it."""


class Objective(Protocol):
    """What a run learns from."""

    def prepare(self) -> list[str]:
        """Measure what the first step needs; returns notes for the user."""

    def micro_batches(self, batch: Sequence[int], *, proposing: bool) -> Iterator[Any]:
        """Cut this rank's micro-batches from a global batch; `proposing` if the first of them proposes candidates."""

    def share(self, batch: Sequence[int], *, proposing: bool) -> Share:
        """Begin a global batch."""


@dataclass
class TokenShare:
    """The mean cross entropy of a global batch's target tokens."""

    target_tokens: int
    all_tokens: int
    router_loss: RouterLoss | None = None
    positions: int = 0
    _balance: Tensor | float = 0.0  # this rank's share of the router loss, not weighted

    def loss_sum(self, model: nn.Module, micro_batch: dict[str, Tensor]) -> Tensor:
        """Sum the cross entropies of a micro-batch, over the global batch's number of target tokens.

        A router loss is that of the micro-batch, by its share of the target tokens: the shares add up to 1. It is not
        linear in the tokens, so it depends on the cut.
        """
        self.positions += micro_batch["input_ids"].numel()
        if self.router_loss is None:
            return loss.token_loss_sum(model, micro_batch, self.target_tokens)
        share = len(loss.predictions(micro_batch["labels"])[0]) / self.target_tokens
        with self.router_loss.taken(model) as found:
            total = loss.token_loss_sum(model, {**micro_batch, **self.router_loss.inputs}, self.target_tokens)
        balance = found[-1].to(total.device) * share
        self._balance = self._balance + balance.detach()
        return total + self.router_loss.coefficient * balance

    @property
    def sums(self) -> list[float]:
        """Tokens that were computed, padding included; and the router loss, if there is one."""
        return [self.positions] if self.router_loss is None else [self.positions, float(self._balance)]

    def counts(self, sums: list[float]) -> dict[str, Any]:
        """Count the tokens of the global batch."""
        counted = {"target": self.target_tokens, "all": self.all_tokens, "padding": int(sums[0]) - self.all_tokens}
        return counted if self.router_loss is None else {**counted, "router_loss": sums[1]}


@dataclass(frozen=True)
class TokenObjective:
    """Supervised fine-tuning.

    Args:
        examples: what is learned.
        cut: cuts this rank's micro-batches from a global batch.
        router_loss: is added to the loss.
    """

    examples: Examples
    cut: Callable[..., Iterator[dict[str, Tensor]]] = field(repr=False)
    router_loss: RouterLoss | None = None

    def prepare(self) -> list[str]:
        """Measure nothing."""
        return []

    def micro_batches(self, batch: Sequence[int], *, proposing: bool) -> Iterator[dict[str, Tensor]]:
        """Cut this rank's micro-batches from a global batch."""
        return self.cut(batch, proposing=proposing)

    def share(self, batch: Sequence[int], *, proposing: bool) -> TokenShare:
        """Begin a global batch."""
        return TokenShare(self.examples.target_tokens(batch), self.examples.all_tokens(batch), self.router_loss)
