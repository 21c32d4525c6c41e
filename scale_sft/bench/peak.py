"""How long something takes, and the most memory it needs above what was there: exact, where the system keeps count."""

from __future__ import annotations

import ctypes
import gc
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import torch

from scale_sft.model.memory import PeakMemory

_STATUS, _CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")
_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # of glibc's mallopt
_LARGEST_MMAP_THRESHOLD = 32 << 20  # where glibc's own, moving threshold ends
_HUGE_PAGES_DISABLE = 41  # of Linux's prctl


@dataclass(frozen=True)
class Peak:
    """What `peak_of` found."""

    added: int  # bytes
    by: str  # who counted: "allocator", "kernel" or "sampling"


def peak_of(work: Callable[[], object], device: torch.device) -> Peak:
    """Peak memory, in bytes, that `work` adds to what is there.

    Of a GPU the allocator keeps count. Of a CPU the kernel does (the resident set's high-water mark, set back at the
    start). Meanwhile every larger block goes back to the system as soon as it is freed, pages are small, and the work
    is done in a thread of its own, whose arena holds nothing that was freed before: what is counted is what is needed.
    Where there is no such mark, memory is sampled (see `PeakMemory`).
    Code and files that are read for the first time count too: do the same once before, on something small.
    """
    gc.collect()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        with PeakMemory(device) as counted:
            work()
            torch.cuda.synchronize(device)
        return Peak(counted.added, "allocator")
    _count_closely(True)
    try:
        with ThreadPoolExecutor(1) as thread:
            if _reset_mark():
                before = _status_bytes("VmRSS")
                thread.submit(work).result()
                return Peak(max(0, _status_bytes("VmHWM") - before), "kernel")
            with PeakMemory(device) as counted:
                thread.submit(work).result()
            return Peak(counted.added, "sampling")
    finally:
        _count_closely(False)


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


def _count_closely(closely: bool) -> None:
    """Give freed memory back to the system; on Linux with glibc only.

    Args:
        closely: from now on give back every block of 64 KiB or more when it is freed, and take small pages only.
    """
    if not sys.platform.startswith("linux"):
        return
    with suppress(OSError, AttributeError):
        libc = ctypes.CDLL(None)
        libc.prctl(_HUGE_PAGES_DISABLE, int(closely), 0, 0, 0)
        libc.mallopt(_MMAP_THRESHOLD, 1 << 16 if closely else _LARGEST_MMAP_THRESHOLD)
        libc.mallopt(_TRIM_THRESHOLD, 1 << 16 if closely else 2 * _LARGEST_MMAP_THRESHOLD)
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
