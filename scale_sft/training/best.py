"""The best adapter of a run so far, by held-out loss, and early stopping."""

from __future__ import annotations

from collections.abc import Mapping
from math import isnan
from pathlib import Path

from scale_sft.adapters.format import Adapter
from scale_sft.evaluation.held_out import Evaluation


def best_step(evaluations: Mapping[int, Evaluation]) -> int:
    """Return the step of the lowest held-out loss, the first of several; there must be an evaluation."""
    return min(evaluations, key=lambda step: (isnan(evaluations[step].loss), evaluations[step].loss, step))


def hopeless(evaluations: Mapping[int, Evaluation], step: int, early_stopping_steps: int | None) -> bool:
    """Tell whether at `step`, just evaluated, the held-out loss has not fallen for this many steps; None: never."""
    if early_stopping_steps is None or step not in evaluations:
        return False
    return step - best_step(evaluations) >= early_stopping_steps


def save_best(adapter: Adapter, held_out_loss: float, step: int, folder: Path) -> None:
    """Write an adapter, with its held-out loss and step."""
    info = {**adapter.info, "held_out_loss": held_out_loss, "step": step}
    Adapter(adapter.indices, adapter.deltas, adapter.shapes, info).save(folder)
