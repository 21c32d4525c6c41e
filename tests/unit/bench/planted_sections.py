"""Sections that go wrong, for test_bench_gpu.py."""

import os
import signal
import time

from scale_sft.bench.gpu.lab import Lab, Skipped


def fine(lab: Lab) -> None:
    print("what a library prints is no row")
    lab.say("a figure", {"device": str(lab.device), "shared": sorted(path.name for path in lab.scratch.iterdir())})


def raises(lab: Lab) -> None:
    (lab.scratch / "left by another").touch()
    lab.say("before", {"ms": 1.0})
    raise RuntimeError("CUDA out of memory, for example")


def hangs(lab: Lab) -> None:
    lab.say("before", {"pid": os.getpid()})
    if os.fork() == 0:
        time.sleep(600)
    time.sleep(600)


def dies(lab: Lab) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def skips(lab: Lab) -> None:
    raise Skipped("there is nothing to measure")
