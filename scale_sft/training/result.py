"""The result of a finished run, for Python callers."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from scale_sft.evaluation.held_out import Evaluation
from scale_sft.objective.rewards import rewards_of
from scale_sft.reporting.metrics_file import METRICS_FILE, read_metrics

from .run_folder import RunFolder
from .session import Session


@dataclass(frozen=True)
class RunResult:
    """The files of a run and how well it did; the same on every rank."""

    output_dir: Path
    adapter: Path  # folder of the indices and deltas
    steps: int  # optimizer steps done; fewer than asked for where the run stopped early
    before: Evaluation | None  # held-out results of the base, or of base + adapter with start_from; None: no eval_data
    after: Evaluation | None  # of the tuned model
    merged: Path | None  # folder of the merged model, with save_merged

    @classmethod
    def of(cls, session: Session, run: RunFolder) -> RunResult:
        """Describe a session that is done."""
        return cls(
            output_dir=run.path,
            adapter=run.adapter,
            steps=session.step,
            before=session.evaluations.get(0),
            after=session.evaluations.get(session.step),
            merged=run.merged if session.inputs.config.run.save_merged else None,
        )

    @classmethod
    def read(cls, run: RunFolder, *, save_merged: bool) -> RunResult:
        """Describe a finished run by its files alone."""
        records = list(read_metrics(run.path / METRICS_FILE))
        steps = next(record["step"] for record in reversed(records) if record["event"] == "end")
        held_out = {
            record["step"]: Evaluation(
                record["loss"], record["target_tokens"], record.get("exact_match"), rewards_of(record)
            )
            for record in records
            if record["event"] == "eval"
        }
        return cls(
            output_dir=run.path,
            adapter=run.adapter,
            steps=steps,
            before=held_out.get(0),
            after=held_out.get(steps),
            merged=run.merged if save_merged else None,
        )

    @property
    def metrics(self) -> list[dict[str, Any]]:
        """The records of metrics.jsonl: one per logged step, reallocation and evaluation, each with its `event`."""
        return list(read_metrics(self.output_dir / METRICS_FILE))
