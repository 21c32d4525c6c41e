"""Preference tuning: the losses of `losses` over global batches of pairs or marked answers.

The loss of a global batch is the mean over its examples, plus `sft_weight` times the mean cross entropy of the target
tokens of its chosen answers. Both are sums over micro-batches, so ranks and micro-batches do not matter.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from scale_sft.config.objective_options import ObjectiveConfig
from scale_sft.data.preference_batches import PreferenceBatches, SequenceBatch
from scale_sft.data.preferences import Marked, Preferences
from scale_sft.distributed.cluster import Cluster
from scale_sft.model.dropout import without_noise

from . import losses
from .log_probabilities import log_probabilities, of_all
from .reference import Reference
from .rewards import FIELDS, Answers, means_of, sums_of


@dataclass(frozen=True)
class Cut:
    """How ranks and micro-batches cut a global batch."""

    micro_batch_size: int | None
    """Examples, or packed rows, of a micro-batch; None: the whole share of a rank."""
    first: int | None
    """Examples, over all ranks, of a micro-step that proposes candidates; None: as many as in any other."""


@dataclass
class PreferenceObjective:
    """Preference tuning against a reference.

    Args:
        settings: the loss.
        batches: of the training data.
        held_out: held-out data; None: there are none.
        reference: the reference's log-probabilities; not used by orpo.
        cluster: the ranks.
        cut: how they cut a batch.
    """

    settings: ObjectiveConfig
    batches: PreferenceBatches
    held_out: Preferences | None
    reference: Reference
    cluster: Cluster
    cut: Cut
    notes: list[str] = field(default_factory=list)
    _table: Tensor | None = None  # of the reference, [S] fp32 on the CPU; those of a step alone where it is swapped
    _held_out_table: Tensor | None = None

    @property
    def examples(self) -> Preferences:
        """The training data."""
        return self.batches.examples

    def prepare(self) -> list[str]:
        """Measure the reference's log-probabilities of all data before the first step; returns notes for the user."""
        notes, kind = self.notes, self.settings.reference_kind
        if kind == "precomputed":
            self._table = self.reference.log_probabilities(self.examples, notes.append)
        elif kind == "swapped":
            self._table = torch.zeros(self.examples.sequences, dtype=torch.float32)
        if kind != "none" and self.held_out is not None:
            self._held_out_table = self.reference.log_probabilities(self.held_out)
        return notes

    def micro_batches(self, batch: Sequence[int], *, proposing: bool) -> Iterator[SequenceBatch]:
        """Cut this rank's micro-batches from a global batch."""
        return self._cut(self.batches, batch, proposing)

    def _cut(self, batches: PreferenceBatches, batch: Sequence[int], proposing: bool) -> Iterator[SequenceBatch]:
        return batches.of_rank(
            batch,
            rank=self.cluster.rank,
            world_size=self.cluster.size,
            micro_batch_size=self.cut.micro_batch_size,
            first=self.cut.first if proposing else None,
            keep_order=proposing,
        )

    def share(self, batch: Sequence[int], *, proposing: bool) -> PreferenceShare:
        """Begin a global batch: measure what its loss needs of the reference and, for kto, of mismatched answers."""
        if self.settings.reference_kind == "swapped":
            with self.reference.weights.in_place():
                self._fill(batch, proposing)
        divergence = self._divergence(batch, proposing) if isinstance(self.examples, Marked) else 0.0
        good = [self._good(n) for n in batch]
        chosen = sum(int(self.examples.target_counts[2 * n]) for n, is_good in zip(batch, good, strict=True) if is_good)
        return PreferenceShare(self, len(batch), chosen, self._tokens(batch), divergence)

    def _good(self, example: int) -> bool:
        return bool(self.examples.good[example]) if isinstance(self.examples, Marked) else True

    def _tokens(self, batch: Sequence[int]) -> tuple[int, int]:
        """Count target tokens, and tokens without padding, that a global batch trains on."""
        return self.examples.target_tokens(batch), int(self.batches.lengths[list(batch)].sum())

    @torch.no_grad()
    def _fill(self, batch: Sequence[int], proposing: bool) -> None:
        """Measure the reference's log-probabilities of this rank's share, on the weights that are in place."""
        assert self._table is not None
        model = self.reference.weights.sparse.model
        with without_noise(model):
            for batches in self._passes():
                for micro_batch in self._cut(batches, batch, proposing):
                    self._table[micro_batch.sequences] = log_probabilities(model, micro_batch).cpu()

    def _passes(self) -> list[PreferenceBatches]:
        return [self.batches] + ([self.batches.mismatched()] if isinstance(self.examples, Marked) else [])

    @torch.no_grad()
    def _divergence(self, batch: Sequence[int], proposing: bool) -> float:
        """Estimate z of kto over a global batch: the mean log-ratio of its mismatched answers, at least 0."""
        assert self._table is not None
        total = 0.0
        for micro_batch in self._cut(self.batches.mismatched(), batch, proposing):
            policy = log_probabilities(self.reference.weights.sparse.model, micro_batch).cpu()
            total += float((policy - self._table[micro_batch.sequences]).double().sum())
        (total,) = self.cluster.sum_floats(total)
        return max(0.0, total / len(batch))

    def reference_of(self, sequences: Sequence[int], device: torch.device) -> Tensor | None:
        """Look up the reference's log-probabilities of some sequences: [S]; None: there is no reference."""
        return None if self._table is None else self._table[list(sequences)].to(device, non_blocking=True)

    def losses(self, answers: Answers, divergence: float) -> tuple[Tensor, Tensor]:
        """Compute the loss of each example [P] or [N], and the reward of each answer [S]."""
        given, (chosen, rejected) = self.settings, answers.pairs
        if given.objective == "orpo":
            means = answers.policy / answers.tokens
            return losses.orpo(means[chosen], means[rejected], given.beta), given.beta * means
        ratios = answers.log_ratios
        rewards = given.beta * ratios
        if given.objective == "kto":
            weights = given.desirable_weight, given.undesirable_weight
            return losses.kto(ratios, answers.good, divergence, given.beta, *weights), rewards
        if given.objective == "ipo" or given.length_normalised:
            ratios = ratios / answers.tokens
        margins = ratios[chosen] - ratios[rejected]
        if given.objective == "ipo":
            return losses.ipo(margins, given.beta), rewards
        return losses.dpo(margins, given.beta, given.label_smoothing), rewards

    @torch.no_grad()
    def evaluate(self, model: nn.Module) -> tuple[float, dict[str, float]]:
        """Measure the held-out loss and what is reported of the held-out answers; the same on every rank.

        Raises:
            ValueError: there are no held-out data.
        """
        examples = self.held_out
        if examples is None:
            raise ValueError("evaluate: got a run without held-out data")
        policy = of_all(model, examples, self.cluster, self.batches.pad_id).double()
        table = None if self._held_out_table is None else self._held_out_table.double()
        tokens = torch.from_numpy(examples.target_counts).double()
        paired, divergence = self.settings.pairs, 0.0
        good = torch.arange(examples.sequences) % 2 == 0
        if isinstance(examples, Marked):
            assert table is not None
            divergence = max(0.0, float((policy - table)[1::2].mean()))
            own = slice(0, None, 2)
            policy, table, tokens, good = policy[own], table[own], tokens[own], torch.from_numpy(examples.good)
        answers = Answers(policy, table, tokens, good)
        found, rewards = self.losses(answers, divergence)
        sums = sums_of(answers, rewards, paired).tolist()
        loss = float(found.mean())
        if self.settings.weight_of_sft:
            loss -= self.settings.weight_of_sft * float(policy[good].sum() / tokens[good].sum())
        means = means_of(sums, paired=paired, referenced=table is not None)
        return loss, {**means, "kl": divergence} if isinstance(examples, Marked) else means


@dataclass
class PreferenceShare:
    """The loss of a global batch of preferences."""

    objective: PreferenceObjective
    examples: int
    chosen_tokens: int
    """Target tokens of the chosen answers in the global batch."""
    tokens: tuple[int, int]
    """Target tokens, and all without padding, of the global batch."""
    divergence: float
    positions: int = 0
    _sums: Tensor | None = None

    def loss_sum(self, model: nn.Module, micro_batch: SequenceBatch) -> Tensor:
        """Compute what a micro-batch contributes to the mean loss: fp32 scalar with gradient."""
        self.positions += micro_batch.positions
        objective, policy = self.objective, log_probabilities(model, micro_batch)
        if not micro_batch.counts:
            return policy.sum()
        device, settings = policy.device, objective.settings
        good = torch.tensor([self._good(number) for number in micro_batch.sequences], device=device)
        tokens = torch.tensor(micro_batch.counts, dtype=torch.float32, device=device)
        answers = Answers(policy, objective.reference_of(micro_batch.sequences, device), tokens, good)
        found, rewards = objective.losses(answers, self.divergence)
        sums = sums_of(answers, rewards, settings.pairs)
        self._sums = sums if self._sums is None else self._sums + sums
        loss = found.sum() / self.examples
        if settings.weight_of_sft:
            loss = loss - settings.weight_of_sft * policy[good].sum() / self.chosen_tokens
        return loss

    def _good(self, sequence: int) -> bool:
        return sequence % 2 == 0 and self.objective._good(sequence // 2)

    @property
    def sums(self) -> list[float]:
        """Tokens that were computed, padding included, and what is reported of the answers."""
        return [self.positions, *([0.0] * len(FIELDS) if self._sums is None else self._sums.tolist())]

    def counts(self, sums: list[float]) -> dict[str, Any]:
        """Count the tokens of the global batch, and give the means of what is reported of it."""
        positions, *reported = sums
        target, everything = self.tokens
        settings = self.objective.settings
        means = means_of(reported, paired=settings.pairs, referenced=settings.reference_kind != "none")
        if settings.objective == "kto":
            means["kl"] = self.divergence
        means["tokens_per_example"] = everything / self.examples
        return {"target": target, "all": everything, "padding": int(positions) - everything, **means}
