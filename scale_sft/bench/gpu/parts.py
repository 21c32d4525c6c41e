"""Count kernel launches, waits for the device and its milliseconds, by part of our step.

On a GPU torch's profiler counts them. On a CPU, where nothing is launched, torch's operations count as launches, except
views, and operations whose result the CPU must read count as waits.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile, record_function
from torch.utils._python_dispatch import TorchDispatchMode

from scale_sft.bench.contestants import CONTESTANTS, Sparse
from scale_sft.bench.step.breakdown import OTHER, breakdown, instrumented, synchronize
from scale_sft.bench.step.race import undisturbed
from scale_sft.bench.workload import Base, Batches

from .lab import Lab

LABEL = "part: "
LAUNCHES = ("cudaLaunchKernel", "cuLaunchKernel", "hipLaunchKernel", "hipModuleLaunchKernel", "cudaGraphLaunch")
WAITS = ("StreamSynchronize", "DeviceSynchronize", "EventSynchronize")
_READ_BY_THE_CPU = ("_local_scalar_dense", "nonzero", "is_nonzero", "equal", "masked_select", "unique", "_unique2")
_NO_WORK = ("empty", "empty_like", "empty_strided", "new_empty", "detach", "alias", "lift_fresh")


def parts(lab: Lab) -> None:
    """Report milliseconds by part of a step, then launches and waits of a step of each kind."""
    case = lab.case() if lab.on_gpu else lab.case(kernels="off")  # in C nothing would be counted
    base = Base(case, lab.device)
    batches = Batches(case, base.model_config.vocab_size, lab.device)
    with undisturbed():
        for method in ("ag", "ma"):
            found = breakdown(base, method, batches, lab.few(5))
            pieces = {name: _ms(seconds) for name, seconds in found["pieces"].items()}
            around = {name: _ms(seconds) for name, seconds in found["reallocation"].items() if name != "fraction"}
            lab.say(f"ours-{method}, milliseconds", {"ms": _ms(found["seconds"]), "parts": pieces, "cycle": around})
        for method in ("ag", "ma"):
            _count(lab, base, method, batches)
        _count_floor(lab, base, batches)


def _count(lab: Lab, base: Base, method: str, batches: Batches) -> None:
    """Report the counts of an ordinary step, one that proposes, and one that drops and grows."""
    labels = Labels()
    with instrumented(labels):
        ours = Sparse(base, method)
        ours.warm_up(batches)
        schedule = ours.tuning.schedule
        interval, phase = schedule.update_interval_steps, schedule.estimation_steps
        ours.step(batches, 0)
        kinds = {"ordinary step": ours.plain_step}
        kinds |= {"proposing step": interval + 1} if method != "ma" else {}
        kinds["reallocating step"] = interval + phase
        for kind, at in kinds.items():
            with labels.counted(lab.device):
                ours.step_at(at, batches, 1)
            figures: dict[str, Any] = {
                "launches": sum(labels.launches.values()),
                "waits": sum(labels.waits.values()),
            }
            figures |= {"launches_by_part": dict(labels.launches), "waits_by_part": dict(labels.waits)}
            if labels.milliseconds:
                figures |= {"gpu_ms": round(sum(labels.milliseconds.values()), 3)}
                figures |= {"gpu_ms_by_part": {name: round(ms, 3) for name, ms in labels.milliseconds.items()}}
            lab.say(f"ours-{method}, {kind}", figures)


def _count_floor(lab: Lab, base: Base, batches: Batches) -> None:
    frozen, labels = CONTESTANTS["frozen"](base), Labels()
    frozen.step(batches, 0)
    with labels.counted(lab.device):
        frozen.step(batches, 1)
    lab.say("frozen", {"launches": sum(labels.launches.values()), "waits": sum(labels.waits.values())})


class Labels:
    """A `Watch` of a step's pieces that counts what is launched inside each, the innermost only."""

    def __init__(self) -> None:
        self.launches: Counter[str] = Counter()
        self.waits: Counter[str] = Counter()
        self.milliseconds: Counter[str] = Counter()  # of the GPU
        self._running: list[str] = []

    @contextmanager
    def piece(self, name: str) -> Iterator[None]:
        """Count the block as `name`."""
        self._running.append(name)
        try:
            with record_function(LABEL + name):
                yield
        finally:
            self._running.pop()

    @contextmanager
    def counted(self, device: torch.device) -> Iterator[None]:
        """Count the block, from zero."""
        self.launches, self.waits, self.milliseconds = Counter(), Counter(), Counter()
        if device.type == "cpu":
            with self.piece(OTHER), _Operations(self):
                yield
            return
        synchronize(device)
        with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiled:
            with self.piece(OTHER):
                yield
            synchronize(device)
        self.read(profiled.events())

    def read(self, events: Any) -> None:
        """Add up a profile's events by the innermost label around each.

        Backward passes run in a thread of their own while the caller waits, so time alone says what is inside what.
        """
        on_cpu = [event for event in events if event.device_type == DeviceType.CPU]
        spans = sorted(
            (event.time_range.start, event.time_range.end, event.name.removeprefix(LABEL))
            for event in on_cpu
            if event.name.startswith(LABEL)
        )
        for event in on_cpu:
            around = [name for start, end, name in spans if start <= event.time_range.start <= end]
            if not around:
                continue
            if event.name.startswith(LAUNCHES):
                self.launches[around[-1]] += 1
            elif event.name.endswith(WAITS):
                self.waits[around[-1]] += 1
            for kernel in event.kernels:
                if not kernel.name.startswith(LABEL):  # a label's own shadow on the device
                    self.milliseconds[around[-1]] += kernel.duration / 1e3


class _Operations(TorchDispatchMode):
    """A mode that counts torch's operations on a CPU, by the piece that runs."""

    def __init__(self, labels: Labels):
        super().__init__()
        self.labels = labels

    def __torch_dispatch__(self, function: Any, types: Any, arguments: Any = (), named: Any = None) -> Any:
        space, _, name = function._schema.name.partition("::")
        piece = self.labels._running[-1]
        views = any(out.alias_info and not out.alias_info.is_write for out in function._schema.returns)
        if not views and space != "profiler" and name not in _NO_WORK:
            self.labels.launches[piece] += 1
        if name in _READ_BY_THE_CPU:
            self.labels.waits[piece] += 1
        return function(*arguments, **(named or {}))


def _ms(seconds: float) -> float:
    return round(1e3 * seconds, 3)
