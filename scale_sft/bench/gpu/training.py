"""Whole runs: the demo on this device, again, and on the CPU; and long sequences, which must repeat their bits."""

from __future__ import annotations

import json
import shutil
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

from scale_sft.config.loading import load
from scale_sft.files import ASSETS
from scale_sft.model import determinism

from .checks import attention_bits
from .lab import Lab, Skipped
from .steps import FLOOR, Entrant, race

_QUIET = {
    "log_every_steps": 1, "exact_match_examples": 0, "save_merged": False, "eval_every_steps": 1000,
    "save_every_steps": 1000, "resume": "never", "generation_samples": 0,
}  # fmt: skip
_WIDE = {"hidden_size": 1024, "intermediate_size": 2816, "num_attention_heads": 8, "num_key_value_heads": 8}


@dataclass(frozen=True)
class Finished:
    """A finished run."""

    seconds: float
    losses: list[float]  # by step
    evaluations: list[float]
    adapter: bytes

    @classmethod
    def read(cls, folder: Path) -> Finished:
        """Read a run's folder, and what `_train` noted there."""
        lines = (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
        records = [json.loads(line) for line in lines]
        losses = {event: [r["loss"] for r in records if r["event"] == event] for event in ("step", "eval")}
        adapter = (folder / "adapter" / "adapter_model.safetensors").read_bytes()
        return cls(float((folder / "seconds").read_text()), losses["step"], losses["eval"], adapter)

    def figures(self) -> dict[str, Any]:
        """Return what a row shows."""
        return {"seconds": round(self.seconds, 1), "last_loss": self.losses[-1], "evaluations": self.evaluations}

    def distance(self, other: Finished) -> float:
        """Compute the largest relative difference of a step's loss."""
        return max(abs(mine - its) / abs(its) for mine, its in zip(self.losses, other.losses, strict=True))


def demo(lab: Lab) -> None:
    """Run the demo, with kernels."""
    lab.say("demo", _demo(lab, "demo").figures())


def demo_again(lab: Lab) -> None:
    """Run the demo again, and compare bits."""
    again, first = _demo(lab, "demo_again"), _earlier(lab, "demo")
    lab.say("demo again", {**again.figures(), "same_bits": again.adapter == first.adapter})


def demo_cpu(lab: Lab) -> None:
    """Run the demo on the CPU, and compare losses. The campaign hides the GPU from this section."""
    on_cpu, first = _demo(lab, "demo_cpu"), _earlier(lab, "demo")
    lab.say("demo on the CPU", {**on_cpu.figures(), "largest_difference_of_a_loss": first.distance(on_cpu)})


def _demo(lab: Lab, name: str) -> Finished:
    options = {**_QUIET, "steps": lab.sizes.demo_steps, "max_eval_examples": 64}
    if lab.sizes.tiny:
        options |= {"global_batch_size": 4, "max_eval_examples": 8}
    return _train(lab.scratch / name, "demo", options)


def _earlier(lab: Lab, name: str) -> Finished:
    try:
        return Finished.read(lab.scratch / name)
    except OSError:
        raise Skipped(f"section {name} has left no run to compare with") from None


def repeated(lab: Lab) -> None:
    """Train twice on long packed sequences, and compare bits."""
    _repeat(lab, deterministic=False)


def deterministic(lab: Lab) -> None:
    """Do the same by option `deterministic`; then compare attention's bits, and time a step, under its settings."""
    _repeat(lab, deterministic=True)
    with determinism.deterministic(True):
        for what, found in attention_bits(lab).items():
            lab.say(f"attention, {what}", found)
        race(lab, [Entrant("ours-ag"), Entrant(FLOOR)], 8)


def _repeat(lab: Lab, *, deterministic: bool) -> None:
    base, length = _long_base(lab), 64 if lab.sizes.tiny else lab.sizes.length
    options = {
        **_QUIET, "base": str(base), "train_data": "demo", "eval_data": None, "dtype": "bfloat16", "max_length": length,
        "packing": True, "steps": 6, "global_batch_size": 2, "density": lab.sizes.density, "update_interval_steps": 3,
        "estimation_steps": 2, "learning_rate": 0.01, "deterministic": deterministic,
    }  # fmt: skip
    first, second = (_train(base.with_name(f"{base.name}-{number}"), None, options) for number in range(2))
    same = first.adapter == second.adapter
    lab.say("trained twice", {**second.figures(), "same_bits": same, "largest_difference": second.distance(first)})


def _long_base(lab: Lab) -> Path:
    """Make a random Llama with the demo's tokenizer, and with weights, heads as wide as those of 7B."""
    from transformers import AutoConfig, AutoModelForCausalLM

    folder = Path(tempfile.mkdtemp(prefix="long-", dir=lab.scratch))
    weights = shutil.ignore_patterns("*.safetensors")
    shutil.copytree(ASSETS / "demo" / "base", folder, ignore=weights, dirs_exist_ok=True)
    positions = {"max_position_embeddings": max(256, lab.sizes.length), "num_hidden_layers": 2}
    config = json.loads((folder / "config.json").read_text(encoding="utf-8")) | positions
    config |= {} if lab.sizes.tiny else _WIDE
    config.pop("head_dim", None)
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder)).save_pretrained(folder)
    return folder


def _train(folder: Path, recipe: str | None, options: dict[str, Any]) -> Finished:
    from scale_sft.train import run_training
    from scale_sft.training import lifecycle

    config, began = load(recipe, {**options, "output_dir": str(folder)}), time.perf_counter()
    with patch.object(lifecycle, "write_report", lambda run: run):  # plots take longer than the run
        run_training(config)
    (folder / "seconds").write_text(str(time.perf_counter() - began))
    return Finished.read(folder)
