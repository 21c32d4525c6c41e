"""A run that is ready to start: the state of the main loop, and the operations on it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import nn

from scale_sft.adapters.format import Adapter
from scale_sft.adapters.trained import trained_adapter
from scale_sft.data.turn_ends import INFO_KEY, taught_end
from scale_sft.distributed.cluster import Cluster
from scale_sft.evaluation.answers import Answer, exact_match, greedy_answers, why_one_by_one
from scale_sft.evaluation.held_out import Evaluation, held_out_loss
from scale_sft.kernels.backends import triton_asked_for, why_plain
from scale_sft.model.loss import why_all_logits
from scale_sft.model.resident import ResidentDeltas
from scale_sft.model.sparse_model import SparseModel
from scale_sft.model.sparse_optimizer import SparseOptimizer
from scale_sft.model.targets import Target
from scale_sft.model.transient import TransientDeltas
from scale_sft.objective.preference import PreferenceObjective
from scale_sft.objective.tokens import TokenObjective
from scale_sft.spiel.algorithm import SparseFineTuning

from .inputs import Inputs


@dataclass
class Session:
    """A run that is ready: the model with its deltas, their optimizer, and the records so far."""

    inputs: Inputs
    cluster: Cluster
    sparse: SparseModel
    objective: TokenObjective | PreferenceObjective
    optimizer: SparseOptimizer
    load_peak_bytes: int  # of this rank, above what it had before
    loaded_on: torch.device | None = None  # where a quantised base was quantised
    evaluations: dict[int, Evaluation] = field(default_factory=dict)  # by step
    skipped_steps: list[int] = field(default_factory=list)  # without an update: loss or gradient was not finite
    visible_fraction: float | None = None  # of the deltas, in a merged model in bfloat16; measured at the end
    samples: list[Answer] = field(default_factory=list)  # of the last evaluation

    @property
    def step(self) -> int:
        """Completed optimizer steps."""
        return self.optimizer.steps

    @property
    def model(self) -> nn.Module:
        """The module to call for forward passes."""
        return self.sparse.model

    @property
    def targets(self) -> list[Target]:
        """The trained layers."""
        return self.sparse.targets

    @property
    def tuning(self) -> SparseFineTuning:
        """The method and its state."""
        return self.sparse.tuning

    @property
    def resident(self) -> ResidentDeltas | TransientDeltas:
        """The carrier of the deltas into forward passes."""
        return self.sparse.carrier

    @property
    def base_hash(self) -> str:
        """64 hex digits over the target weights of the base."""
        return self.sparse.base_hash

    def evaluate(self, *, answers: bool = False) -> Evaluation:
        """Measure held-out loss and, with `answers`, exact match of generated answers.

        Raises:
            ValueError: the run has no held-out data.
        """
        inputs, config = self.inputs, self.inputs.config
        if inputs.eval is None:
            raise ValueError("evaluate: got a run without held-out data")
        size, pad = config.run.eval_batch_size, inputs.tokenizer.pad_token_id
        if isinstance(self.objective, PreferenceObjective):
            loss, rewards = self.objective.evaluate(self.model)
            result = Evaluation(loss, inputs.eval.target_tokens(range(len(inputs.eval))), rewards=rewards)
        else:
            result = held_out_loss(self.model, inputs.eval, self.cluster, size, pad)
        matching = config.data.exact_match_examples if answers else 0
        wanted = max(matching, config.data.generation_samples)
        if not wanted:
            return result
        alone = why_one_by_one(self.model, inputs.tokenizer, self.cluster)
        given = greedy_answers(
            self.model,
            inputs.tokenizer,
            inputs.eval.right_answers(),
            self.cluster,
            count=wanted,
            batch_size=1 if alone else size,
            max_new_tokens=config.data.max_new_tokens,
        )
        matched = exact_match(given[:matching], config.data.answer_pattern) if matching else None
        self.samples = given[: config.data.generation_samples]
        return replace(result, exact_match=matched)

    def micro_batches(self, batch: Sequence[int], *, proposing: bool) -> Iterator[Any]:
        """Cut this rank's micro-batches from a global batch; `proposing` if the first of them proposes candidates."""
        return self.objective.micro_batches(batch, proposing=proposing)

    def prepare(self, metrics: Any) -> list[str]:
        """Measure what the objective needs before the first step, such as the reference; returns notes for the user."""
        if not isinstance(self.objective, PreferenceObjective):
            return []
        with metrics.phase("measuring the reference"):
            return self.objective.prepare()

    def describe_kernels(self) -> list[str]:
        """Describe the kernels in use before the first step, as notes for the user."""
        device, kernels = self.cluster.device, self.inputs.config.run.kernels
        reasons = sorted(set(filter(None, self.cluster.gather_objects(why_plain(device, kernels)))))
        if reasons or not triton_asked_for(device, kernels):
            return [f"kernels: using plain torch, which is {reason}" for reason in reasons]
        in_weights = isinstance(self.resident, ResidentDeltas)
        if self.sparse.fused:
            step = "updated and written in one pass" if in_weights else "updated in one pass"
        else:
            step = "updated, then written" if in_weights else "updated"
        return [f"kernels: entries of weight gradients picked in one pass; deltas {step}"]

    def prove_loss(self) -> list[str]:
        """Prove the loss that needs no whole logits on this model before the first step; says why it cannot be used."""
        reason = why_all_logits(self.model)
        return [f"loss: all logits of a micro-batch are in memory at once: {reason}"] if reason else []

    def prove_answers(self) -> list[str]:
        """Find out before the first step how prompts can be answered, if any will be; returns notes for the user.

        Raises:
            UserError: the base cannot generate.
        """
        inputs, data = self.inputs, self.inputs.config.data
        if inputs.eval is None or not max(data.exact_match_examples, data.generation_samples):
            return []
        reason = why_one_by_one(self.model, inputs.tokenizer, self.cluster)
        return [reason] if reason else []

    def check_packed_base(self) -> None:
        """Prove that a quantised base still has the bytes that it was loaded with.

        Raises:
            UserError: it does not, so the trained deltas do not belong to any base.
        """
        if self.inputs.quantization is None:
            return
        self.sparse.check_base(
            "base: its packed weights have changed during the run; something wrote into them, so the deltas no longer "
            "belong to a base"
        )

    def adapter(self) -> Adapter:
        """Return the present deltas as an adapter, with everything needed to use them."""
        config = self.inputs.config
        adapter = trained_adapter(self.sparse, config.model.base, config.model.revision, self.loaded_on)
        if config.data.chat_template:  # the base lacks it, and the merged model needs it
            adapter.info["chat_template"] = self.inputs.tokenizer.chat_template
        if self.visible_fraction is not None:
            adapter.info["visible_in_bfloat16"] = round(self.visible_fraction, 4)
        end = taught_end(self.inputs.train, self.inputs.tokenizer)
        if end is not None:
            adapter.info[INFO_KEY] = end
        return adapter
