"""Bytes and peaks of a step, and one large weight's reallocation."""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any

from scale_sft.bench import reallocate
from scale_sft.bench.memory import worker

from .lab import Lab, Skipped

MIB = 1 << 20


def ours(lab: Lab) -> None:
    """Report bytes per trained entry and peaks of our methods."""
    for name in ("ours-ag", "ours-ma"):
        lab.say(name, _memory(lab, name))


def lora(lab: Lab) -> None:
    """Report the same of LoRA, with adapters in fp32 and in bf16."""
    if find_spec("peft") is None:
        raise Skipped("peft is not installed")
    for name in ("peft-lora", "peft-lora-bf16"):
        lab.say(name, _memory(lab, name))


def _memory(lab: Lab, name: str) -> dict[str, Any]:
    found = worker.measure(name, lab.case(), lab.device)
    figures: dict[str, Any] = {"trained": found["trainable"], "base_mib": found["base_bytes"] // MIB}
    for phase, label in (("outside", ""), ("inside", "_in_the_phase")):
        if state := found[phase]:
            figures[f"bytes_each{label}"] = round(sum(state["parts"].values()) / found["trainable"], 2)
            figures[f"peak_mib{label}"] = round(state["peak_bytes"] / MIB, 1)
            figures[f"parts{label}"] = state["parts"]
    return figures


def reallocation(lab: Lab) -> None:
    """Report time and peak of one weight's first reallocation, its proposal included."""
    for case in reallocate.cases([lab.sizes.weight], [lab.sizes.density], ["ag", "ma"], lab.device):
        found = reallocate.measure(case, repeats=2, device=lab.device)
        ms = {
            name.replace("seconds", "ms"): round(1e3 * value, 3) for name, value in found.items() if "seconds" in name
        }
        lab.say(f"ours-{case.method}", {**ms, "peak_mib": round(found["peak_bytes"] / MIB, 1), "weight": case.weights})
