"""How long something takes, and the most memory it needs above what was there: exact, where the system keeps count."""

from __future__ import annotations

import ctypes
import gc
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import torch

from scale_sft.memory import PeakMemory

_STATUS, _CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")
_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # of glibc's mallopt
_LARGEST_MMAP_THRESHOLD = 32 << 20  # where glibc's own, moving threshold ends


class Peak:
    """Peak memory, in bytes, that a `with` block added to what was there: `Peak(device) as peak; peak.added`.

    Of a GPU the allocator keeps count. Of a CPU the kernel does (the resident set's high-water mark, set back at the
    start), while every larger block of memory goes back to the system as soon as it is freed, so that nothing hides in
    memory that was freed before; where there is no such mark, memory is sampled (see `PeakMemory`). `by` says which.
    Code and files that are read for the first time count too: do the same thing once before, on something small.
    """

    def __init__(self, device: torch.device):
        self.device, self.added = device, 0
        self.by = "allocator" if device.type == "cuda" else "kernel"

    def __enter__(self) -> Peak:
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        _return_freed_memory(at_once=True)
        if self.device.type == "cpu" and _reset_mark():
            self._sampling, self._before = None, _status_bytes("VmRSS")
            return self
        if self.device.type == "cpu":
            self.by = "sampling"
        self._sampling = PeakMemory(self.device).__enter__()
        return self

    def __exit__(self, *error: object) -> None:
        if self._sampling is None:
            self.added = max(0, _status_bytes("VmHWM") - self._before)
        else:
            if self.device.type == "cuda":
                torch.cuda.synchronize(self.device)
            self._sampling.__exit__(*error)
            self.added = self._sampling.added
        _return_freed_memory(at_once=False)


def seconds_of(work: Callable[[], object], device: torch.device) -> float:
    """How long `work` takes, until the device has finished."""
    wait = (lambda: torch.cuda.synchronize(device)) if device.type == "cuda" else (lambda: None)
    wait()
    began = time.perf_counter()
    work()
    wait()
    return time.perf_counter() - began


def available_bytes(device: torch.device) -> int:
    """What can still be had of the device's memory."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    import psutil

    return psutil.virtual_memory().available


def _return_freed_memory(*, at_once: bool) -> None:
    """Give freed memory back to the system; `at_once`: from now on every block of 64 KiB or more when it is freed.

    Only glibc is told; elsewhere nothing happens.
    """
    if not sys.platform.startswith("linux"):
        return
    with suppress(OSError, AttributeError):
        libc = ctypes.CDLL(None)
        libc.mallopt(_MMAP_THRESHOLD, 1 << 16 if at_once else _LARGEST_MMAP_THRESHOLD)
        libc.mallopt(_TRIM_THRESHOLD, 1 << 16 if at_once else 2 * _LARGEST_MMAP_THRESHOLD)
        libc.malloc_trim(0)


def _reset_mark() -> bool:
    """Set the high-water mark to what is resident now; whether the system can."""
    try:
        _CLEAR.write_text("5")
        return _status_bytes("VmHWM") - _status_bytes("VmRSS") < 1 << 20
    except (OSError, KeyError):
        return False


def _status_bytes(field: str) -> int:
    """A field of this process's status that the kernel gives in kB. KeyError: it gives none."""
    for line in _STATUS.read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) * 1024
    raise KeyError(field)
