"""Signals that ask a run to stop: SIGTERM (preemption) and SIGUSR1 (time limit)."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager

SAVED_STATUS = 75
"""Exit status of a run that was interrupted, has saved itself, and wants to be started again (EX_TEMPFAIL)."""

_SIGNALS = (signal.SIGTERM, signal.SIGUSR1)


class Interrupted(BaseException):
    """The run was asked to stop. No `Exception`: nothing that handles errors may swallow it.

    `status`: of the process that ends with it: SAVED_STATUS, or that of a process that the signal has killed.
    """

    def __init__(self, message: str, status: int = SAVED_STATUS):
        super().__init__(message)
        self.status = status


class Interruption:
    """Remembers a signal inside `deferred` blocks, where a step must be finished first; elsewhere it raises at once."""

    def __init__(self) -> None:
        self.asked: str | None = None  # the signal's name
        self._deferred = False

    @contextmanager
    def handled(self) -> Iterator[None]:
        """Handle the signals inside this block. Only a program's main thread can; in others this does nothing."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = {number: signal.signal(number, self._receive) for number in _SIGNALS}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    @contextmanager
    def deferred(self) -> Iterator[None]:
        """Only remember signals inside this block."""
        self._deferred = True
        try:
            yield
        finally:
            self._deferred = False

    def _receive(self, number: int, frame: object) -> None:
        self.asked = signal.Signals(number).name
        if not self._deferred:
            message = f"{self.asked}: stopped outside of the training loop; nothing but what was saved before is kept"
            raise Interrupted(message, 128 + number)
