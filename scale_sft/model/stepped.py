"""The interface between an optimizer step and the model whose deltas it moves."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Protocol

from torch import Tensor, nn

from scale_sft.spiel.algorithm import SparseFineTuning

from .group import Group
from .resident import ResidentDeltas
from .sparse_settings import SparseSettings
from .targets import Target
from .transient import TransientDeltas


class Choosing(Protocol):
    """The part of `FirstChoice` that a step uses."""

    def record(self, name: str, left: Tensor, right: Tensor, *, more: bool = False) -> None: ...

    def step(self) -> bool: ...


class Sparse(Protocol):
    """The part of `SparseModel` that a step uses."""

    settings: SparseSettings
    group: Group
    tuning: SparseFineTuning
    targets: list[Target]
    shapes: dict[str, tuple[int, int]]
    carrier: ResidentDeltas | TransientDeltas
    parameter: nn.Parameter
    fused: bool
    overwritten: bool

    choosing: Choosing | None

    @property
    def base_hash(self) -> str: ...

    def check_base(self, what: str) -> None: ...

    def require_attached(self, what: str) -> None: ...

    def join(self) -> None: ...

    def require_joined(self) -> None: ...

    def require_intact(self, what: str) -> None: ...

    def rebuild(self, active: Mapping[str, Tensor] | Mapping[str, int]) -> None: ...

    def load_state(
        self,
        step: int,
        states: Iterable[tuple[str, Mapping[str, Tensor]]],
        counters: Mapping[str, list[int]],
        base: Mapping[str, Tensor] | None = None,
    ) -> None: ...
