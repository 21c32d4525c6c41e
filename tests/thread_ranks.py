"""Ranks as threads of this process: any number of them, without a process group, and the bytes that one of them holds.

Shapes: W ranks; n entries of a rank's tensor.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

from scale_sft.distributed.agreement import Ranks


class Meeting:
    """Where W threads bring tensors, and the last rank works on all of them while the others wait."""

    def __init__(self, size: int):
        self.barrier = threading.Barrier(size, timeout=60)
        self.tensors: list[Tensor] = [torch.empty(0)] * size
        self.result = torch.empty(0)

    def join(
        self,
        rank: int,
        tensor: Tensor,
        work: Callable[[list[Tensor]], Tensor],
        take: Callable[[Tensor], Tensor],
    ) -> Tensor:
        """Bring this rank's tensor, and `take` from what `work` makes of all."""
        self.tensors[rank] = tensor
        self.barrier.wait()
        if rank == len(self.tensors) - 1:
            self.result = work(self.tensors)
        self.barrier.wait()
        self.tensors[rank] = self.result  # lets go of the rank's own
        taken = take(self.result)
        self.barrier.wait()
        return taken


class ThreadRanks(Ranks):
    """One thread among W. Sums are made in the order of the ranks, and count as traffic as those of a run do."""

    def __init__(self, meeting: Meeting, rank: int, device: torch.device):
        super().__init__(rank=rank, size=len(meeting.tensors), device=device)
        self.meeting = meeting
        self.calls = 0

    def sum_(self, flat: Tensor, purpose: str = "gradients") -> None:
        self.traffic_bytes[purpose] += flat.nbytes
        self._meet(flat, _sum, flat.copy_)

    def sum_parts(self, total: Tensor, flat: Tensor, purpose: str) -> None:
        self.traffic_bytes[purpose] += flat.nbytes
        self._meet(flat, _sum, lambda sums: total.copy_(sums.chunk(self.size)[self.rank]))

    def gather(self, tensor: Tensor) -> Tensor:
        return self._meet(tensor, torch.cat, Tensor.clone)

    def _meet(self, tensor: Tensor, work: Callable[[list[Tensor]], Tensor], take: Callable[[Tensor], Tensor]) -> Tensor:
        self.calls += 1
        with _disable_current_modes():  # who counts what this rank does is not interested in how ranks meet
            return self.meeting.join(self.rank, tensor, work, take)


def _sum(tensors: list[Tensor]) -> Tensor:
    total = tensors[0].clone()
    for tensor in tensors[1:]:
        total += tensor
    return total


def on_threads(size: int, work: Callable[[ThreadRanks], Any], device: str = "cpu") -> list[Any]:
    """Run `work` on each of `size` ranks at once: what it returns on each, in their order."""
    meeting = Meeting(size)

    def run(rank: int) -> Any:
        try:
            return work(ThreadRanks(meeting, rank, torch.device(device)))
        except BaseException:
            meeting.barrier.abort()
            raise

    with ThreadPoolExecutor(size) as threads:
        futures = [threads.submit(run, rank) for rank in range(size)]
        errors = [future.exception() for future in futures]
        for error in errors:
            if error is not None and not isinstance(error, threading.BrokenBarrierError):
                raise error
        return [future.result() for future in futures]
