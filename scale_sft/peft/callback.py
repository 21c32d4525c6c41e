"""`SpielCallback`: what an adapter has to know of a Trainer: how many steps there are, and where it resumes."""

from __future__ import annotations

from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments, trainer

from scale_sft.errors import UserError

from .layer import require_whole
from .tuner import tuner_in


class SpielCallback(TrainerCallback):
    """Drop and grow in step with a Trainer's own schedule.

    Trainers that are made after the PEFT model have it already; it does nothing for other models. Checkpoints of the
    Trainer hold all that resuming needs, in optimizer.pt.
    """

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Begin, or resume at the step of the optimizer's state.

        Raises:
            UserError: the Trainer cuts the model into shards, or its optimizer is not one of torch.
        """
        tuner = tuner_in(kwargs.get("model"))
        if tuner is None:
            return
        for layer in tuner.spiel_layers():
            require_whole(layer.weight, layer.weight_name)
        if args.deepspeed or args.fsdp:
            kind = "DeepSpeed" if args.deepspeed else "FSDP"
            raise UserError(
                f"{kind}: got a Trainer that uses it, expected one process or DDP under PEFT. Fix: leave it out; or "
                "train with `scale-sft train`, which shards the base over ranks"
            )
        optimizer = kwargs["optimizer"]
        tuner.begin(
            getattr(optimizer, "optimizer", optimizer), total_steps=state.max_steps, fresh=state.global_step == 0
        )
        for session in tuner.sessions.values():
            seen = session.steps + session.skipped
            if session.schedule and seen != state.global_step:
                raise UserError(
                    f"resume_from_checkpoint: got a checkpoint of step {state.global_step} whose optimizer.pt knows of "
                    f"{seen} steps of drop and grow, expected as many. Fix: resume from a checkpoint of this "
                    "training with its optimizer's state (save_only_model=False)"
                )

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Make sure that the step was seen.

        Raises:
            UserError: the optimizer stepped without torch's hooks.
        """
        tuner = tuner_in(kwargs.get("model"))
        for session in tuner.sessions.values() if tuner is not None else ():
            optimizer = kwargs["optimizer"]
            if session.received and getattr(optimizer, "step_was_skipped", False):  # by a GradScaler
                session.skip()
            elif session.received:
                kind = type(getattr(optimizer, "optimizer", optimizer)).__name__
                raise UserError(
                    f"optimizer: {kind} has stepped without torch's step hooks, expected a torch.optim.Optimizer. Fix: "
                    "use optim='adamw_torch'"
                )


def add_to_trainers() -> None:
    """Add `SpielCallback` to all Trainers that are made from now on, where transformers has a list of such."""
    known = getattr(trainer, "DEFAULT_CALLBACKS", None)
    if isinstance(known, list) and SpielCallback not in known:
        known.append(SpielCallback)
