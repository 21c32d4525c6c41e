"""Record each step, reallocation and evaluation: on the console, in `metrics.jsonl` and in a tracker.

This module does not know ranks: the main process makes `Metrics`, every other process makes `NullMetrics`.

`metrics.jsonl` holds one JSON object per line. All have `event`, `step` (optimizer steps done), `time` (unix seconds):

    start         a process began, or resumed, after `step`: total_steps
    description   what will be trained: title, rows, table
    step          loss, grad_norm (means), grad_norm_max, learning_rate, tokens, target_tokens, seconds (sums), steps,
                  tokens_per_second; all over the `steps` optimizer steps since the previous such line; of preferences
                  also reward_chosen, reward_rejected, reward_margin, reward_accuracy, kl_per_token, chosen_nll,
                  length_chosen, length_rejected, tokens_per_example (means)
    reallocation  number, active, replaced, grown, dropped, turnover, cohort_counts, cohort_steps, seconds
    checkpoint    bytes, active, bytes_per_entry, seconds
    eval          loss, perplexity, exact_match, target_tokens, seconds; of preferences the same as a step
    samples       answers: a list of prompt, generated, reference
    end           the summary of the run, e.g. per_weight
"""

import json
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any

from rich.console import Console

from .console import Display, duration
from .metrics_file import METRICS_FILE, discard_after, jsonable, read_metrics

__all__ = ["Metrics", "NullMetrics", "read_metrics"]

_AVERAGED = ("comm_", "reward_", "kl", "chosen_", "length_", "tokens_per_example", "router_loss")
"""Beginnings of names whose values a line holds as means."""
_TRACKED_AS = {"step": "train", "reallocation": "reallocation", "eval": "eval", "end": "end"}


class Metrics(AbstractContextManager):
    """Recorder of one run, on the main process only. Use it as a context manager, or call `close`."""

    def __init__(
        self,
        output_dir: Path,
        *,
        total_steps: int,
        first_step: int = 0,
        log_every_steps: int = 10,
        track: Callable[[dict[str, float | str], int], None] | None = None,
        console: Console | None = None,
        held_out: Sequence[float] = (),
    ) -> None:
        """Open the records of a run.

        Records that a dead run wrote after `first_step` are removed, so that the file never holds a step twice. If a
        new run starts in a folder with records, those move to `metrics.previous.jsonl`.

        Args:
            output_dir: gets `metrics.jsonl`.
            total_steps: optimizer steps of the whole run.
            first_step: optimizer steps done before this process: 0 for a new run, the checkpoint's step on resume.
            held_out: held-out losses measured before this process, in order.
            log_every_steps: how many optimizer steps one line sums up.
            track: (values by name, step) -> None; hands them to a tracker.
            console: where progress is shown; by default standard output.
        """
        if log_every_steps < 1:
            raise ValueError(f"log_every_steps: got {log_every_steps}, expected at least 1")
        output_dir = Path(output_dir)
        output_dir.mkdir(parents=True, exist_ok=True)
        path = output_dir / METRICS_FILE
        discard_after(path, first_step)
        self._file = path.open("a", encoding="utf-8")
        self._display = Display(console or Console(), total_steps=total_steps, first_step=first_step)
        self._track = track
        self._total_steps, self._first_step, self._log_every_steps = total_steps, first_step, log_every_steps
        self._last_step = first_step
        self._last_logged_loss = math.nan
        self._held_out = list(held_out)
        self._window = _Window()
        self._pace = _Pace()
        self._started = time.perf_counter()
        self._write("start", first_step, total_steps=total_steps)

    def describe(self, title: str, rows: Mapping[str, str], table: Sequence[Mapping[str, str]] = ()) -> None:
        """Record what will be trained: key and value pairs, then a table with one row per kind of target module."""
        self._write("description", self._last_step, title=title, rows=dict(rows), table=[dict(row) for row in table])
        self._display.describe(title, rows, table)

    @contextmanager
    def phase(self, label: str) -> Iterator[None]:
        """Show that something slow is running (`loading the base`, `evaluating`), and for how long."""
        with self._display.phase(label):
            yield

    def step(
        self,
        step: int,
        *,
        loss: float,
        learning_rate: float,
        grad_norm: float,
        tokens: int,
        target_tokens: int,
        seconds: float,
        **extra: float,
    ) -> None:
        """Record that optimizer step `step` (1-based) is done; call this for every step.

        A line is written after every `log_every_steps` steps, after the first and after the last. It holds each extra
        value as the maximum since the previous line (`memory_*`), the mean (_AVERAGED), or the last value (others).
        """
        if step <= self._last_step:
            raise ValueError(f"metrics: got step {step} after step {self._last_step}, expected a larger one")
        first = self._last_step == self._first_step
        self._last_step = step
        self._window.add(loss, learning_rate, grad_norm, tokens, target_tokens, seconds, extra)
        seconds_per_step = self._pace.add(step, seconds)
        due = first or step == self._total_steps or step % self._log_every_steps == 0
        self._display.step(
            step,
            loss=loss,
            mean_loss=self._window.mean_loss(),
            learning_rate=learning_rate,
            tokens=tokens,
            seconds=seconds,
            eta_seconds=seconds_per_step * max(0, self._total_steps - step),
            due=due,
        )
        if due:
            self._flush_window()

    def reallocation(
        self,
        step: int,
        *,
        number: int,
        active: int,
        replaced: int,
        grown: int,
        dropped: int,
        seconds: float,
        cohort_counts: list[int],
        cohort_steps: list[int],
        **extra: float,
    ) -> None:
        """Record that reallocation `number` (1-based) is done.

        `cohort_counts[c]` of the active entries were last grown at reallocation c (0: the initial random indices),
        which happened at optimizer step `cohort_steps[c]`.
        """
        turnover = replaced / active if active else 0.0
        self._write(
            "reallocation", step, number=number, active=active, replaced=replaced, grown=grown, dropped=dropped,
            turnover=turnover, seconds=seconds, cohort_counts=cohort_counts, cohort_steps=cohort_steps, **extra,
        )  # fmt: skip
        self._display.reallocation(step, number=number, replaced=replaced, active=active, seconds=seconds)

    def evaluation(
        self,
        step: int,
        *,
        loss: float,
        perplexity: float,
        target_tokens: int,
        seconds: float,
        exact_match: float | None = None,
        **extra: float,
    ) -> None:
        """Record an evaluation after `step` optimizer steps (0: before training); `exact_match` is in [0, 1]."""
        optional = {} if exact_match is None else {"exact_match": exact_match}
        self._write(
            "eval", step, loss=loss, perplexity=perplexity, target_tokens=target_tokens, seconds=seconds,
            **optional, **extra,
        )  # fmt: skip
        self._held_out.append(loss)
        match = "" if exact_match is None else f"  exact match {exact_match:.1%}"
        if "reward_accuracy" in extra:
            match += f"  accuracy {extra['reward_accuracy']:.1%}  margin {extra['reward_margin']:.3f}"
        self._display.line(
            f"step {step}  held-out loss {loss:.4f}  perplexity {perplexity:,.2f}{match}  in {duration(seconds)}",
            style="green",
        )

    def checkpoint(self, step: int, *, bytes: int, active: int, seconds: float) -> None:
        """Record that the state after `step` is on disk, after pending steps: a resumed run begins behind them."""
        self._flush_window()
        per_entry = bytes / active
        self._write("checkpoint", step, bytes=bytes, active=active, bytes_per_entry=per_entry, seconds=seconds)
        size = f"{bytes / 2**20:.1f} MiB, {per_entry:.1f} bytes per active entry"
        self._display.line(f"step {step}  checkpoint saved ({size})  in {duration(seconds)}", style="dim")

    def samples(self, step: int, answers: Sequence[Mapping[str, str]]) -> None:
        """Record generated answers (prompt, generated, reference) after `step` steps; without any, do nothing."""
        if not answers:
            return
        self._write("samples", step, answers=[dict(answer) for answer in answers])
        if self._track is not None:
            write = "prompt: {prompt}\n\ngenerated: {generated}\n\nreference: {reference}".format
            self._track({f"samples/{n}": write(**answer) for n, answer in enumerate(answers, start=1)}, step)

    def summary(self, **fields: Any) -> None:
        """Record the end of the run.

        The report reads `per_weight`, {name: {active, numel, cohort_counts, l2_delta, max_abs_delta}}, and shows every
        plain number.
        """
        self._flush_window()
        self._write("end", self._last_step, **fields)
        steps = self._last_step - self._first_step
        held_out = [f"{loss:.4f}" for loss in ([self._held_out[0], self._held_out[-1]] if self._held_out else [])]
        parts = [f"done: {steps:,} steps in {duration(time.perf_counter() - self._started)}"]
        parts += [f"loss {self._last_logged_loss:.3f}"] if steps else []
        parts += [f"held-out loss {' -> '.join(dict.fromkeys(held_out))}"] if held_out else []
        self._display.stop()
        self._display.line("  ".join(parts), style="bold")

    def note(self, message: str) -> None:
        """Print one line on the console, without recording it."""
        self._display.line(message)

    def close(self) -> None:
        """Write what is pending, stop the progress bar, close the file. A second call does nothing."""
        self._display.stop()
        if not self._file.closed:
            self._flush_window()
            self._file.close()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _flush_window(self) -> None:
        if self._window.steps:
            self._last_logged_loss = self._window.mean_loss()
            self._write("step", self._last_step, **self._window.fields())
            self._window = _Window()

    def _write(self, event: str, step: int, **fields: Any) -> None:
        record = jsonable({"event": event, "step": step, "time": round(time.time(), 3), **fields})
        self._file.write(json.dumps(record, allow_nan=False, ensure_ascii=False) + "\n")
        self._file.flush()
        if self._track is not None and event in _TRACKED_AS:
            values = {key: value for key, value in record.items() if key not in ("event", "step", "time")}
            numbers = {key: float(value) for key, value in values.items() if type(value) in (int, float)}
            if numbers:
                self._track({f"{_TRACKED_AS[event]}/{key}": value for key, value in numbers.items()}, step)


class NullMetrics(AbstractContextManager):
    """Stand-in for `Metrics` on every process but the main one: the same methods, without effect."""

    def describe(self, title: str, rows: Mapping[str, str], table: Sequence[Mapping[str, str]] = ()) -> None:
        pass

    @contextmanager
    def phase(self, label: str) -> Iterator[None]:
        yield

    def step(self, step: int, **values: float) -> None:
        pass

    def reallocation(self, step: int, **values: Any) -> None:
        pass

    def evaluation(self, step: int, **values: Any) -> None:
        pass

    def checkpoint(self, step: int, **values: Any) -> None:
        pass

    def samples(self, step: int, answers: Sequence[Mapping[str, str]]) -> None:
        pass

    def summary(self, **fields: Any) -> None:
        pass

    def note(self, message: str) -> None:
        pass

    def close(self) -> None:
        pass

    def __exit__(self, *exception: object) -> None:
        pass


@dataclass
class _Window:
    """Sums over the optimizer steps since the previous line."""

    steps: int = 0
    loss_sum: float = 0.0
    grad_norm_sum: float = 0.0
    grad_norm_max: float = 0.0
    learning_rate: float = 0.0
    tokens: int = 0
    target_tokens: int = 0
    seconds: float = 0.0
    extra: dict[str, list[float | int]] = field(default_factory=dict)

    def add(
        self, loss: float, learning_rate: float, grad_norm: float, tokens: int, target_tokens: int, seconds: float,
        extra: Mapping[str, float | int],
    ) -> None:  # fmt: skip
        self.steps += 1
        self.loss_sum += loss
        self.grad_norm_sum += grad_norm
        norms = (grad_norm, self.grad_norm_max)
        self.grad_norm_max = math.nan if any(map(math.isnan, norms)) else max(norms)
        self.learning_rate = learning_rate
        self.tokens += tokens
        self.target_tokens += target_tokens
        self.seconds += seconds
        for key, value in extra.items():
            self.extra.setdefault(key, []).append(value)

    def mean_loss(self) -> float:
        return self.loss_sum / self.steps

    def fields(self) -> dict[str, float | int]:
        extra = {}
        for key, values in self.extra.items():
            if key.startswith("memory"):
                extra[key] = max(values)
            elif key.startswith(_AVERAGED):
                extra[key] = sum(values) / len(values)
            else:
                extra[key] = values[-1]
        return {
            "loss": self.mean_loss(),
            "learning_rate": self.learning_rate,
            "grad_norm": self.grad_norm_sum / self.steps,
            "grad_norm_max": self.grad_norm_max,
            "tokens": self.tokens,
            "target_tokens": self.target_tokens,
            "seconds": self.seconds,
            "steps": self.steps,
            "tokens_per_second": self.tokens / self.seconds if self.seconds > 0 else 0.0,
            **extra,
        }


@dataclass
class _Pace:
    """Wall-clock seconds per step, including evaluations and checkpoints, without the slow first step."""

    first_step: int | None = None
    first_at: float = 0.0

    def add(self, step: int, seconds: float) -> float:
        if self.first_step is None:
            self.first_step, self.first_at = step, time.perf_counter()
            return seconds
        return (time.perf_counter() - self.first_at) / (step - self.first_step)
