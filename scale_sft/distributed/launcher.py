"""`accelerate launch`, quietly: one line for what went wrong, the trainer's own exit status, signals passed on.

    python -m scale_sft.distributed.launcher [options of accelerate launch] PROGRAM [its options]

Differs from `accelerate launch` in what surrounds the ranks, not in how it starts them:

- no list of its own defaults at the start, no traceback of the launcher below an error of the trainer;
- the status of the rank that ended first, so that 75 (saved, start me again) stays 75; 128 + N where signal N ended it;
- SIGTERM, SIGINT, SIGUSR1 and SIGHUP are passed on to the ranks, which may take all the time they need to save.

It also runs as a file, from a clone that is not installed.
"""

from __future__ import annotations

import logging
import os
import signal
import socket
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

if __package__ in (None, ""):  # run as a file: its folder must not hide libraries
    sys.path[0] = str(Path(__file__).resolve().parents[2])

_FORWARDED = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP)


class _NothingToStop(BaseException):
    """A signal arrived before any rank was started."""


def launch(arguments: Sequence[str]) -> int:
    """Start ranks as `accelerate launch ARGUMENTS` would, wait for them, and return the exit status to end with."""
    from accelerate.commands.launch import launch_command, launch_command_parser
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    logging.disable(logging.ERROR)
    parsed = launch_command_parser().parse_args([str(argument) for argument in arguments])
    try:
        with _forwarding():
            launch_command(parsed)
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        return _status(failure.exitcode, f"rank {rank} on {socket.gethostname()}")
    except _NothingToStop as stop:
        return 128 + int(stop.args[0])
    except Exception as error:  # CalledProcessError of a single process, or the launcher's own refusal
        status = getattr(error, "returncode", None)
        if status is not None:
            return _status(status, "the trainer")
        print(f"error: launch: {' '.join(str(error).split()) or type(error).__name__}", file=sys.stderr, flush=True)
        return 1
    return 0


def launch_here(options: Sequence[str], *, processes: int) -> int:
    """Train in several processes of this machine, on its GPUs or, without any, on its CPU; returns the exit status.

    A sharded run gets the DeepSpeed settings of launch/zero3_8gpu.yaml or launch/cpu_zero3_2proc.yaml; whether the base
    is sharded is decided by `base_placement`, in each process.

    Raises:
        UserError: the machine has GPUs, but fewer.
    """
    import torch

    from scale_sft.errors import UserError
    from scale_sft.files import LAUNCH_FILES

    gpus = torch.cuda.device_count()
    if 0 < gpus < processes:
        raise UserError(f"nproc: got {processes}, but this machine has {gpus} GPUs. Fix: --nproc {gpus}")
    ds_config = LAUNCH_FILES / "ds_configs" / ("zero3.json" if gpus else "zero3_cpu.json")
    os.environ.setdefault("ACCELERATE_DEEPSPEED_CONFIG_FILE", str(ds_config))
    if not gpus:
        os.environ.setdefault("DS_ACCELERATOR", "cpu")  # DeepSpeed would otherwise look for one, and say so
    how = LAUNCH_FILES / "launch" / ("multi_gpu.yaml" if gpus else "cpu_2proc.yaml")
    return launch(["--config_file", str(how), "--num_processes", str(processes), "-m", "scale_sft.train", *options])


def _status(exitcode: int, who: str) -> int:
    """Convert a child's exit code to the shell's status, and report a signal that ended the child."""
    if exitcode >= 0:
        return exitcode
    name = signal.Signals(-exitcode).name
    hint = " (often: out of memory)" if name == "SIGKILL" else ""
    print(f"error: {who} was ended by {name}{hint}", file=sys.stderr, flush=True)
    return 128 - exitcode


@contextmanager
def _forwarding() -> Iterator[None]:
    """Pass signals on to the ranks; torchrun would give them 30 seconds, then kill them while they save."""
    key = "PET_SIGNALS_TO_HANDLE"  # torchrun's own handlers: for what is not forwarded
    before: dict[Any, Any] = {number: signal.signal(number, _forward) for number in _FORWARDED if not _ignored(number)}
    handled = os.environ.setdefault(key, "SIGQUIT")
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        if handled == "SIGQUIT":
            os.environ.pop(key, None)


def _ignored(number: int) -> bool:
    """Return True if this process inherited that the signal is ignored, as a Slurm job step does with SIGUSR1."""
    return signal.getsignal(number) is signal.SIG_IGN


def _forward(number: int, frame: object) -> None:
    import psutil

    ranks = psutil.Process().children()
    if not ranks:
        raise _NothingToStop(number)
    for rank in ranks:
        with suppress(psutil.Error, OSError):
            if number == signal.SIGINT and os.getpgid(rank.pid) == os.getpgrp():
                continue  # Ctrl-C has reached it already
            rank.send_signal(number)


if __name__ == "__main__":
    sys.exit(launch(sys.argv[1:]))
