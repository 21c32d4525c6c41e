"""Spread work over processes, so that one may die without the others."""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from multiprocessing import get_context, parent_process
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from typing import Any, cast

_CONTEXT = get_context("spawn")  # a fork would inherit torch's threads
_PATIENCE_SECONDS = 10


class Died(Exception):
    """A process ended during its work; the message is its exit status."""


class Pool:
    """Processes that import once and work many times. A context manager: they end with it.

    Args:
        work: a module's function of one item; its result or exception must survive pickling.
        processes: their number; 1 does the work in this process.
        threads: of torch in each process; None keeps torch's choice.
    """

    def __init__(self, work: Callable[[Any], Any], *, processes: int, threads: int | None = None):
        self.work, self.processes, self.threads = work, processes, threads
        self._idle: list[tuple[Connection, BaseProcess]] = []
        self._busy: dict[Connection, tuple[BaseProcess, Any]] = {}

    def __enter__(self) -> Pool:
        return self

    def __exit__(self, *_) -> None:
        """End all processes: idle ones by closing their connection, busy ones by a signal."""
        for process, _ in self._busy.values():
            process.terminate()
        for connection in [*self._busy, *(connection for connection, _ in self._idle)]:
            connection.close()
        for process in [*(process for process, _ in self._busy.values()), *(process for _, process in self._idle)]:
            process.join(_PATIENCE_SECONDS)
            if process.is_alive():
                process.kill()
                process.join()
        self._idle, self._busy = [], {}

    def results(self, items: Iterable[Any]) -> Iterator[tuple[Any, Any]]:
        """Yield (item, result) as they are ready; the result of failed work is its exception.

        Args:
            items: to work on; a deque is emptied, and may be given more after each result.
        """
        waiting = items if isinstance(items, deque) else deque(items)
        while waiting and self.processes == 1:
            item = waiting.popleft()
            yield item, _attempt(self.work, item)
        while waiting or self._busy:
            while waiting and len(self._busy) < self.processes:
                connection, process = self._idle.pop() if self._idle else self._start()
                self._busy[connection] = process, waiting.popleft()
                connection.send(self._busy[connection][1])
            for ready in wait(list(self._busy)):
                yield self._take(cast(Connection, ready))

    def _start(self) -> tuple[Connection, BaseProcess]:
        own, other = _CONTEXT.Pipe()
        process = _CONTEXT.Process(target=_serve, args=(other, self.work, self.threads), daemon=True)
        process.start()
        other.close()  # otherwise the connection would outlive the process
        return own, process

    def _take(self, connection: Connection) -> tuple[Any, Any]:
        process, item = self._busy[connection]
        try:
            result = connection.recv()
            self._idle.append((connection, process))
        except (EOFError, OSError):
            process.join()
            connection.close()
            result = Died(f"its process ended with status {process.exitcode}")
        del self._busy[connection]
        return item, result


def _attempt(work: Callable[[Any], Any], item: Any) -> Any:
    try:
        return work(item)
    except Exception as error:  # the others continue
        return error


def _serve(connection: Connection, work: Callable[[Any], Any], threads: int | None) -> None:
    """Work until the other end closes, or is gone; Ctrl-C is handled there."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # cleans up, unlike the default action
    threading.Thread(target=_end_with_parent, daemon=True).start()
    if threads:
        import torch

        torch.set_num_threads(threads)
    while True:
        try:
            connection.send(_attempt(work, connection.recv()))
        except (EOFError, ConnectionError):
            return


def _end_with_parent() -> None:
    """Stop this process in the middle of its work if the one that started it is gone, however that ended."""
    if parent := parent_process():
        parent.join()
        os.kill(os.getpid(), signal.SIGTERM)
