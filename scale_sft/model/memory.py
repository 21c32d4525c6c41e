"""Measure this process's memory: on a GPU as the allocator counts it, on a CPU as private memory."""

from __future__ import annotations

import threading
from pathlib import Path

import torch

SAMPLE_SECONDS = 0.01


def memory_bytes(device: torch.device) -> int:
    """Read the peak of the GPU's allocator since its last reset; on a CPU the private memory now.

    Memory-mapped files (the weights on disk) do not count: they belong to the page cache.
    """
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else private_bytes()


def take_peak_bytes(device: torch.device) -> int:
    """Read `memory_bytes`, and reset a GPU's peak, so that each step shows its own."""
    found = memory_bytes(device)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    return found


def private_bytes() -> int:
    """Read the anonymous memory of this process (RssAnon), or its unshared memory if the system has no such count."""
    try:
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("RssAnon:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    import psutil

    info = psutil.Process().memory_info()
    return info.rss - getattr(info, "shared", 0)


class PeakMemory:
    """Peak memory, in bytes, that a `with` block adds: `with PeakMemory(device) as peak: ...`, then `peak.added`.

    On a CPU a thread samples private memory; on a GPU the allocator counts.
    """

    def __init__(self, device: torch.device):
        self.device, self.added = device, 0
        self._stop = threading.Event()

    def __enter__(self) -> PeakMemory:
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
            self._before = torch.cuda.memory_allocated(self.device)
        else:
            self._before = self._peak = private_bytes()
            self._thread = threading.Thread(target=self._sample, daemon=True)
            self._thread.start()
        return self

    def _sample(self) -> None:
        while not self._stop.wait(SAMPLE_SECONDS):
            self._peak = max(self._peak, private_bytes())

    def __exit__(self, *_) -> None:
        if self.device.type == "cuda":
            self.added = torch.cuda.max_memory_allocated(self.device) - self._before
            return
        self._stop.set()
        self._thread.join()
        self.added = max(self._peak, private_bytes()) - self._before
