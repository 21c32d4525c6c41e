"""Find the rank that has stopped making progress: each rank tells the others how far it is, from its own thread.

No process group is needed, only a key-value store that all ranks share (`set(key, text)`, `get(key) -> bytes`).
"""

from __future__ import annotations

import json
import os
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any, NoReturn

STALLED_STATUS = 76
"""Exit status of a process that gave up waiting for another rank."""

BEAT_SECONDS = 1.0
_LIFELESS_BEATS = 5
_WAITING = ("torch/distributed/", "deepspeed/comm/", "deepspeed/runtime/zero/partition")


@dataclass(frozen=True)
class Beat:
    """The last report of one rank."""

    rank: int
    host: str
    pid: int
    number: int  # of this beat
    marks: int  # collectives that it has begun
    idle_seconds: float  # since the last of them
    waiting: bool  # its main thread is inside a collective
    where: str  # innermost frame of its main thread outside of libraries
    last_words: str = ""

    def __str__(self) -> str:
        ended = f", ended with: {self.last_words}" if self.last_words else ""
        return f"rank {self.rank} (host {self.host}, pid {self.pid}): {self.marks} collectives, at {self.where}{ended}"


class Heartbeat:
    """The reports of this rank; ends the process after too long without progress.

    Args:
        store: shared by all ranks.
        timeout_seconds: how long a rank may go without `mark` inside a `watching` block.
        give_up: called with the verdict, from the thread; the default prints it and ends the process.
    """

    def __init__(
        self,
        store: Any,
        rank: int,
        size: int,
        timeout_seconds: float,
        give_up: Callable[[str], None] | None = None,
    ):
        self.store, self.rank, self.size, self.timeout_seconds = store, rank, size, timeout_seconds
        self.watched = False
        self._give_up = give_up or end_stalled
        self._marks, self._marked_at = 0, time.monotonic()
        self._number = 0
        self._last_words = ""
        self._main = threading.get_ident()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="heartbeat", daemon=True)
        self.beat()

    def start(self) -> None:
        """Begin; every rank must have made its heartbeat, so that each finds the others in the store."""
        self._thread.start()

    @contextmanager
    def watching(self) -> Iterator[None]:
        """End the process if this rank makes no progress inside the block."""
        self.mark()
        self.watched = True
        try:
            yield
        finally:
            self.watched = False

    def mark(self) -> None:
        """Note that this rank makes progress: it begins or has ended a collective."""
        self._marks += 1
        self._marked_at = time.monotonic()

    def beat(self, last_words: str = "") -> None:
        """Report how far this rank is."""
        self._number += 1
        self._last_words = last_words or self._last_words
        where, waiting = _place_of(self._main)
        beat = Beat(
            rank=self.rank,
            host=socket.gethostname(),
            pid=os.getpid(),
            number=self._number,
            marks=self._marks,
            idle_seconds=time.monotonic() - self._marked_at,
            waiting=waiting,
            where=where,
            last_words=self._last_words,
        )
        self.store.set(str(self.rank), json.dumps(asdict(beat)))

    def close(self, last_words: str = "") -> None:
        """Stop beating; `last_words` are what the other ranks will quote."""
        self._stop.set()
        if self._thread.is_alive():
            self._thread.join(2 * BEAT_SECONDS)
        try:
            self.beat(last_words)
        except RuntimeError:  # the store has gone with the rank that held it
            return

    def _run(self) -> None:
        while not self._stop.wait(BEAT_SECONDS):
            try:
                self.beat()
                if self.watched and time.monotonic() - self._marked_at > self.timeout_seconds:
                    self._give_up(self.verdict())
                    return
            except RuntimeError:  # the store has gone with the rank that held it: the main thread will meet that too
                return

    def verdict(self) -> str:
        """Name the rank that holds the others up, after listening for a few beats."""
        try:
            before = self._listen()
            for _ in range(_LIFELESS_BEATS):
                time.sleep(BEAT_SECONDS)
                self.beat()  # the others may be judging too
            now = self._listen()
        except RuntimeError:
            return "the rank that the others meet at (rank 0, or its launcher) is gone"
        silent = [beat for beat, earlier in zip(now, before, strict=True) if beat.number == earlier.number]
        silent = [beat for beat in silent if beat.rank != self.rank]
        if silent:
            return "no sign of life from " + "; ".join(map(str, silent))
        fewest = min(beat.marks for beat in now)
        behind = [beat for beat in now if beat.marks == fewest]
        behind = [beat for beat in behind if not beat.waiting] or behind
        return f"no progress for {max(beat.idle_seconds for beat in now):.0f} s, waiting for " + "; ".join(
            map(str, behind)
        )

    def _listen(self) -> list[Beat]:
        return [Beat(**json.loads(self.store.get(str(rank)))) for rank in range(self.size)]


def _place_of(thread: int) -> tuple[str, bool]:
    """Locate a thread outside of libraries ('train.py:80 in forward_backward'); tell whether it is in a collective."""
    frame = sys._current_frames().get(thread)
    waiting, place = False, "?"
    while frame is not None:
        file = frame.f_code.co_filename
        waiting = waiting or any(part in file for part in _WAITING)
        if "site-packages" not in file and "/lib/python" not in file:
            return f"{os.path.basename(file)}:{frame.f_lineno} in {frame.f_code.co_name}", waiting
        frame = frame.f_back
    return place, waiting


def end_stalled(verdict: str) -> NoReturn:
    """Print why, and end this process at once: its main thread may be in a collective that will never complete."""
    print(f"error: {verdict}", file=sys.stderr, flush=True)
    os._exit(STALLED_STATUS)
