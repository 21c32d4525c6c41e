"""End a process that has joined a process group."""

from __future__ import annotations

import atexit
import os
import socket
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path
from typing import NoReturn

from .cluster import Cluster
from .signals import SAVED_STATUS
from .world import World


def leave(message: str, status: int = 1, patience_seconds: float = 15) -> NoReturn:
    """End this process with a message, printed only once where every rank hit the same error.

    The launcher ends all ranks when the first one ends, so the others wait for rank 0 to speak. A rank still alive
    after `patience_seconds` hit a different error; it prints that error with its rank and host. With `SAVED_STATUS` the
    file $SCALE_SFT_REQUEUE_FILE is created: `accelerate launch` turns every status but 0 into 1.
    """
    world = World.from_environment()
    if world.rank:
        time.sleep(patience_seconds)
        message = f"rank {world.rank} on {socket.gethostname()}: {message}"
    elif status == SAVED_STATUS and (requeue_file := os.environ.get("SCALE_SFT_REQUEUE_FILE")):
        Path(requeue_file).touch()
    print(message if status == SAVED_STATUS else f"error: {message}", file=sys.stderr, flush=True)
    end_process(status)


def end_process(status: int = 0) -> NoReturn:
    """End this process: the last call of a program that has joined a process group.

    A thread of gloo may still release the last collective's tensors after the group is destroyed (DeepSpeed keeps a
    reference to it). If the interpreter is shutting down at that moment, a process that has done all its work aborts
    (pytorch issue 190489). So this runs the exit handlers itself and skips the shutdown of the interpreter.
    """
    if not Cluster.joined:
        sys.exit(status)
    threading._shutdown()  # type: ignore[attr-defined]  # what the interpreter calls first
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError):  # nobody reads it any more
            stream.flush()
    os._exit(status)
