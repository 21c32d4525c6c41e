"""Measure how long work takes and the peak memory it adds, exactly where the system counts it."""

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
_LARGEST_MMAP_THRESHOLD = 32 << 20  # the maximum of glibc's own, moving threshold
_HUGE_PAGES_DISABLE = 41  # of Linux's prctl


@dataclass(frozen=True)
class Peak:
    """The result of `peak_of`."""

    added: int  # bytes
    by: str  # the source: "allocator", "kernel" or "sampling"


def peak_of(work: Callable[[], object], device: torch.device) -> Peak:
    """Measure the peak memory, in bytes, that `work` adds.

    On a GPU the allocator counts. On a CPU the kernel does (the resident set's high-water mark, reset at the start). So
    that only memory in use counts, larger blocks meanwhile go back to the system as soon as they are freed, pages are
    small, and the work runs in its own thread, whose arena holds no freed memory. Systems without such a mark are
    sampled (see `PeakMemory`).
    Code and files read for the first time count too: run the same work once before, on something small.
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
    """Time `work` in seconds, until the device has finished."""
    wait = (lambda: torch.cuda.synchronize(device)) if device.type == "cuda" else (lambda: None)
    wait()
    began = time.perf_counter()
    work()
    wait()
    return time.perf_counter() - began


def available_bytes(device: torch.device) -> int:
    """Return how much of the device's memory is free."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    import psutil

    return psutil.virtual_memory().available


def _count_closely(closely: bool) -> None:
    """Return freed memory to the system, now and, with `closely`, from now on.

    `closely` returns each block of 64 KiB or more when it is freed, and uses small pages only. This needs Linux with
    glibc; elsewhere it does nothing.
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
    """Reset the high-water mark to the present resident set; returns False if the system cannot."""
    try:
        _CLEAR.write_text("5")
        return _status_bytes("VmHWM") - _status_bytes("VmRSS") < 1 << 20
    except (OSError, KeyError):
        return False


def _status_bytes(field: str) -> int:
    """Read a field of this process's status, which the kernel gives in kB. Raises KeyError if it is missing."""
    for line in _STATUS.read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) * 1024
    raise KeyError(field)
