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
    """End this process with one message: once, where every rank found the same.

    The launcher ends all ranks with the first that ends. So the others wait for rank 0 to speak; who is still there
    after `patience_seconds` has met something that rank 0 has not, and says so, naming itself. With `SAVED_STATUS` the
    file $SCALE_SFT_REQUEUE_FILE is made: `accelerate launch` turns every status but 0 into 1.
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

    A thread of gloo may be about to let go of the last collective's tensors, also after the group is destroyed
    (DeepSpeed keeps a reference to it). Where the interpreter is already being taken apart, that aborts a process which
    has done all its work (pytorch issue 190489). So what comes before that is done here, and nothing after it.
    """
    if not Cluster.joined:
        sys.exit(status)
    threading._shutdown()
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError):  # nobody reads it any more
            stream.flush()
    os._exit(status)
