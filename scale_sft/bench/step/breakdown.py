"""Break down the time of our own step, in a separate pass with a clock around each piece of the real code path.

The clock wraps functions where they are defined, during the pass only; the trainer does not know of it. Each piece is
timed exclusively: nested pieces do not count twice. On a GPU every piece starts and ends with a synchronisation, so
that pieces add up, and the whole is somewhat slower than a step that overlaps them.
"""

from __future__ import annotations

import statistics
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from functools import wraps
from typing import Any, Protocol
from unittest.mock import patch

import torch
from torch.overrides import TorchFunctionMode

from scale_sft.bench import contestants
from scale_sft.bench.contestants import Sparse
from scale_sft.bench.workload import Base, Batches
from scale_sft.kernels.cpu.sampled_columns import SampledColumns
from scale_sft.model.group import OneProcess
from scale_sft.model.resident import ResidentDeltas
from scale_sft.model.sparse_optimizer import SparseOptimizer
from scale_sft.model.transient import TransientDeltas
from scale_sft.spiel.algorithm import SparseFineTuning
from scale_sft.spiel.recorder import GradientRecorder
from scale_sft.spiel.taps import WeightTap

DW, GATHER, ALL_REDUCE, OTHER = "dW", "gather", "all-reduce", "other"
OF_REALLOCATION = ("estimate", "propose", "reallocate")
"""Pieces that estimation phases and reallocations add to a plain step."""

_PIECES: tuple[tuple[Any, str, str], ...] = (
    (Batches, "take", "data"),
    (contestants, "forward", "forward"),
    (contestants, "backward", "rest of backward"),
    (WeightTap, "input_gradient", "dX"),
    (TransientDeltas, "effective_weight", "dequantise"),
    (GradientRecorder, "begin_step", GATHER),
    (GradientRecorder, "record_product", GATHER),
    (SampledColumns, "__call__", DW),
    (OneProcess, "sum_", ALL_REDUCE),
    (SparseFineTuning, "clip", "optimizer"),
    (SparseOptimizer, "update", "optimizer"),
    (ResidentDeltas, "write", "write"),
    (GradientRecorder, "end_step", "estimate"),
    (OneProcess, "select_candidates", "propose"),
    (SparseFineTuning, "reallocate", "reallocate"),
)
"""Owner, name of a function there and in its subclasses, and the piece that its time belongs to.

dW: products of the backward pass, full or of sampled columns. Gather: picking entries out of full products.
"""

PIECES = (
    "data", "forward", "dX", DW, GATHER, "rest of backward", "dequantise", ALL_REDUCE, "optimizer", "write", OTHER,
)  # fmt: skip
"""Pieces of a plain step, in the order of the table."""


class Watch(Protocol):
    """What watches the pieces of a step."""

    def piece(self, name: str) -> AbstractContextManager[None]:
        """Watch the block as `name`."""


class Stopwatch:
    """Exclusive seconds by piece: while a piece runs inside another, only the inner one's clock runs."""

    def __init__(self, device: torch.device):
        self.device = device
        self.seconds: Counter[str] = Counter()
        self._running: list[str] = []
        self._since = 0.0

    @contextmanager
    def piece(self, name: str) -> Iterator[None]:
        """Time the block as `name`."""
        self._turn()
        self._running.append(name)
        try:
            yield
        finally:
            self._turn()
            self._running.pop()

    def take(self) -> Counter[str]:
        """Take the times since the last call."""
        found, self.seconds = self.seconds, Counter()
        return found

    def _turn(self) -> None:
        """Add the time since the last turn to the innermost piece."""
        synchronize(self.device)
        now = time.perf_counter()
        if self._running:
            self.seconds.update({self._running[-1]: now - self._since})
        self._since = now


def synchronize(device: torch.device) -> None:
    """Wait until a GPU has done all queued work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


@contextmanager
def instrumented(watch: Watch) -> Iterator[None]:
    """Watch every piece inside the block, whoever calls it; trainers must be made inside it too."""
    with ExitStack() as undo:
        for owner, name, piece in _PIECES:
            for definer in _definers(owner, name):
                # patch.object also takes an inherited function off again
                undo.enter_context(patch.object(definer, name, _timed(getattr(definer, name), watch, piece)))
        yield


def _definers(owner: Any, name: str) -> Iterator[Any]:
    """Yield an owner, and the subclasses of it that have a function of this name of their own."""
    yield owner
    subclasses: list[type] = owner.__subclasses__() if isinstance(owner, type) else []
    for subclass in subclasses:
        yield from (found for found in _definers(subclass, name) if name in vars(found))


def _timed(function: Callable, watch: Watch, piece: str) -> Callable:
    # Inside dW the gather's mode would cost time without effect.
    around = {GATHER: lambda: _Products(watch), DW: torch._C.DisableTorchFunction}.get(piece, nullcontext)

    @wraps(function)
    def run(*arguments: Any, **named: Any) -> Any:
        with watch.piece(piece), around():
            return function(*arguments, **named)

    return run


class _Products(TorchFunctionMode):
    """A mode that counts torch's matrix products, which are full ones, as dW and not as the gather around them."""

    def __init__(self, watch: Watch):
        super().__init__()
        self.watch = watch

    def __torch_function__(self, function: Callable, types: Any, arguments: Any = (), named: Any = None) -> Any:
        product = getattr(function, "__name__", "") in ("matmul", "__matmul__", "mm")
        with self.watch.piece(DW) if product else nullcontext():
            return function(*arguments, **(named or {}))


def breakdown(base: Base, method: str, batches: Batches, steps: int) -> dict[str, Any]:
    """Time the pieces of a plain step, and the cost of a reallocation over its interval.

    Args:
        steps: plain steps; the median of each piece counts.

    Returns:
        `pieces` by name and their sum `seconds`; `reallocation`: seconds of one interval: `propose` (the extra work of
        the proposing step, such as the full product), `estimate` (that of the other steps of the phase) and
        `reallocate` (drop and grow); `seconds_per_step`, spread over the interval, and its `fraction` of a plain step.
    """
    watch = Stopwatch(base.device)
    with instrumented(watch):
        trainer = Sparse(base, method)
        trainer.warm_up(batches)
        schedule = trainer.tuning.schedule
        interval, estimation = schedule.update_interval_steps, schedule.estimation_steps
        timed = lambda step, number: _timed_step(watch, trainer, step, batches, number)
        timed(trainer.plain_step, 0)
        plain = [timed(trainer.plain_step, number) for number in range(1, steps + 1)]
        around = [timed(interval + 1 + number, number) for number in range(estimation)]
    pieces = {name: statistics.median(step[name] for step in plain) for name in PIECES}
    extra = {name: sum(step[name] for step in around) for name in OF_REALLOCATION}
    if extra["propose"]:
        more = lambda some: sum(max(0.0, sum(step[name] - pieces[name] for step in some)) for name in (DW, GATHER))
        extra["propose"] += more(around[:1])
        extra["estimate"] += more(around[1:])
    pieces = {name: seconds for name, seconds in pieces.items() if seconds or name == ALL_REDUCE}
    total, per_step = sum(pieces.values()), sum(extra.values()) / interval
    return {
        "pieces": pieces,
        "seconds": total,
        "reallocation": extra | {"seconds_per_step": per_step, "fraction": per_step / total},
        "interval_steps": interval,
    }


def _timed_step(watch: Stopwatch, trainer: Sparse, step: int, batches: Batches, number: int) -> Counter[str]:
    watch.take()
    with watch.piece(OTHER):
        trainer.step_at(step, batches, number)
    return watch.take()
