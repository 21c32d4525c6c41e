"""Define the contestants of a race on pairs: our steps of sft and of dpo, and TRL's DPOTrainer with LoRA."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from typing import Any

import torch

from scale_sft.config.objective_options import ObjectiveConfig
from scale_sft.data.preference_batches import PreferenceBatches
from scale_sft.distributed.cluster import Cluster
from scale_sft.distributed.sharding import Replicated
from scale_sft.errors import UserError, first_line
from scale_sft.objective.layouts import layout_of
from scale_sft.objective.preference import Cut, PreferenceObjective
from scale_sft.objective.reference import Reference, ReferenceWeights

from ..contestants import LEARNING_RATE, Contestant, Sparse, backward, finite, lora_settings
from ..workload import RUN_STEPS, Base, Case
from .pairs import SHORTEST, PairBatches

METHOD = "ag"
"""Our method in all contestants of this race."""


class Preferring(Sparse):
    """Our contestant on pairs: the trainer's own objective, in one process and without files.

    Args:
        reference: precomputed, which is done here, or swapped.
        packing: pack pairs into rows of two sequences, each with its prompt once.
    """

    def __init__(self, base: Base, batches: PairBatches, *, reference: str = "precomputed", packing: bool = False):
        super().__init__(base, METHOD)
        device = base.device
        cluster = Cluster(rank=0, size=1, device=device, accelerator=None, sharding=Replicated(device))
        layout, note = layout_of(
            self.model,
            row_tokens=2 * base.case.length if packing else None,
            attention=base.case.attention,
            pairs=True,
            device=device,
        )
        self.objective = PreferenceObjective(
            settings=ObjectiveConfig(objective="dpo", reference=reference),
            batches=PreferenceBatches(batches.pairs, layout, batches.pad, device),
            held_out=None,
            reference=Reference(ReferenceWeights(self.sparse), cluster, batches.pad),
            cluster=cluster,
            cut=Cut(None, None),
            notes=[note] if note else [],
        )
        self.objective.prepare()
        self.positions = 0
        """Tokens that the last step computed, padding included, without those of the reference."""

    def gradients(self, batches: Any, number: int) -> float:
        """Compute the gradients of micro-batch `number`; returns the loss."""
        members, proposing = batches.members(number), self.tuning.recorder.proposing
        share = self.objective.share(members, proposing=proposing)
        (micro_batch,) = self.objective.micro_batches(members, proposing=proposing)
        self.positions = micro_batch.positions
        return backward(share.loss_sum(self.model, micro_batch))


class Trl:
    """TRL's DPOTrainer with PEFT's LoRA on our target weights, and torch's fused AdamW.

    A step is what the trainer's loop does: collate, `training_step`, clip, update. Its callbacks and logs are left out.

    Args:
        precomputed: compute the reference's log-probabilities here, before the first step; otherwise each step does,
            in a forward pass without the adapters.
    """

    def __init__(self, base: Base, batches: PairBatches, *, precomputed: bool):
        import peft
        import trl
        from datasets import Dataset

        self._folder = tempfile.TemporaryDirectory(prefix="scale-sft-bench-")
        size = batches.size
        arguments = trl.DPOConfig(
            output_dir=self._folder.name,
            per_device_train_batch_size=size,
            precompute_ref_log_probs=precomputed,
            precompute_ref_batch_size=size,
            max_length=base.case.length,
            gradient_checkpointing=base.case.gradient_checkpointing,
            optim="adamw_torch_fused",
            learning_rate=LEARNING_RATE,
            weight_decay=0.0,
            max_steps=RUN_STEPS,
            bf16=False,  # the base has its dtype, and LoRA is in float32, as in the other races
            fp16=False,
            use_cpu=base.device.type == "cpu",
            report_to="none",
            disable_tqdm=True,
        )
        spelt = lambda tokens: "".join(f" t{token}" for token in tokens)
        names = ("prompt", "chosen", "rejected")
        rows = [dict(zip(names, map(spelt, texts), strict=True)) for texts in batches.texts]
        with quiet():
            try:
                self.trainer = trl.DPOTrainer(
                    base.load(),
                    args=arguments,
                    train_dataset=Dataset.from_list(rows),
                    processing_class=_tokenizer(batches),
                    peft_config=peft.LoraConfig(task_type="CAUSAL_LM", **lora_settings(base)),
                )
            except (ValueError, TypeError, NotImplementedError) as error:
                raise UserError(
                    f"contestants: TRL's DPOTrainer cannot train this base: {first_line(error)} Fix: leave it out"
                ) from None
        self.model = self.trainer.model
        self.weights = [weight for weight in self.model.parameters() if weight.requires_grad]
        self.trainable = sum(weight.numel() for weight in self.weights)
        self.trainer.current_gradient_accumulation_steps = 1
        self.optimizer = self.trainer.create_optimizer()

    def warm_up(self, batches: Any) -> None:
        """Do nothing: its steps are all alike."""

    def step(self, batches: Any, number: int) -> float:
        """Do one whole optimizer step on micro-batch `number`; returns the loss."""
        trainer = self.trainer
        inputs = trainer.data_collator([trainer.train_dataset[n] for n in batches.members(number)])
        loss = finite(trainer.training_step(self.model, inputs).item())
        torch.nn.utils.clip_grad_norm_(self.weights, trainer.args.max_grad_norm)
        self.optimizer.step()
        self.model.zero_grad(set_to_none=True)
        return loss


def _tokenizer(batches: PairBatches) -> Any:
    """Make a tokenizer of words t0, t1 ..., so that TRL gets our tokens from texts."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    end, pad = "<end>", "<pad>"
    words = {f"t{token}": token for token in range(batches.pad)} | {pad: batches.pad, end: batches.end}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token=pad))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=end, pad_token=pad)


@contextmanager
def quiet() -> Iterator[None]:
    """Hide the progress bars of libraries inside the block."""
    from datasets.utils.logging import disable_progress_bar, enable_progress_bar, is_progress_bar_enabled

    shown, before = is_progress_bar_enabled(), os.environ.get("TQDM_DISABLE")
    disable_progress_bar()
    os.environ["TQDM_DISABLE"] = "1"
    try:
        yield
    finally:
        if shown:
            enable_progress_bar()
        if before is None:
            del os.environ["TQDM_DISABLE"]
        else:
            os.environ["TQDM_DISABLE"] = before


PAIR_CONTESTANTS: dict[str, Callable[[Base, PairBatches], Contestant]] = {
    "ours-sft": lambda base, _: Sparse(base, METHOD),
    "ours-dpo": Preferring,
    "ours-dpo-packed": lambda base, batches: Preferring(base, batches, packing=True),
    "ours-dpo-swapped": lambda base, batches: Preferring(base, batches, reference="swapped"),
    "trl-dpo": lambda base, batches: Trl(base, batches, precomputed=True),
    "trl-dpo-swapped": lambda base, batches: Trl(base, batches, precomputed=False),
}


def impossible(name: str, case: Case) -> str | None:
    """Explain why a contestant cannot take part in a case; None if it can.

    Raises:
        UserError: the case has no whole pairs, or none with a prompt and an answer.
    """
    if case.micro_batch % 2:
        raise UserError(
            f"micro_batch_size: got {case.micro_batch} with objective dpo, expected an even number: two sequences are "
            f"a pair. Fix: {case.micro_batch + 1}"
        )
    if case.length < SHORTEST:
        raise UserError(
            f"max_length: got {case.length} with objective dpo, expected at least {SHORTEST}. Fix: give more"
        )
    if name.startswith("trl-"):
        missing = [library for library in ("trl", "peft") if find_spec(library) is None]
        if missing:
            return f"it needs {' and '.join(missing)}: pip install 'scale_sft[trl]'"
    return None
