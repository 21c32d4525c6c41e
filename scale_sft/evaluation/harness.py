"""Run benchmarks with lm-evaluation-harness, where it is installed."""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any

import yaml
from torch import nn

from scale_sft.errors import UserError
from scale_sft.files import ASSETS

PAPER_TASKS = ASSETS / "tasks" / "paper.yaml"


def require_harness() -> None:
    """Raise UserError, saying what to install, if lm-evaluation-harness is missing."""
    if find_spec("lm_eval") is None:
        raise UserError(
            "tasks: got a task, expected lm-evaluation-harness to be installed. Fix: pip install 'lm-eval[hf]>=0.4.9'"
        )


def tasks_of(written: str) -> dict[str, int | None]:
    """Parse 'paper' or comma-separated names into tasks and their numbers of examples in the prompt.

    None stands for the default of the task.
    """
    if written != "paper":
        return {name.strip(): None for name in written.split(",") if name.strip()}
    return {task["name"]: task["shots"] for task in yaml.safe_load(PAPER_TASKS.read_text(encoding="utf-8"))["tasks"]}


def run_tasks(model: nn.Module, tokenizer: Any, written: str, *, batch_size: int, limit: int | None) -> dict[str, Any]:
    """Run tasks on a loaded model (with its adapter applied); returns the results of the harness by task.

    Raises:
        UserError: the harness is not installed, or cannot run a task.
    """
    require_harness()
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM

    wrapped = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=batch_size)
    results: dict[str, Any] = {}
    for task, shots in tasks_of(written).items():
        try:
            found = simple_evaluate(
                model=wrapped, tasks=[task], num_fewshot=shots, limit=limit, confirm_run_unsafe_code=task == "humaneval"
            )
        except (KeyError, ValueError) as error:
            raise UserError(f"tasks: lm-evaluation-harness cannot run '{task}': {error}") from None
        if found is not None:  # only its first process has results
            results |= found["results"]
    return results
