"""Run sections one after the other within a budget of time, each in its own process, and keep every row at once."""

from __future__ import annotations

import os
import signal
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from multiprocessing import get_context
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from typing import Any

from scale_sft.bench.rows import Results, Row

from . import child
from .lab import Sizes
from .sections import Section

SLACK = 2.0
"""A section may take this many times its estimate, if the budget allows."""

_PATIENCE_SECONDS = 5.0
_PRELOAD = [f"{__package__}.preload"]


class Campaign:
    """A run of sections. A crash, a hang or a lack of memory in one costs that section only.

    Args:
        results: receives the rows.
        budget: seconds for all of it; a section that needs more than is left is skipped.
        on_gpu: False: on the CPU.
    """

    def __init__(self, results: Results, sizes: Sizes, *, budget: float, on_gpu: bool):
        self.results, self.sizes, self.budget, self.on_gpu = results, sizes, budget, on_gpu
        self.failed: list[str] = []
        self._machine: dict[str, Any] | None = None  # this process never touches the GPU
        self._began = time.monotonic()

    @property
    def left(self) -> float:
        """Seconds that are left."""
        return self.budget - (time.monotonic() - self._began)

    def run(self, sections: Sequence[Section]) -> Iterator[Row]:
        """Yield each row as soon as it is measured and stored."""
        with tempfile.TemporaryDirectory(prefix="scale-sft-gpu-", ignore_cleanup_errors=True) as scratch:
            order = child.Order(self.sizes, scratch, self.on_gpu)
            processes: list[_Process] = []  # this section's, and the next, which imports while this one measures
            try:
                for place, section in enumerate(sections):
                    processes += [_Process(one, order) for one in sections[place + len(processes) : place + 2]]
                    yield from self._measured(section, processes[0])
                    processes.pop(0).end()
            finally:
                for process in processes:
                    process.end()

    def _measured(self, section: Section, process: _Process) -> Iterator[Row]:
        needs = 0 if self.sizes.tiny else section.seconds
        if self.left <= needs:
            reason = f"it needs {needs:.0f} s, and {max(0, self.left):.0f} s are left"
            yield self._row(section, "", {"skipped": reason})
            return
        with suppress(OSError):  # it has ended already, which `receive` reports
            process.connection.send(child.BEGIN)
        yield from self._rows(section, process)

    def _rows(self, section: Section, process: _Process) -> Iterator[Row]:
        began = time.monotonic()
        limit = min(SLACK * section.seconds, self.left)
        while True:
            kind, what, figures = process.receive(began + limit - time.monotonic(), limit)
            if kind == "machine":
                self._machine = figures
                continue
            if kind == child.FAILED:
                self.failed.append(section.name)
            if kind == child.DONE:
                what, figures = "", {"took_seconds": round(time.monotonic() - began, 1)}
            yield self._row(section, what, figures)
            if kind != child.ROW:
                return

    def _row(self, section: Section, what: str, figures: dict[str, Any]) -> Row:
        facts = {"device": "cpu" if section.on_cpu or not self.on_gpu else "cuda"}
        settings = {"section": section.name, "what": what, **facts, "sizes": vars(self.sizes)}
        return self.results.add(settings, on=self._machine, **figures)


class _Process:
    """A section's process, and the connection to it."""

    def __init__(self, section: Section, order: child.Order):
        # CUDA cannot be used in a fork of a process that may have looked for a GPU. On a CPU, forks save imports.
        context: Any = get_context("spawn" if order.on_gpu else "forkserver")
        if not order.on_gpu:
            context.set_forkserver_preload(_PRELOAD)
        own, other = context.Pipe()
        self.connection: Connection = own
        self.process: BaseProcess = context.Process(target=child.serve, args=(other, section, order))
        self.process.start()
        other.close()  # otherwise the connection would outlive the process

    def receive(self, seconds: float, limit: float) -> child.Message:
        """Return the next message, or a failure if there is none in time or will never be one."""
        try:
            if self.connection.poll(max(0.0, seconds)):
                return self.connection.recv()
        except (EOFError, OSError):
            self.process.join(_PATIENCE_SECONDS)
            return child.FAILED, "", {"failed": _how_it_ended(self.process.exitcode)}
        return child.FAILED, "", {"failed": f"stopped after {limit:.0f} s"}

    def end(self) -> None:
        """End the process and all that it has started."""
        self.connection.close()
        self.process.join(0.2)
        if self.process.pid is not None:
            with suppress(ProcessLookupError, PermissionError):
                os.killpg(self.process.pid, signal.SIGKILL)
        if self.process.is_alive():
            self.process.kill()
        self.process.join()


def _how_it_ended(status: int | None) -> str:
    if status == -signal.SIGKILL:
        return "killed by the system, most likely out of memory"
    if status is not None and status < 0:
        return f"ended by {signal.Signals(-status).name}"
    return f"ended with status {status}, without a word"
