"""Show a run while it is going: a live progress bar on a terminal, plain lines in a log file."""

import time
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

from rich.console import Console, Group
from rich.live import Live
from rich.panel import Panel
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.rule import Rule
from rich.table import Column, Table
from rich.text import Text

_LOSS_SMOOTHING = 0.9  # of the loss next to the bar, per step
_SHORTEST_BAR = 10
_THROUGHPUT_STEPS = 20  # tokens per second next to the bar are those of the last steps
_WORTH_A_LINE_SECONDS = 2.0  # a plain log says when a phase ends if it took at least this long


def duration(seconds: float) -> str:
    """Format seconds as `0.21 s`, `0:12`, `1:02:03` or `2 d 01:02:03`."""
    if seconds < 10:
        return f"{seconds:.2f} s"
    minutes, second = divmod(round(seconds), 60)
    hours, minute = divmod(minutes, 60)
    days, hour = divmod(hours, 24)
    if days:
        return f"{days} d {hour:02}:{minute:02}:{second:02}"
    return f"{hour}:{minute:02}:{second:02}" if hour else f"{minute}:{second:02}"


def countdown(seconds: float) -> str:
    """Format as `duration` does, in whole seconds: `0:09`."""
    return f"0:{round(seconds):02}" if seconds < 10 else duration(seconds)


class Display:
    """Console of one run."""

    def __init__(self, console: Console, *, total_steps: int, first_step: int) -> None:
        self._console = console
        self._is_live = console.is_interactive  # not a file, a pipe or a dumb terminal: no control codes there
        self._total_steps = total_steps
        self._turnover: float | None = None  # fraction replaced by the last reallocation
        self._smoothed_loss = _Smoothed(_LOSS_SMOOTHING)
        self._recent: deque[tuple[int, float]] = deque(maxlen=_THROUGHPUT_STEPS)  # tokens, seconds
        self._window: list[tuple[int, float]] = []  # the same, since the last plain line
        self._live: Live | None = None
        self._phases = Progress(
            SpinnerColumn(), TextColumn("{task.description} ..."), TimeElapsedColumn(), console=console
        )
        self._bar = Progress(
            TextColumn("step {task.completed}/{task.total}", table_column=Column(no_wrap=True)),
            BarColumn(bar_width=None),
            TextColumn("{task.fields[status]}", table_column=Column(no_wrap=True)),
            console=console,
            expand=True,
        )
        self._task = self._bar.add_task("step", total=total_steps, completed=first_step, visible=False, status=Text(""))

    def reallocation(self, step: int, *, number: int, replaced: int, active: int, seconds: float) -> None:
        """Print a line about a reallocation; its turnover stays next to the bar until the following one."""
        self._turnover = replaced / active if active else 0.0
        self.line(
            f"step {step}  reallocation {number}  replaced {replaced:,} of {active:,} ({self._turnover:.1%})"
            f"  in {duration(seconds)}",
            style="cyan",
        )

    def describe(self, title: str, rows: Mapping[str, str], table: Sequence[Mapping[str, str]]) -> None:
        if self._is_live:
            grid = Table.grid(padding=(0, 2))
            grid.add_column(style="cyan", no_wrap=True)
            grid.add_column(overflow="fold")
            for key, value in rows.items():
                grid.add_row(Text(key), Text(str(value)))
            parts = [grid, Rule(style="dim"), _rich_table(table)] if table else [grid]
            self._console.print(Panel(Group(*parts), title=Text(title), title_align="left", expand=False))
            return
        width = max((len(key) for key in rows), default=0)
        self.line(title)
        for key, value in rows.items():
            self.line(f"  {key:<{width}}  {value}")
        for text in _plain_table(table):
            self.line(f"  {text}".rstrip())

    @contextmanager
    def phase(self, label: str) -> Iterator[None]:
        started = time.perf_counter()
        if not self._is_live:
            self.line(f"{label} ...")
            yield
            seconds = time.perf_counter() - started
            if seconds >= _WORTH_A_LINE_SECONDS:
                self.line(f"{label}: done in {duration(seconds)}")
            return
        task = self._phases.add_task(label, total=None)
        self._show()
        try:
            yield
        finally:
            self._phases.remove_task(task)
            if not self._phases.tasks and not self._bar.tasks[self._task].visible:
                self.stop()

    def step(
        self, step: int, *, loss: float, mean_loss: float, learning_rate: float, tokens: int, seconds: float,
        eta_seconds: float, due: bool,
    ) -> None:  # fmt: skip
        """Show a step: on the bar with a smoothed loss; or, if `due`, as a line with `mean_loss` since the previous."""
        smoothed = self._smoothed_loss.add(loss)
        self._recent.append((tokens, seconds))
        self._window.append((tokens, seconds))
        if self._is_live:
            free = self._console.width - 2 * len(str(self._total_steps)) - len("step /  ") - _SHORTEST_BAR
            status = self._status(smoothed, learning_rate, self._recent, eta_seconds)
            for least in ("lr ", "turnover ", "loss "):  # given up first on a narrow terminal
                if len("  ".join(status)) > free:
                    status = [part for part in status if not part.startswith(least)]
            self._bar.update(self._task, completed=step, visible=True, status=Text("  ".join(status), no_wrap=True))
            self._show()
        elif due:
            status = self._status(mean_loss, learning_rate, self._window, eta_seconds)
            self.line("  ".join([f"step {step}/{self._total_steps}", *status]))
        if due:
            self._window.clear()

    def line(self, text: str, style: str = "") -> None:
        """Print one line, above the bar if there is one; never wrapped, so that a log can be searched."""
        self._console.print(Text(text, style=style), soft_wrap=True)

    def stop(self) -> None:
        if self._live is not None:
            self._live.stop()
            self._live = None

    def _show(self) -> None:
        if self._live is None:
            self._live = Live(Group(self._phases, self._bar), console=self._console, refresh_per_second=5)
            self._live.start(refresh=True)

    def _status(
        self, loss: float, learning_rate: float, recent: Sequence[tuple[int, float]], eta_seconds: float
    ) -> list[str]:
        tokens, seconds = (sum(column) for column in zip(*recent, strict=True))
        status = [f"loss {loss:.3f}", f"lr {learning_rate:.1e}", f"{tokens / max(seconds, 1e-9):,.0f} tok/s"]
        if self._turnover is not None:
            status.append(f"turnover {self._turnover:.1%}")
        return [*status, f"eta {countdown(eta_seconds)}"]


class _Smoothed:
    """Exponential mean, corrected for its start; a value that is not finite is shown once and then forgotten."""

    def __init__(self, keep: float) -> None:
        self._keep, self._sum, self._weight = keep, 0.0, 0.0

    def add(self, value: float) -> float:
        if value - value != 0:  # NaN or infinite
            return value
        self._sum = self._keep * self._sum + (1 - self._keep) * value
        self._weight = self._keep * self._weight + (1 - self._keep)
        return self._sum / self._weight


def _columns(table: Sequence[Mapping[str, str]]) -> dict[str, bool]:
    """Find the columns in order of appearance, and whether all cells start with a digit (then aligned right)."""
    names = dict.fromkeys(name for row in table for name in row)
    return {name: all(str(row.get(name, "0"))[:1].isdigit() for row in table) for name in names}


def _rich_table(table: Sequence[Mapping[str, str]]) -> Table:
    result = Table(box=None, pad_edge=False, header_style="cyan")
    columns = _columns(table)
    for name, is_number in columns.items():
        result.add_column(name, justify="right" if is_number else "left", no_wrap=True)
    for row in table:
        result.add_row(*(Text(str(row.get(name, ""))) for name in columns))
    return result


def _plain_table(table: Sequence[Mapping[str, str]]) -> list[str]:
    columns = _columns(table)
    rows = [list(columns)] + [[str(row.get(name, "")) for name in columns] for row in table]
    widths = [max(len(row[i]) for row in rows) for i in range(len(columns))]
    right = list(columns.values())
    return [
        "  ".join(f"{cell:>{w}}" if r else f"{cell:<{w}}" for cell, w, r in zip(row, widths, right, strict=True))
        for row in rows
        if row
    ]
