"""Race one optimizer step of each contestant, in turns, round after round: `scale-sft bench step`.

In a round each contestant makes one step, in a new random order; comparisons are always between two steps of one round.
So other work on the machine slows both sides of a ratio, and the median over rounds discards the worst of it.
"""

from __future__ import annotations

import gc
import random
import statistics
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from logging import ERROR, getLogger
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import torch
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from scale_sft.bench.contestants import CONTESTANTS, Contestant, impossible
from scale_sft.bench.device import this_device
from scale_sft.bench.rows import Results
from scale_sft.bench.workload import Base, Batches, Case
from scale_sft.config.spelling import unknown
from scale_sft.errors import UserError, first_line

from .breakdown import breakdown, synchronize
from .page import PEERS, breakdown_table, describe, part, table_of

__all__ = ["part", "run"]

BREAKDOWN_STEPS = 5  # plain steps of the breakdown, for their median
_SHARE_OF_FREE = 0.7  # fraction of the free memory for contestants that stay


@dataclass(frozen=True, kw_only=True)
class Effort:
    """The length and the manner of a measurement."""

    rounds: int = 6
    warm_up_steps: int = 1
    breakdown: bool = True
    together: bool | None = None  # keep all contestants in memory; None: if they fit


def run(
    cases: Sequence[Case],
    names: Sequence[str] | None,
    effort: Effort,
    output: Path,
    console: Console,
    kind: type[Race] | None = None,
) -> list[dict[str, Any]]:
    """Measure the contestants `names` (None: all that a case permits) in each case; returns the rows added to `output`.

    Args:
        kind: of race; None: on sequences.

    Raises:
        UserError: a contestant is unknown, impossible in every case, or needs a missing library; or a base does not
            load.
        KeyboardInterrupt: after the rows of all finished rounds have been added.
    """
    device, kind = this_device(), kind or Race
    line_ups = [_line_up(kind, case, names) for case in cases]
    _refuse_empty(kind, cases, names, line_ups)
    bases = [Base(case, device) for case in cases]  # checks every case before the first measurement
    results, rows = Results(output, kind.benchmark), []
    for base, chosen in zip(bases, line_ups, strict=True):
        left_out = {name: why for name in names or kind.contestants if (why := kind.impossible(name, base.case))}
        console.print(f"{describe(base.case.settings())}: {len(chosen)} contestants, rounds: {effort.rounds}")
        for name, why in left_out.items():
            console.print(f"  without {name}: {why}", markup=False)
        race = kind(base, chosen, effort)
        try:
            race.run(console)
        except KeyboardInterrupt:
            rows += _add(race, results, console)
            raise
        except torch.OutOfMemoryError as error:
            raise UserError(
                f"bench: out of memory in {describe(base.case.settings())}: {first_line(error)} Take "
                "--one-by-one, fewer --contestants, or a smaller --micro_batch_size or --max_length"
            ) from None
        rows += _add(race, results, console)
    return rows


def _line_up(kind: type[Race], case: Case, names: Sequence[str] | None) -> list[str]:
    """List the participants of a case, in the order of the contestants."""
    every = kind.contestants
    for name in names or ():
        if name not in every:
            raise UserError(f"contestants: {unknown(f'contestant {name!r}', name, every)}")
    return [name for name in every if (not names or name in names) and kind.impossible(name, case) is None]


def _refuse_empty(
    kind: type[Race], cases: Sequence[Case], names: Sequence[str] | None, line_ups: list[list[str]]
) -> None:
    for name in names or ():
        if not any(name in chosen for chosen in line_ups):
            raise UserError(
                f"contestants: {name} takes part in no case: {kind.impossible(name, cases[0])}. Fix: leave it out"
            )
    for case, chosen in zip(cases, line_ups, strict=True):
        if not chosen:
            raise UserError(
                f"contestants: none of these can take part in {describe(case.settings())}. Fix: name others"
            )


class Times(NamedTuple):
    """The times of one step, in seconds."""

    wall: float
    cpu: float  # processor time of all threads of this process


class Race:
    """All rounds of one case: the participants, and the times of their steps.

    Args:
        base: the model that all start from.
        names: keys of `contestants`.
    """

    benchmark: ClassVar[str] = "step"
    """The file of its rows."""
    contestants: ClassVar[Mapping[str, Callable[..., Contestant]]] = CONTESTANTS
    peers: ClassVar[tuple[str, ...]] = PEERS
    """Those that all are compared with."""
    impossible = staticmethod(impossible)

    def __init__(self, base: Base, names: Sequence[str], effort: Effort):
        self.base, self.names, self.effort = base, list(names), effort
        self.batches = self.make_batches()
        self.together = fits_together(base, names) if effort.together is None else effort.together
        self.trainable: dict[str, int] = {}
        self.breakdowns: dict[str, dict[str, Any]] = {}
        self.rounds: list[dict[str, Times]] = []  # those that all participants have finished
        self._ready: dict[str, Contestant] = {}

    def make_batches(self) -> Any:
        """Make the micro-batches of all contestants."""
        return Batches(self.base.case, self.base.model_config.vocab_size, self.base.device)

    def make(self, name: str) -> Contestant:
        """Make a contestant from the base."""
        return self.contestants[name](self.base)

    def settings(self) -> dict[str, Any]:
        """Return the settings of the case, for its rows."""
        return self.base.case.settings()

    def after_rounds(self) -> None:
        """Measure what else is asked for while the contestants are ready."""

    def show(self, rows: Sequence[dict[str, Any]], console: Console) -> None:
        """Print the rows of the case."""
        show(rows, console)

    def run(self, console: Console) -> None:
        """Run all rounds, then the breakdown of our own steps."""
        progress = Progress(console=console, transient=True, disable=not console.is_interactive)
        with progress, undisturbed():
            task = progress.add_task("warming up", total=self.effort.rounds)
            self.prepare()
            for number in range(self.effort.rounds):
                began = time.perf_counter()
                progress.update(task, description=f"round {number + 1} of {self.effort.rounds}")
                self.round(number)
                progress.advance(task)
                if not console.is_interactive:
                    took = time.perf_counter() - began
                    console.print(f"  round {number + 1} of {self.effort.rounds}: {took:.1f} s")
            self.after_rounds()
            self._ready = {}
            if self.effort.breakdown:
                for name in (name for name in self.names if name.startswith("ours-")):
                    progress.update(task, description=f"breakdown of {name}")
                    method = name.removeprefix("ours-")
                    self.breakdowns[name] = breakdown(self.base, method, self.batches, BREAKDOWN_STEPS)

    def prepare(self) -> None:
        """Make and warm up all contestants, if all of them stay in memory."""
        if self.together:
            self._ready = {name: self._prepare(name) for name in self.names}

    def ready(self, name: str) -> Contestant:
        """Return a contestant that is warmed up; it is made again unless all stay in memory."""
        return self._ready.get(name) or self._prepare(name)

    def _prepare(self, name: str) -> Contestant:
        contestant = self.make(name)
        self.trainable[name] = contestant.trainable
        contestant.warm_up(self.batches)
        for number in range(self.effort.warm_up_steps):
            contestant.step(self.batches, number)
        return contestant

    def round(self, number: int) -> None:
        """Time one step of each; the round counts only if all have finished it."""
        order = list(self.names)
        random.Random(f"{self.base.case.seed} {number}").shuffle(order)
        found = {}
        for name in order:
            contestant = self.ready(name)
            found[name] = timed_step(contestant, self.batches, number, self.base.device)
            del contestant
            if not self.together:
                gc.collect()
        self.rounds.append(found)

    def result(self, name: str) -> dict[str, Any]:
        """Return the result of one contestant, for its row."""
        seconds = [found[name].wall for found in self.rounds]
        result = {
            "trainable": self.trainable[name],
            "median_seconds": statistics.median(seconds),
            "quartiles_seconds": quartiles(seconds),
            "tokens_per_second": self.base.case.length * self.base.case.micro_batch / statistics.median(seconds),
            "relative": {peer: self.relative(name, peer) for peer in self.peers if peer in self.names},
            "seconds": seconds,
            "cpu_seconds": [found[name].cpu for found in self.rounds],
        }
        return result | ({"breakdown": self.breakdowns[name]} if name in self.breakdowns else {})

    def relative(self, name: str, peer: str) -> dict[str, Any]:
        """Compare a contestant's step with a peer's in the same round: median and quartiles of the ratio of times."""
        ratios = [found[name].wall / found[peer].wall for found in self.rounds]
        return {"median": statistics.median(ratios), "quartiles": quartiles(ratios)}


def quartiles(values: Sequence[float]) -> list[float]:
    """Compute the first and third quartile; of a single value, that value twice."""
    if len(values) == 1:
        return [values[0], values[0]]
    first, _, third = statistics.quantiles(values, n=4, method="inclusive")
    return [first, third]


def timed_step(contestant: Contestant, batches: Batches, number: int, device: torch.device) -> Times:
    """Time one whole step on micro-batch `number`, until the device has finished."""
    synchronize(device)
    wall, cpu = time.perf_counter(), time.process_time()
    contestant.step(batches, number)
    synchronize(device)
    return Times(time.perf_counter() - wall, time.process_time() - cpu)


@contextmanager
def undisturbed() -> Iterator[None]:
    """Turn off garbage collection in timed steps, and libraries' deprecation warnings about each other."""
    enabled = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", module="peft|transformers")
            getLogger("bitsandbytes.backends.cpu.ops").setLevel(ERROR)  # it recommends a kernel that is not used here
            yield
    finally:
        if enabled:
            gc.enable()


def fits_together(base: Base, names: Sequence[str]) -> bool:
    """Return True if all contestants can stay in memory, so that none has to be made again in each round.

    The estimate counts the weights of each, the state of dense fine-tuning, and 32 bytes per trained entry of others.
    """
    if base.device.type == "cuda":
        free = torch.cuda.mem_get_info(base.device)[0]
    else:
        import psutil

        free = psutil.virtual_memory().available
    dense = sum(o * i for o, i in base.shapes.values()) * base.dtype.itemsize
    added = {"frozen": 0, "full": dense, "full-adamw": 3 * dense}
    entries = base.lora_rank * sum(o + i for o, i in base.shapes.values())
    return sum(base.bytes + added.get(name, 32 * entries) for name in names) < _SHARE_OF_FREE * free


def _add(race: Race, results: Results, console: Console) -> list[dict[str, Any]]:
    """Add the rows of finished rounds, if any, and print their table."""
    if not race.rounds:
        return []
    shared = race.settings() | {
        "device": race.base.device.type,
        "threads": torch.get_num_threads(),
        "rounds": len(race.rounds),
        "together": race.together,
    }
    rows = [results.add({**shared, "contestant": name}, **race.result(name)) for name in race.names]
    race.show(rows, console)
    return rows


def show(rows: Sequence[dict[str, Any]], console: Console) -> None:
    """Print the rows of one case as a table, and the breakdown of our own steps as another."""
    columns, lines = table_of(rows)
    console.print(rich_table(columns, lines))
    own = [row for row in rows if "breakdown" in row["result"]]
    if own:
        console.print(rich_table(*breakdown_table(own)))


def rich_table(columns: Sequence[str], lines: Sequence[Sequence[str]]) -> Table:
    """Make a table for the console; all columns but the first are right-aligned."""
    table = Table(*columns, show_edge=False)
    for column in table.columns[1:]:
        column.justify = "right"
    for line in lines:
        table.add_row(*line)
    return table


def cases_of(
    *,
    base: str | None,
    dtypes: Sequence[str],
    quantizations: Sequence[str],
    lengths: Sequence[int],
    micro_batches: Sequence[int],
    **shared: Any,
) -> list[Case]:
    """List every combination of the requested settings."""
    return [
        Case(base=base, dtype=dtype, quantization=quantization, length=length, micro_batch=micro_batch, **shared)
        for dtype in dtypes
        for quantization in quantizations
        for length in lengths
        for micro_batch in micro_batches
    ]
