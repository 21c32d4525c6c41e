"""The interface between a model and the processes that train it together, and its version for a single process."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from scale_sft.kernels.cpu.topk import largest_magnitudes
from scale_sft.spiel.selection.parts import Parts, WholeParts

from .fingerprints import fingerprints_of
from .resident import WeightPart


class Group(Parts, Protocol):
    """Processes that train one model together. All of them make the same calls in the same order."""

    @property
    def device(self) -> torch.device:
        """The device of this process."""

    @property
    def size(self) -> int:
        """The number of processes."""

    def select_candidates(self, gradient: Tensor, count: int) -> Tensor:
        """Choose the entries of largest magnitude of a gradient [N] summed over the processes.

        Returns:
            [count] int64, sorted; [0] if all of the gradient is 0.
        """

    def gather_objects(self, value: Any) -> list[Any]:
        """Collect a small object from each process."""

    def on_main(self, work: Callable[[], Any]) -> Any:
        """Let the first process do `work`, on files; returns its result everywhere."""

    def check_identical(self, take_digests: Callable[[], Mapping[str, str]], what: str) -> None:
        """Raise UserError if the processes' digests differ."""

    def prepare(self, model: nn.Module) -> nn.Module:
        """Place the frozen model, in shards or whole; returns what forward passes go through."""

    def materialize(self, weight: nn.Parameter) -> AbstractContextManager[Tensor]:
        """Give the whole weight for the length of a `with` block."""

    def part_of(self, weight: nn.Parameter) -> WeightPart:
        """Describe the part of a weight that this process holds."""

    def settle(self) -> None:
        """Make weights safe to read and write."""

    def written(self) -> None:
        """Make writes into weights visible to every reader."""

    def fingerprints(self, parts: Mapping[str, WeightPart]) -> dict[str, tuple[int, int]]:
        """Fingerprint each whole weight, whatever parts of it this process holds."""


@dataclass(frozen=True)
class OneProcess(WholeParts):
    """A process that trains alone and holds the base whole: nothing is summed, gathered or cut."""

    device: torch.device
    size: int = 1

    def select_candidates(self, gradient: Tensor, count: int) -> Tensor:
        """Choose the entries of largest magnitude of a gradient [N]: [count] int64, sorted; [0] if all of it is 0."""
        return largest_magnitudes(gradient, count)

    def gather_objects(self, value: Any) -> list[Any]:
        """Return the only process's object."""
        return [value]

    def on_main(self, work: Callable[[], Any]) -> Any:
        """Do the work."""
        return work()

    def check_identical(self, take_digests: Callable[[], Mapping[str, str]], what: str) -> None:
        """Compare nothing: one process agrees with itself."""

    def prepare(self, model: nn.Module) -> nn.Module:
        """Return the model as it is."""
        return model

    def materialize(self, weight: nn.Parameter) -> AbstractContextManager[Tensor]:
        """Give the weight as it is."""
        return nullcontext(weight.detach())

    def part_of(self, weight: nn.Parameter) -> WeightPart:
        """Describe the whole weight."""
        return WeightPart.whole(weight)

    def settle(self) -> None:
        """Do nothing: the weights are always in place."""

    def written(self) -> None:
        """Do nothing: every reader sees the weights themselves."""

    def fingerprints(self, parts: Mapping[str, WeightPart]) -> dict[str, tuple[int, int]]:
        """Fingerprint each weight."""
        return fingerprints_of(parts)
