"""The best adapter of a run so far, by held-out loss or accuracy, and early stopping."""

from __future__ import annotations

from collections.abc import Mapping
from math import isnan
from pathlib import Path

from scale_sft.adapters.format import Adapter
from scale_sft.evaluation.held_out import Evaluation


def best_step(evaluations: Mapping[int, Evaluation], by: str = "loss") -> int:
    """Return the step of the best evaluation, the first of several; there must be one.

    Args:
        evaluations: by step.
        by: loss: the lowest loss is best; accuracy: the highest reward accuracy, and of equal ones the lowest loss.
    """

    def rank(step: int) -> tuple[float, ...]:
        loss, rewards = evaluations[step].loss, evaluations[step].rewards or {}
        return isnan(loss), -rewards["reward_accuracy"] if by == "accuracy" else 0.0, loss, step

    return min(evaluations, key=rank)


def hopeless(
    evaluations: Mapping[int, Evaluation], step: int, early_stopping_steps: int | None, by: str = "loss"
) -> bool:
    """Tell whether at `step`, just evaluated, the best evaluation is this many steps old; None: never."""
    if early_stopping_steps is None or step not in evaluations:
        return False
    return step - best_step(evaluations, by) >= early_stopping_steps


def save_best(adapter: Adapter, held_out_loss: float, step: int, folder: Path) -> None:
    """Write an adapter, with its held-out loss and step."""
    info = {**adapter.info, "held_out_loss": held_out_loss, "step": step}
    Adapter(adapter.indices, adapter.deltas, adapter.shapes, info).save(folder)
