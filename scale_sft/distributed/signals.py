"""Signals that ask a run to stop: SIGTERM (preemption), SIGUSR1 (time limit) and SIGINT (Ctrl-C)."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

SAVED_STATUS = 75
"""Exit status of a run that was interrupted, has saved itself, and wants to be started again (EX_TEMPFAIL)."""

_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)

_ONE_PRESS_SECONDS = 0.5
"""A terminal and a launcher may both deliver the same Ctrl-C."""


class Interrupted(BaseException):
    """A request to stop. Not an `Exception`, so that nothing that handles errors swallows it.

    `status` is the process's exit status: SAVED_STATUS, or that of a process that the signal has killed.
    """

    def __init__(self, message: str, status: int = SAVED_STATUS):
        super().__init__(message)
        self.status = status


class Interruption:
    """Remembers a signal inside `deferred` blocks, where a step must be finished first; elsewhere it raises at once.

    A second Ctrl-C raises KeyboardInterrupt even inside a `deferred` block.
    """

    def __init__(self) -> None:
        self.asked: str | None = None  # the signal's name
        self._deferred = False
        self._pressed_at: float | None = None  # Ctrl-C, for the first time

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
        """Defer signals inside this block: only remember them."""
        self._deferred = True
        try:
            yield
        finally:
            self._deferred = False

    def _receive(self, number: int, frame: object) -> None:
        name = signal.Signals(number).name
        if self._deferred and number == signal.SIGINT:
            self._leave_if_pressed_again()
        self.asked = self.asked or name
        if not self._deferred:
            message = f"{name}: stopped outside of the training loop; nothing but what was saved before is kept"
            raise Interrupted(message, 128 + number)

    def _leave_if_pressed_again(self) -> None:
        """Raise KeyboardInterrupt for a second Ctrl-C; say what the first one does."""
        now = time.monotonic()
        if self._pressed_at is None:
            self._pressed_at = now
            if int(os.environ.get("RANK", 0)) == 0:
                note = b"\nCtrl-C: saving a checkpoint after this step; press again to leave at once\n"
                os.write(2, note)  # print is not safe inside a signal handler
        elif now - self._pressed_at > _ONE_PRESS_SECONDS:
            raise KeyboardInterrupt
