"""Read the records of a run: sorted by kind, without repetitions, and summed up for the report."""

import math
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from .console import duration
from .metrics_file import METRICS_FILE, read_metrics


@dataclass(frozen=True)
class Run:
    """Records of one run; of several with the same step (or number), the last one counts."""

    name: str
    config: Mapping[str, Any]
    config_text: str
    starts: list[dict] = field(default_factory=list)
    description: dict | None = None
    steps: list[dict] = field(default_factory=list)
    reallocations: list[dict] = field(default_factory=list)
    evaluations: list[dict] = field(default_factory=list)
    end: dict | None = None
    wall_seconds: float = 0.0
    last_time: float | None = None

    def option(self, section: str, key: str) -> Any:
        """Look up an option of the run; None if the configuration does not say."""
        values = self.config.get(section)
        return values.get(key) if isinstance(values, Mapping) else None

    def values(self, key: str) -> list[float]:
        """Collect `key` of every logged step; NaN where it is missing or was not finite."""
        return [_number(record.get(key)) for record in self.steps]

    def step_keys(self, prefix: str) -> list[str]:
        """Find the keys of step records that start with `prefix` and hold two numbers or more."""
        keys = dict.fromkeys(key for record in self.steps for key in record if key.startswith(prefix))
        return [key for key in keys if sum(map(math.isfinite, self.values(key))) > 1]

    @property
    def at(self) -> list[int]:
        """Optimizer steps of `values`."""
        return [record["step"] for record in self.steps]

    @property
    def last_step(self) -> int:
        """Last optimizer step with a record."""
        records = [*self.steps, *self.reallocations, *self.evaluations, *self.starts]
        return max((record["step"] for record in records), default=0)

    @property
    def total_steps(self) -> int | None:
        """Optimizer steps that the run will have; None if it is not recorded."""
        return self.starts[-1].get("total_steps") if self.starts else None

    @property
    def resumed_at(self) -> list[int]:
        """Steps after which a process resumed the run."""
        return [start["step"] for start in self.starts if start["step"] > 0]

    @property
    def per_weight(self) -> dict[str, dict]:
        """Counts and norms by weight name, from the end record; empty before the end."""
        per_weight = (self.end or {}).get("per_weight")
        return per_weight if isinstance(per_weight, dict) else {}


def load_run(output_dir: Path) -> Run:
    """Read `metrics.jsonl` and, if it is there, `config.yaml`.

    Raises:
        FileNotFoundError: `metrics.jsonl` does not exist.
    """
    path = output_dir / METRICS_FILE
    if not path.is_file():
        raise FileNotFoundError(
            f"{path}: not found. A report needs the {METRICS_FILE} of a run: give the run's output_dir."
        )
    records = [record for record in read_metrics(path) if isinstance(record.get("step"), int)]
    config_path = output_dir / "config.yaml"
    config_text = config_path.read_text(encoding="utf-8", errors="replace") if config_path.is_file() else ""
    try:
        config = yaml.safe_load(config_text)
    except yaml.YAMLError:
        config = None
    times = [record["time"] for record in records if "time" in record]
    return Run(
        name=output_dir.resolve().name,
        config=config if isinstance(config, Mapping) else {},
        config_text=config_text,
        starts=[record for record in records if record["event"] == "start"],
        description=_last(records, "description"),
        steps=_unique(records, "step", "step"),
        reallocations=_unique(records, "reallocation", "number"),
        evaluations=_unique(records, "eval", "step"),
        end=_last(records, "end"),
        wall_seconds=_wall_seconds(records),
        last_time=max(times, default=None),
    )


def overview(run: Run) -> dict[str, str]:
    """Sum up the run for the top of the report: only what it has recorded."""
    active, numel = _entries(run)
    share = f" of {numel:,} ({active / numel:.3%})" if numel else ""
    steps = f"{run.last_step:,}" + (f" of {run.total_steps:,}" if run.total_steps else "")
    times = {1: "once"}.get(len(run.resumed_at), f"{len(run.resumed_at)} times")
    resumed = f" (resumed {times}, at {', '.join(f'{step:,}' for step in run.resumed_at)})" if run.resumed_at else ""
    tokens, seconds = (math.fsum(v for v in run.values(key) if math.isfinite(v)) for key in ("tokens", "seconds"))
    memory = [value for key in run.step_keys("memory_bytes") for value in run.values(key) if math.isfinite(value)]
    rows = {
        "State": _state(run),
        "Base": run.option("model", "base"),
        "Started from": run.option("sparse", "start_from"),
        "Objective": _objective(run),
        "Method": _method(run.option("sparse", "method"), run.option("sparse", "granularity")),
        "Budget": _budget(run),
        "Active entries": f"{active:,}{share}" if active else None,
        "Optimizer steps": steps + resumed,
        "Held-out loss": _before_after(run, "loss", "{:.4f}"),
        "Held-out perplexity": _before_after(run, "perplexity", "{:,.2f}"),
        "Held-out accuracy": _before_after(run, "reward_accuracy", "{:.1%}"),
        "Held-out margin": _before_after(run, "reward_margin", "{:.3f}"),
        "Exact match": _before_after(run, "exact_match", "{:.1%}"),
        "Wall time": duration(run.wall_seconds) if run.wall_seconds else None,
        "Training": f"{tokens:,.0f} tokens, {tokens / seconds:,.0f} tokens/s in steps" if seconds else None,
        "Peak memory": f"{max(memory) / 2**30:,.2f} GiB" if memory else None,
    }
    known = {"event", "step", "time", "per_weight"}
    for key, value in (run.end or {}).items():
        if key not in known and isinstance(value, int | float | str) and not isinstance(value, bool):
            label = key.removesuffix("_bytes").removesuffix("_seconds").replace("_", " ").capitalize()
            rows.setdefault(label, human(key, value))
    return {key: str(value) for key, value in rows.items() if value is not None}


def human(key: str, value: float | str) -> str:
    """Format a recorded number with the unit that its name ends in."""
    if isinstance(value, str):
        return value
    if key.endswith("bytes"):
        return f"{value / 2**30:,.2f} GiB" if value >= 2**30 else f"{value / 2**20:,.2f} MiB"
    if key.endswith("seconds"):
        return duration(value)
    return f"{value:,}" if isinstance(value, int) else f"{value:,.5g}"


def _entries(run: Run) -> tuple[int, int]:
    weights = run.per_weight.values()
    active = sum(int(w.get("active") or 0) for w in weights)
    if not active and run.reallocations:
        active = run.reallocations[-1]["active"]
    return active, sum(int(w.get("numel") or 0) for w in weights)


def _state(run: Run) -> str:
    if run.end is not None:
        return "finished"
    ago = f"; the last record is {duration(max(0.0, time.time() - run.last_time))} old" if run.last_time else ""
    return f"running, or stopped before its end{ago}"


def _objective(run: Run) -> str | None:
    name = run.option("objective", "objective")
    if name in (None, "sft"):
        return None
    adapter = run.option("objective", "reference_adapter")
    beta = run.option("objective", "beta")
    return f"{name}, beta {beta:g}" + (f", reference: base + {adapter}" if adapter else "")


def _method(method: str | None, granularity: str | None) -> str | None:
    names = {
        "ag": "SFT-AG (accumulated gradients)",
        "ma": "SFT-MA (momentum approximation)",
        "static": "static (selected once, then fixed)",
        "random": "random (drawn once from the seed, then fixed)",
        "columns": "whole columns (chosen once, then fixed)",
    }
    if not method:
        return None
    whole = f", whole {granularity}s" if granularity in ("row", "column", "block") and method != "columns" else ""
    return names.get(method, method) + whole


def _budget(run: Run) -> str | None:
    units = {"density": "{:.3%} of each target weight", "tunable_weights": "{:,} entries", "rank_equivalent":
             "as many parameters as LoRA of rank {}"}  # fmt: skip
    for key, text in units.items():
        value = run.option("sparse", key)
        if isinstance(value, int | float):
            return text.format(value)
    return "that of the adapter it started from" if run.option("sparse", "start_from") else None


def _before_after(run: Run, key: str, form: str) -> str | None:
    found = [(record["step"], record[key]) for record in run.evaluations if record.get(key) is not None]
    if not found:
        return None
    (first_step, first), (last_step, last) = found[0], found[-1]
    if len(found) == 1:
        return f"{form.format(first)} (step {first_step:,})"
    return f"{form.format(first)} → {form.format(last)} (step {first_step:,} → {last_step:,})"


def _wall_seconds(records: list[dict]) -> float:
    """Add up the time of each process, from its start (or resume) to its last record."""
    total, started, last = 0.0, None, None
    for record in records:
        if "time" not in record:
            continue
        if record["event"] == "start" or started is None:
            total += last - started if started is not None else 0.0
            started = record["time"]
        last = record["time"]
    return total + (last - started if started is not None else 0.0)


def _unique(records: list[dict], event: str, key: str) -> list[dict]:
    found = {record[key]: record for record in records if record["event"] == event}
    return [found[value] for value in sorted(found)]


def _last(records: list[dict], event: str) -> dict | None:
    return next((record for record in reversed(records) if record["event"] == event), None)


def _number(value: Any) -> float:
    return float(value) if isinstance(value, int | float) else math.nan
