"""What two runs must have in common to be the same run, bit for bit."""

from __future__ import annotations

import json
from pathlib import Path

from scale_sft.reporting.metrics_file import read_metrics

FIGURES = ("step", "loss", "grad_norm", "learning_rate", "tokens", "target_tokens", "steps")


def losses(run: Path) -> list[tuple]:
    """The figures of every recorded step, exactly."""
    return [tuple(r[key] for key in FIGURES) for r in read_metrics(run / "metrics.jsonl") if r["event"] == "step"]


def reallocations(run: Path) -> list[tuple]:
    keys = ("step", "number", "replaced", "dropped", "cohort_counts", "cohort_steps")
    return [tuple(str(r[k]) for k in keys) for r in read_metrics(run / "metrics.jsonl") if r["event"] == "reallocation"]


def evaluations(run: Path) -> list[tuple]:
    return [(r["step"], r["loss"]) for r in read_metrics(run / "metrics.jsonl") if r["event"] == "eval"]


def batches(run: Path) -> dict[int, list[int]]:
    """The examples of each step, as they were last used; a step that was done again had the same."""
    found: dict[int, list[int]] = {}
    for line in (run / "batches.jsonl").read_text().splitlines():
        step, batch = json.loads(line)
        assert found.setdefault(step, batch) == batch
    return found


def states(run: Path) -> dict[str, tuple]:
    """By checkpoint: checksums of its tensor files, and its state but for the options that may differ."""
    found = {}
    for folder in sorted((run / "checkpoints").glob("step_*")):
        files = json.loads((folder / "manifest.json").read_text())["files"]
        state = json.loads((folder / "state.json").read_text())
        del state["options"], state["ranks"]
        tensors = {name: entry["sha256"] for name, entry in files.items() if name != "state.json"}
        found[folder.name] = tensors, json.dumps(state)
    return found


def assert_same_run(run: Path, reference: Path) -> None:
    """Deltas, optimizer state at every checkpoint that both have, losses, reallocations, data order, adapter."""
    mine, theirs = states(run), states(reference)
    assert mine and set(mine) <= set(theirs)
    for name in mine:
        assert mine[name] == theirs[name], name
    assert losses(run) == losses(reference)
    assert reallocations(run) == reallocations(reference)
    assert evaluations(run) == evaluations(reference)
    assert batches(run) == batches(reference)
    file = "adapter/adapter_model.safetensors"
    assert (run / file).read_bytes() == (reference / file).read_bytes()
