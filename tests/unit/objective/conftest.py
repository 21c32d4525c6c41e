"""What tests of objectives share."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch


@dataclass
class Step:
    """What one global batch gives."""

    loss: float
    gradient: torch.Tensor  # of all deltas, [K]
    counts: dict[str, Any]


@pytest.fixture
def prefer(session: Callable[..., Any], preferences_file, marked_file) -> Callable[..., Any]:
    """(objective, option=value, ...) -> a session of it whose deltas are not zero, as after some steps."""
    later = {"steps": 40, "update_interval_steps": 20, "estimation_steps": 5, "max_length": 64}

    def make(objective: str = "dpo", **options: Any) -> Any:
        data = marked_file if objective == "kto" else preferences_file
        made = session(**{"objective": objective, "train_data": str(data), **later, **options})
        made.objective.prepare()
        store = made.tuning.store
        store.flat.copy_(0.05 * torch.randn(store.flat.shape, generator=torch.Generator().manual_seed(0)))
        made.resident.write()
        return made

    return make


@pytest.fixture(scope="session")
def step_of() -> Callable[[Any, list[int]], Step]:
    """(session, batch) -> loss and gradient of a global batch, in a step that neither proposes nor estimates."""

    def measure(session: Any, batch: list[int]) -> Step:
        from scale_sft.train import forward_backward

        session.optimizer.begin(7)
        loss, counts = forward_backward(session, batch)
        gradient = session.tuning.recorder.flat[: session.tuning.store.active].clone()
        session.optimizer.discard()
        session.optimizer.end()
        return Step(loss, gradient, counts)

    return measure
