"""Measure one contestant's memory in its own process: its state by part, and the peak of a step above that.

python -m scale_sft.bench.memory.worker '{"name": ..., "case": {...}, ...}' prints one line of JSON: the result, or
{"error": ...}.
"""

from __future__ import annotations

import json
import sys
from typing import Any

import torch

from scale_sft.bench import reallocate
from scale_sft.bench.contestants import CONTESTANTS, Dense, Sparse
from scale_sft.bench.peak import Peak, peak_of
from scale_sft.bench.workload import Base, Batches, Case
from scale_sft.errors import UserError

from .state import bytes_by_part, tensors_of_model

WARM_UP_STEPS = 2
OUT_OF_MEMORY = "out of memory"


def measure(name: str, case: Case, device: torch.device) -> dict[str, Any]:
    """Measure the memory of a contestant, outside and inside the estimation phase.

    Returns:
        `trainable` parameters, `base_bytes`, and `outside` and `inside` (None without an estimation phase) with
        `parts` (bytes that stay from step to step, and gradients), `kept_bytes` (their sum without what a step
        allocates and frees), `step_bytes` (peak of a step above that) and `peak_bytes` (the sum of both, above the
        frozen base).
    """
    base = Base(case, device)
    contestant = CONTESTANTS[name](base)
    batches = Batches(case, base.model_config.vocab_size, device)
    for number in range(WARM_UP_STEPS):  # to load lazy code, start threads, fill libraries' caches
        contestant.step(batches, number)
    outside: dict[str, Any]
    inside: dict[str, Any] | None = None
    if isinstance(contestant, Sparse):
        outside, inside = _ours(name, contestant, batches, device)
    elif isinstance(contestant, Dense):
        outside, inside = _dense(name, contestant, batches, device)
    return {
        "trainable": contestant.trainable,
        "base_bytes": base.bytes,
        "outside": outside,
        "inside": inside,
    }


def _ours(name: str, ours: Sparse, batches: Batches, device: torch.device) -> tuple[dict, dict | None]:
    method = "ma" if ours.tuning.method == "ma" else "ag"
    small = reallocate.Case(method=method, weights=1 << 15, density=0.01, dtype="float32")
    reallocate.measure(small, repeats=1, device=device)
    steps = ours.tuning.schedule.estimation_steps
    before = _kept(ours)

    parts: dict[str, int] = {}

    def phase() -> None:
        ours.step_at(1, batches, 0)  # proposes
        parts.update(_kept(ours))
        if steps > 1:
            ours.step_at(steps, batches, 1)  # estimates, drops and grows

    found = peak_of(phase, device)
    inside = _result(parts, sum(before.values()), found)
    ours.step(batches, 2)
    kept = _kept(ours)
    outside = _result(kept, sum(kept.values()), peak_of(lambda: ours.step(batches, 3), device))
    return outside, inside


def _dense(name: str, dense: Dense, batches: Batches, device: torch.device) -> tuple[dict, None]:
    adapters = [weight for weight in dense.model.parameters() if weight.requires_grad]
    of_base = name.startswith("full")
    more = dense.kept()
    own = set() if of_base else set(map(id, [*adapters, *more.get("indices", ())]))
    base = [tensor for tensor in tensors_of_model(dense.model) if id(tensor) not in own]
    roots = {"adapter": [] if of_base else adapters, "optimizer": dense.optimizer and dense.optimizer.state, **more}
    parts = bytes_by_part(roots, base)
    kept = sum(parts.values())
    parts["gradients"] = sum(weight.nbytes for weight in adapters)  # only inside the step
    return _result(parts, kept, peak_of(lambda: dense.step(batches, 3), device)), None


def _kept(ours: Sparse) -> dict[str, int]:
    tuning = ours.tuning
    roots = {
        "store": tuning.store,
        "recorder": tuning.recorder,
        "optimizer": tuning.optimizer,
        "resident": ours.resident,
    }
    return bytes_by_part(roots, tensors_of_model(ours.model))


def _result(parts: dict[str, int], kept: int, step: Peak) -> dict[str, Any]:
    return {
        "parts": parts,
        "kept_bytes": kept,
        "step_bytes": step.added,
        "peak_bytes": kept + step.added,
        "peak_by": step.by,
    }


def passes(name: str, case: Case, device: torch.device, *, limit_bytes: int, steps: int) -> bool:
    """Return True if `steps` steps from the start of a run fit in `limit_bytes` of a GPU."""
    total = torch.cuda.get_device_properties(device).total_memory
    torch.cuda.set_per_process_memory_fraction(min(1.0, limit_bytes / total), device)
    try:
        base = Base(case, device)
        contestant = CONTESTANTS[name](base)
        batches = Batches(case, base.model_config.vocab_size, device)
        for step in range(1, steps + 1):
            if isinstance(contestant, Sparse):
                contestant.step_at(step, batches, step)
            else:
                contestant.step(batches, step)
    except torch.cuda.OutOfMemoryError:
        return False
    return True


def main(request: dict[str, Any]) -> dict[str, Any]:
    """Answer a request: {"fits": ...} if it names a limit, otherwise the result of `measure`."""
    case, device = Case(**request["case"]), torch.device(request["device"])
    try:
        if "limit_bytes" in request:
            limit = {"limit_bytes": request["limit_bytes"], "steps": request["steps"]}
            return {"fits": passes(request["name"], case, device, **limit)}
        return measure(request["name"], case, device)
    except torch.cuda.OutOfMemoryError:
        return {"error": OUT_OF_MEMORY}
    except UserError as error:
        return {"error": str(error)}


if __name__ == "__main__":
    print(json.dumps(main(json.loads(sys.argv[1]))))
