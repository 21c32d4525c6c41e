"""A run that is ready to go: what the main loop turns, and what is asked of it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from scale_sft.adapters.format import Adapter
from scale_sft.data.turn_ends import INFO_KEY, taught_end
from scale_sft.distributed.cluster import Cluster
from scale_sft.errors import UserError
from scale_sft.evaluation.answers import Answer, exact_match, greedy_answers
from scale_sft.evaluation.held_out import Evaluation, held_out_loss
from scale_sft.kernels.autotune import GradientPath
from scale_sft.kernels.cpu import compile as native
from scale_sft.model.fingerprints import combine_fingerprints
from scale_sft.model.loading import max_length
from scale_sft.model.resident import ResidentDeltas
from scale_sft.model.targets import Target
from scale_sft.model.transient import TransientDeltas
from scale_sft.spiel.algorithm import SparseFineTuning
from scale_sft.spiel.schedules import LearningRateSchedule

from .inputs import Inputs


@dataclass
class Session:
    """A run, ready to go: the model with its taps, the deltas, and what moves them."""

    inputs: Inputs
    cluster: Cluster
    model: nn.Module
    targets: list[Target]
    tuning: SparseFineTuning
    resident: ResidentDeltas | TransientDeltas
    learning_rate: LearningRateSchedule
    base_fingerprints: dict[str, str]  # by weight name; they let adapters with different targets be compared
    base_hash: str
    load_peak_bytes: int  # of this rank, above what it had before
    loaded_on: torch.device | None = None  # where a quantised base was quantised
    gradient_path: GradientPath | None = None  # None: without kernels
    fused: bool = False  # deltas are updated and written in one pass
    step: int = 0  # optimizer steps done
    evaluations: dict[int, Evaluation] = field(default_factory=dict)  # by step
    skipped_steps: list[int] = field(default_factory=list)  # without an update: loss or gradient was no finite number
    samples: list[Answer] = field(default_factory=list)  # of the last evaluation

    def evaluate(self, *, answers: bool = False) -> Evaluation:
        """Held-out loss and, with `answers`, exact match of generated answers; there must be held-out data."""
        inputs, config = self.inputs, self.inputs.config
        size, pad = config.run.eval_batch_size, inputs.tokenizer.pad_token_id
        result = held_out_loss(self.model, inputs.eval, self.cluster, size, pad)
        matching = config.data.exact_match_examples if answers else 0
        wanted = max(matching, config.data.generation_samples)
        if not wanted:
            return result
        given = greedy_answers(
            self.model,
            inputs.tokenizer,
            inputs.eval,
            self.cluster,
            count=wanted,
            batch_size=size,
            max_new_tokens=config.data.max_new_tokens,
        )
        matched = exact_match(given[:matching], config.data.answer_pattern) if matching else None
        self.samples = given[: config.data.generation_samples]
        return Evaluation(result.loss, result.target_tokens, matched)

    def micro_batches(self, batch: Sequence[int], *, proposing: bool) -> Iterator[dict[str, Tensor]]:
        """This rank's micro-batches of a global batch; `proposing` where the first of them proposes candidates."""
        return self.inputs.micro_batches(batch, self.cluster, proposing=proposing)

    def update(self, learning_rate: float) -> None:
        """One optimizer step on all deltas; where it is fused, the weights have the new values after it."""
        if not self.fused:
            self.tuning.update(learning_rate)
            return
        from scale_sft.model.fused_step import update_and_write

        update_and_write(self.tuning, self.resident, learning_rate)

    def measure_kernels(self) -> list[str]:
        """Find the fastest way to each weight's gradient before the first step; says what was found."""
        path, config = self.gradient_path, self.inputs.config
        if native.asked_for(self.cluster.device, config.run.kernels) and not (path and path.has_kernels):
            reasons = sorted(set(filter(None, self.cluster.gather_objects(native.why_not()))))
            return [f"kernels: plain torch does what would be faster in C: {reason}" for reason in reasons]
        if path is None:
            return []
        rows = config.run.micro_batch_size or config.run.global_batch_size // self.cluster.size
        length = max_length(config.data.max_length, self.inputs.model_config)
        candidates = {} if config.sparse.method == "ma" else self.tuning.recorder.counts
        path.measure_store(self.tuning.store, candidates, rows * length, self.inputs.dtype)
        in_weights = isinstance(self.resident, ResidentDeltas)
        if self.fused:
            step = "updated and written in one pass" if in_weights else "updated in one pass"
        else:
            step = "updated, then written" if in_weights else "updated"
        return [f"kernels: weight gradients {path.summary()}; deltas {step}"]

    def check_packed_base(self) -> None:
        """Prove that a quantised base has still the bytes that it was loaded with.

        Raises:
            UserError: it has not; what was trained belongs to no base.
        """
        if self.inputs.quantization is None:
            return
        prints = prints_of_base(self.targets, self.cluster, self.resident)
        found = combine_fingerprints(prints, {target.name: target.shape for target in self.targets})
        if found != self.base_hash:
            raise UserError(
                f"base: its packed weights have changed during the run: their hash is {found[:16]}..., at the start it "
                f"was {self.base_hash[:16]}...; something wrote into them, and the deltas belong to no base any more"
            )

    def adapter(self) -> Adapter:
        """The present deltas, with all that is needed to use them."""
        config, store = self.inputs.config, self.tuning.store
        info = {
            "base": config.model.base,
            "revision": config.model.revision,
            "dtype": str(self.inputs.dtype).removeprefix("torch."),
            "base_hash": self.base_hash,
            "base_fingerprints": self.base_fingerprints,
            "method": config.sparse.method,
        }
        if self.inputs.quantization:
            info |= self.inputs.quantization.description(self.loaded_on)
        if config.data.chat_template:  # the base does not have it: the merged model needs it
            info["chat_template"] = self.inputs.tokenizer.chat_template
        end = taught_end(self.inputs.train, self.inputs.tokenizer)
        if end is not None:
            info[INFO_KEY] = end
        return Adapter(
            indices={delta.name: delta.indices for delta in store},
            deltas={delta.name: delta.deltas for delta in store},
            shapes={delta.name: delta.shape for delta in store},
            info=info,
        )


def prints_of_base(
    targets: list[Target], cluster: Cluster, transient: TransientDeltas | None
) -> dict[str, tuple[int, int]]:
    """Fingerprint of each target weight as it is now, wherever it lies; of quantised ones, of packed bytes and scales."""
    prints = cluster.fingerprints({target.name: cluster.part_of(target.module.weight) for target in targets})
    return transient.with_states(prints) if transient else prints
