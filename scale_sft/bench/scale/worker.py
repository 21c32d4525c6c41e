"""Run one rank of `bench scale`: the unchanged trainer, with a clock around its collectives.

python scale_sft/bench/scale/worker.py CLOCKS --option value ... writes CLOCKS/<rank>.json: seconds by number of step.
"""

from __future__ import annotations

import atexit
import json
import runpy
import sys
import time
from collections.abc import Callable
from functools import wraps
from pathlib import Path
from typing import Any

if __package__ in (None, ""):  # run as a file: its folder must not hide libraries, its package must be found
    sys.path[0] = str(Path(__file__).resolve().parents[3])

from scale_sft.distributed.cluster import Cluster
from scale_sft.distributed.world import World
from scale_sft.files import write_text
from scale_sft.spiel.algorithm import SparseFineTuning

COLLECTIVES = ("sum_", "select_candidates", "gather_objects", "check_identical")
"""Timed methods of a cluster; nested calls count once."""


class Clock:
    """Seconds in collectives by optimizer step; evaluations and reallocations count towards the step before them."""

    def __init__(self) -> None:
        self.seconds: dict[int, float] = {}
        self._step = 0  # before the first
        self._inside = False

    def begin(self, step: int) -> None:
        """Assign the following time to step `step`."""
        self._step = step
        self.seconds[step] = 0.0

    def around(self, collective: Callable) -> Callable:
        """Time a method of a cluster, from the moment this rank's device reaches it until it is done."""

        @wraps(collective)
        def run(cluster: Cluster, *arguments: Any, **named: Any) -> Any:
            if self._inside or not self._step or cluster.size == 1:
                return collective(cluster, *arguments, **named)
            self._inside = True
            _wait_for(cluster)
            began = time.perf_counter()
            try:
                result = collective(cluster, *arguments, **named)
                _wait_for(cluster)
                return result
            finally:
                self._inside = False
                self.seconds[self._step] += time.perf_counter() - began

        return run


def _wait_for(cluster: Cluster) -> None:
    if cluster.device.type == "cuda":
        import torch

        torch.cuda.synchronize(cluster.device)


def watch(clock: Clock) -> None:
    """Put the clock around the collectives of every cluster of this process."""
    for name in COLLECTIVES:
        setattr(Cluster, name, clock.around(getattr(Cluster, name)))
    begin_step = SparseFineTuning.begin_step

    @wraps(begin_step)
    def begin(tuning: SparseFineTuning, step: int) -> None:
        clock.begin(step)
        begin_step(tuning, step)

    setattr(SparseFineTuning, "begin_step", begin)  # noqa: B010


def main() -> None:
    """Train with the arguments after the clock folder."""
    clocks = Path(sys.argv.pop(1))
    clock = Clock()
    watch(clock)
    file = clocks / f"{World.from_environment().rank}.json"
    atexit.register(lambda: write_text(file, json.dumps(clock.seconds)))  # training ends the process
    runpy.run_module("scale_sft.train", run_name="__main__")


if __name__ == "__main__":
    main()
