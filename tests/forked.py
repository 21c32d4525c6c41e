"""Processes that cost little to start: forked from a server that has imported the libraries and compiled the kernels.

A fresh Python takes ten seconds until it can train, a forked one a tenth of a second. The server holds no model, joins
no process group and starts no thread, so a forked process does all that belongs to a run by itself. What a launcher
adds is tested with real launchers.
"""

from __future__ import annotations

import faulthandler
import multiprocessing
import os
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

HUNG_SECONDS = 200
"""After so long a process writes to its log where it is: shortly before the tests below end it."""

_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(["tests.preload"])


def begin(target: Callable[..., None], *arguments: Any, log: Path, environment: Mapping[str, str] | None = None) -> Any:
    """Start `target(*arguments)`, a function of a module, in a process of its own, and return that process.

    What it prints is appended to `log`; `environment` is added to its environment.
    """
    child = _CONTEXT.Process(target=_call, args=(target, arguments, log, dict(environment or {})))
    child.start()
    return child


def rank_environments(count: int, *, sharded: bool) -> list[dict[str, str]]:
    """What a launcher would tell each of `count` ranks on this machine (gloo)."""
    from scale_sft.distributed.world import environments_of

    plain = {} if sharded else {"ACCELERATE_USE_CPU": "true"}
    return [plain | environment for environment in environments_of(count)]


def begin_ranks(count: int, target: Callable[..., None], *arguments: Any, log: Path, sharded: bool) -> list[Any]:
    """Start `target(*arguments)` on each of `count` ranks; one that is not sharded joins no process group."""
    environments = rank_environments(count, sharded=sharded) if count > 1 or sharded else [{}]
    return [begin(target, *arguments, log=log, environment=environment) for environment in environments]


def finish(child: Any, seconds: float = 240) -> int:
    """Wait for a child; returns its exit status (negative: the signal that ended it)."""
    child.join(seconds)
    if child.is_alive():
        child.kill()
        child.join()
        raise TimeoutError(f"a run did not end within {seconds} s")
    return child.exitcode


def finish_together(children: Sequence[Any], seconds: float = 400) -> list[int]:
    """Wait for all children, and end the others with the first that fails, as a launcher does; returns their statuses."""
    deadline = time.monotonic() + seconds
    try:
        while alive := [child for child in children if child.is_alive()]:
            if time.monotonic() > deadline:
                raise TimeoutError(f"ranks did not end within {seconds} s")
            if any(child.exitcode for child in children):
                for child in alive:
                    child.terminate()
                    child.join(10)
                break
            wait([child.sentinel for child in alive], timeout=1)
        return [child.exitcode for child in children]
    finally:
        end(children)


def end(children: Sequence[Any]) -> None:
    """Kill what is still there."""
    for child in children:
        child.kill()
        child.join()


def _call(target: Callable[..., None], arguments: tuple, log: Path, environment: dict[str, str]) -> None:
    handle = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(handle, 1)
    os.dup2(handle, 2)
    sys.stdout, sys.stderr = os.fdopen(1, "w", buffering=1), os.fdopen(2, "w", buffering=1)
    os.environ.update(environment)
    faulthandler.dump_traceback_later(HUNG_SECONDS)
    import torch

    torch.set_num_threads(1)
    target(*arguments)
