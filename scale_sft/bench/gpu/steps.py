"""Time steps of several contestants in turns, and whole cycles of reallocation."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import partial
from importlib.util import find_spec
from typing import Any

from scale_sft.bench.contestants import CONTESTANTS, Contestant, Sparse, impossible
from scale_sft.bench.peak import seconds_of
from scale_sft.bench.step.race import quartiles, timed_step, undisturbed
from scale_sft.bench.workload import Base, Batches, Case
from scale_sft.errors import UserError
from scale_sft.model import compiled_blocks
from scale_sft.spiel.schedules import Phase, ReallocationSchedule

from .lab import Lab, Skipped

FLOOR = "frozen"
WARM_UP_STEPS = 3


@dataclass(frozen=True)
class Entrant:
    """A contestant under a label of its own, with settings that differ from the others'."""

    contestant: str
    label: str = ""
    changes: dict[str, Any] = field(default_factory=dict)

    @property
    def name(self) -> str:
        return self.label or self.contestant


def step(lab: Lab) -> None:
    """Race one ordinary step of every kind of training, ours also without kernels."""
    plain = Entrant("ours-ag", "ours-ag, kernels cpu", {"kernels": "cpu"})
    race(
        lab,
        [
            *_entrants("ours-ag", "ours-ma", "ours-columns"),
            plain,
            *_entrants("peft-lora", "peft-lora-bf16", "full", FLOOR),
        ],
        15,
    )


def low_density(lab: Lab) -> None:
    """Race a step with as many trained entries as LoRA of rank 16."""
    race(
        lab, _entrants("ours-ag", "ours-ma", "ours-columns", "peft-lora-bf16", FLOOR), 10, density=lab.sizes.low_density
    )


def four_bits(lab: Lab) -> None:
    """Race steps on a base in nf4 with those on the same base in bf16."""
    if find_spec("bitsandbytes") is None:
        raise Skipped("bitsandbytes is not installed")
    packed = [Entrant(name, f"{name} in nf4", {"quantization": "nf4"}) for name in ("ours-ag", "peft-lora-bf16", FLOOR)]
    race(lab, [*_entrants("ours-ag", FLOOR), *packed], 8)


def checkpointing(lab: Lab) -> None:
    """Race steps that recompute each block in the backward pass."""
    race(lab, _entrants("ours-ag", "peft-lora-bf16", "full", FLOOR), 8, gradient_checkpointing=True)


def compiled(lab: Lab) -> None:
    """Race steps whose blocks are compiled with steps of plain torch."""
    if lab.sizes.tiny:  # the compiler takes half a minute on a CPU
        compiled_blocks.BACKEND = "aot_eager"
    names = ("ours-ag", "peft-lora-bf16", FLOOR)
    fast = [Entrant(name, f"{name}, compiled", {"compile": "blocks"}) for name in names]
    race(lab, [*fast, *_entrants("ours-ag", FLOOR)], 10)


def _entrants(*names: str) -> list[Entrant]:
    return [Entrant(name) for name in names]


def race(lab: Lab, entrants: Sequence[Entrant], rounds: int, **shared: Any) -> None:
    """Report the median step of each entrant, and over that of the frozen floor: its own settings' if it takes part.

    All take turns, forwards and backwards, and ratios compare steps of one round.
    """
    with undisturbed():
        ready, batches = _made(lab, entrants, shared)
        times: dict[str, list[float]] = {name: [] for name in ready}
        for number in range(lab.few(rounds)):
            for name in list(ready)[:: 1 if number % 2 else -1]:
                times[name].append(timed_step(ready[name], batches, number, lab.device).wall)
    for entrant in entrants:
        if entrant.name not in ready:
            continue
        taken, floor = times[entrant.name], times.get(FLOOR)
        figures = {
            "ms": _ms(statistics.median(taken)),
            "quartiles_ms": [_ms(value) for value in quartiles(taken)],
            "trained": ready[entrant.name].trainable,
            "fused": _fused(ready[entrant.name]),
        }
        if floor:
            figures["over_frozen"] = round(statistics.median(a / b for a, b in zip(taken, floor, strict=True)), 3)
        lab.say(entrant.name, figures)


def _made(lab: Lab, entrants: Iterable[Entrant], shared: dict[str, Any]) -> tuple[dict[str, Contestant], Batches]:
    """Make and warm up all entrants that can take part; the others are reported with the reason."""
    ready: dict[str, Contestant] = {}
    bases: dict[Case, Base] = {}  # one of a case: to quantise a random model it is written to disk once
    batches = None
    for entrant in entrants:
        case = lab.case(**{**shared, **entrant.changes})
        try:
            if why := impossible(entrant.contestant, case):
                raise UserError(why)
            base = bases.get(case) or bases.setdefault(case, Base(case, lab.device))
            batches = batches or Batches(case, base.model_config.vocab_size, lab.device)
            one = CONTESTANTS[entrant.contestant](base)
            one.warm_up(batches)
            for number in range(lab.few(WARM_UP_STEPS)):
                one.step(batches, number)
        except UserError as reason:
            lab.say(entrant.name, {"skipped": str(reason)})
            continue
        ready[entrant.name] = one
    if batches is None or not ready:
        raise Skipped("no contestant can take part")
    return ready, batches


def cycle(lab: Lab) -> None:
    """Report a step on average over whole cycles of reallocation, each next to a step of the frozen floor.

    A cycle has ordinary steps, the steps of the estimation phase, the first of which proposes, and one that drops and
    grows: each counts as often as it happens.
    """
    with undisturbed():
        ready, batches = _made(lab, _entrants("ours-ag", "ours-ma", FLOOR), {})
        floor = ready.pop(FLOOR)
        for name, ours in ready.items():
            if isinstance(ours, Sparse):
                lab.say(name, _cycle(lab, ours, floor, batches))


def _cycle(lab: Lab, ours: Sparse, floor: Contestant, batches: Batches) -> dict[str, Any]:
    schedule, device = ours.tuning.schedule, lab.device
    interval = schedule.update_interval_steps
    for number in range(schedule.estimation_steps):  # not timed: buffers are allocated, kernels compiled
        ours.step_at(interval + 1 + number, batches, number)
    seconds: dict[int, list[float]] = {number: [] for number in range(interval)}  # by place in the cycle
    floors: list[float] = []
    kinds: dict[str, list[float]] = {}
    for at in range(2 * interval, (2 + lab.sizes.cycles) * interval):
        taken = seconds_of(partial(ours.step_at, at + 1, batches, at), device)
        seconds[at % interval].append(taken)
        kinds.setdefault(_kind(schedule, at + 1), []).append(taken)
        floors.append(seconds_of(partial(floor.step, batches, at), device))
    mean, frozen = statistics.mean(map(statistics.median, seconds.values())), statistics.median(floors)
    return {
        "ms": _ms(mean),
        "over_frozen": round(mean / frozen, 3),
        "frozen_ms": _ms(frozen),
        **{f"{kind}_ms": _ms(statistics.median(taken)) for kind, taken in kinds.items()},
        "digests_ms": _ms(min(seconds_of(ours.tuning.digests, device) for _ in range(lab.few(3)))),
        "interval_steps": interval,
        "trained": ours.trainable,
        "fused": _fused(ours),
    }


def _kind(schedule: ReallocationSchedule, step: int) -> str:
    if schedule.reallocates_at(step):
        return "reallocate"
    phase = schedule.phase(step)
    return "ordinary" if phase is Phase.OFF else phase.value


def _fused(one: Contestant) -> bool | None:
    """Return whether ours updates and writes in one pass; None for others."""
    return one.sparse.fused if isinstance(one, Sparse) else None


def _ms(seconds: float) -> float:
    return round(1e3 * seconds, 3)
