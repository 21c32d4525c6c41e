"""Runs in processes of their own that can be killed at any chosen place.

What goes wrong in a child is planted there by replacing functions; the trainer knows nothing of it.
"""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from tests.forked import begin, rank_environments


@dataclass(frozen=True)
class Kill:
    """Where a child kills itself: in a step, or in the saving of the checkpoint of a step."""

    step: int
    place: str  # forward, update, recorded; tensors, state, manifest, rename, renamed, removing


def start(
    options: Mapping[str, Any],
    log: Path,
    *,
    kill: Kill | None = None,
    plant: tuple[str, ...] = (),
    environment: Mapping[str, str] | None = None,
) -> Any:
    """Begin a run of the training command with `options`; its output goes to `log`. Returns the process.

    `plant`: name of a function of this module, and its arguments.
    """
    arguments = [f"--{name}={value}" for name, value in options.items()]
    return begin(_run, arguments, kill, plant, log=log, environment=environment)


def start_ranks(
    count: int,
    options: Mapping[str, Any],
    log: Path,
    *,
    kill: Kill | None = None,
    plant: tuple[str, ...] = (),
    at: int = 0,
) -> list[Any]:
    """Begin a run of `count` ranks, as a launcher would (gloo); `kill` and `plant` happen at rank `at` only."""
    children = []
    for rank, environment in enumerate(rank_environments(count, sharded=options.get("base_placement") == "shard")):
        sabotage = {"kill": kill, "plant": plant} if rank == at else {}
        children.append(start(options, log, environment=environment, **sabotage))
    return children


def _run(arguments: list[str], kill: Kill | None, plant: tuple) -> None:
    from scale_sft import train
    from scale_sft.training import lifecycle

    lifecycle.write_report = lambda folder: folder / "report.html"  # takes longer than the run
    _record_batches(train)
    if kill:
        _plant_kill(kill)
    if plant:
        globals()[plant[0]](*plant[1:])
    train.main(arguments)


def _record_batches(train: Any) -> None:
    """Each step's examples into batches.jsonl of the run."""
    original = train.forward_backward

    def recording(session, batch):
        if session.cluster.is_main:
            with open(Path(session.inputs.config.run.output_dir) / "batches.jsonl", "a") as file:
                file.write(json.dumps([session.step + 1, batch]) + "\n")
        return original(session, batch)

    train.forward_backward = recording


def _die(*_: Any, **__: Any) -> NoReturn:
    os.kill(os.getpid(), signal.SIGKILL)


def _plant_kill(kill: Kill) -> None:
    from scale_sft import train
    from scale_sft.model.sparse_optimizer import SparseOptimizer
    from scale_sft.reporting.metrics import Metrics
    from scale_sft.training import checkpoint_files
    from scale_sft.training import checkpoints as checkpoint

    if kill.place == "forward":  # gradients are there, candidates may have been proposed
        original = train.forward_backward
        train.forward_backward = lambda session, batch: (
            original(session, batch),
            _die() if session.step + 1 == kill.step else None,
        )[0]
    elif kill.place == "update":  # deltas and moments have changed, by plain torch the weights not yet
        update = SparseOptimizer.update
        SparseOptimizer.update = lambda self: (update(self), _die() if self.number == kill.step else None)[0]
    elif kill.place == "recorded":  # the step is done and on record, but not saved
        record = Metrics.step
        Metrics.step = lambda self, step, **values: (
            record(self, step, **values),
            _die() if step == kill.step else None,
        )[0]

    def at_step(function, half: bool = False, after: bool = False):
        def wrapped(*arguments, **named):
            if not any(f"step_{kill.step:06d}" in str(argument) for argument in arguments):
                return function(*arguments, **named)
            if half:
                _write_half(function, arguments, named)
            if after:
                function(*arguments, **named)
            _die()

        return wrapped

    if kill.place == "tensors":
        checkpoint_files.save_file = at_step(checkpoint_files.save_file, half=True)
    elif kill.place == "state":
        checkpoint_files._write_json = at_step(checkpoint_files._write_json)
    elif kill.place == "manifest":
        checkpoint_files._manifest = at_step(checkpoint_files._manifest, after=True)
    elif kill.place == "rename":
        checkpoint_files.os = _Replacing(os, rename=at_step(os.rename))
    elif kill.place == "renamed":
        checkpoint_files.os = _Replacing(os, rename=at_step(os.rename, after=True))
    elif kill.place == "removing":
        original = checkpoint.prune

        def removing(folder, keep_last):
            if (folder / f"step_{kill.step:06d}").exists():
                checkpoint_files.shutil = _Replacing(checkpoint_files.shutil, rmtree=_die)
            original(folder, keep_last)

        checkpoint.prune = removing


def hang(step: int) -> None:
    """To be planted: the forward pass of a step never comes to an end."""
    from scale_sft import train

    original = train.forward_backward

    def hanging(session, batch):
        while session.step + 1 == step:
            time.sleep(0.1)
        return original(session, batch)

    train.forward_backward = hanging


def fill_the_disk(filler: str, first: int, last: int) -> None:
    """To be planted: in the forward pass of step `first` only 8 KiB are left on the disk; until that of step `last`."""
    from scale_sft import train

    original = train.forward_backward

    def filling(session, batch):
        if session.step + 1 == first:
            free = os.statvfs(Path(filler).parent).f_bavail * os.statvfs(Path(filler).parent).f_bsize
            Path(filler).write_bytes(bytes(free - 8192))
        if session.step + 1 == last:
            os.unlink(filler)
        return original(session, batch)

    train.forward_backward = filling


def signal_itself(step: int, number: int) -> None:
    """To be planted: a signal arrives in the forward pass of a step."""
    from scale_sft import train

    original = train.forward_backward

    def signalled(session, batch):
        if session.step + 1 == step:
            os.kill(os.getpid(), number)
        return original(session, batch)

    train.forward_backward = signalled


def _write_half(function: Any, arguments: tuple, named: dict) -> None:
    """Half of the file that `function(tensors, path)` would write."""
    function(*arguments, **named)
    path = Path(arguments[1])
    os.truncate(path, path.stat().st_size // 2)


class _Replacing:
    """A module with some of its functions replaced, for one importer."""

    def __init__(self, module: Any, **functions: Any):
        self._module = module
        self.__dict__.update(functions)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._module, name)
