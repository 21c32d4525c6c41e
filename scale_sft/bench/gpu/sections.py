"""What a campaign measures, in order of value: what comes last is left out first when time is short."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib import import_module
from typing import TYPE_CHECKING, Any

from scale_sft.config.spelling import unknown
from scale_sft.errors import UserError

if TYPE_CHECKING:
    from .lab import Lab


@dataclass(frozen=True)
class Section:
    """One part of a campaign, which runs in a process of its own."""

    name: str
    seconds: float  # that it needs on an H200, with a margin
    work: str  # 'module:function' of one `Lab`
    about: str
    on_cpu: bool = False  # the GPU is hidden from it
    environment: Mapping[str, str] = field(default_factory=dict)  # of its process, before that looks for a GPU

    def run(self, lab: Lab) -> None:
        """Do the work; this imports its module."""
        module, function = self.work.split(":")
        getattr(import_module(module), function)(lab)


def _own(name: str, seconds: float, work: str, about: str, **others: Any) -> Section:
    return Section(name, seconds, f"{__package__}.{work}", about, **others)


SECTIONS = (
    _own("device", 30, "checks:device", "names, versions, products per second, bytes per second"),
    _own("kernels", 60, "checks:kernels", "the tests of the kernels, from a clone"),
    _own("step", 60, "steps:step", "a step of ours, LoRA, dense training and the frozen floor"),
    _own("cycle", 45, "steps:cycle", "a step on average over whole cycles of reallocation: what a user pays"),
    _own("parts", 30, "parts:parts", "launches, waits and milliseconds by part of a step"),
    _own("demo", 40, "training:demo", "the demo's losses"),
    _own("demo_again", 40, "training:demo_again", "the same run again: the same bits?"),
    _own("demo_cpu", 60, "training:demo_cpu", "the same run on the CPU: the same losses?", on_cpu=True),
    _own("memory", 30, "memory:ours", "bytes per entry and the peak of a step"),
    _own("memory_lora", 30, "memory:lora", "the same of LoRA"),
    _own("four_bits", 45, "steps:four_bits", "what a base in 4 bits costs a step, ours and LoRA's"),
    _own("low_density", 30, "steps:low_density", "a step with as few entries as LoRA of rank 16"),
    _own("reallocation", 15, "memory:reallocation", "one large weight's reallocation"),
    _own("attention", 15, "checks:attention", "whether attention's backward pass repeats its bits"),
    _own("repeated", 30, "training:repeated", "whether runs on long sequences repeat their bits"),
    _own("deterministic", 45, "training:deterministic", "the same by option `deterministic`, and what it costs",
         environment={"CUBLAS_WORKSPACE_CONFIG": ":4096:8"}),
    _own("vocabulary", 20, "checks:vocabulary", "time and memory of the loss with 128k tokens to choose from"),
    _own("checkpointing", 45, "steps:checkpointing", "a step that recomputes its blocks"),
    _own("compiled", 90, "steps:compiled", "the race under torch.compile"),
)  # fmt: skip


def chosen(names: Sequence[str]) -> list[Section]:
    """Look up sections by name, in their own order; all for none.

    Raises:
        UserError: there is no such section.
    """
    known = [section.name for section in SECTIONS]
    for name in names:
        if name not in known:
            raise UserError(f"--only: {unknown(f'section {name!r}', name, known)}")
    return [section for section in SECTIONS if not names or section.name in names]
