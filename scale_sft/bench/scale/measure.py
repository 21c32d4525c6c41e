"""Measure time, memory and traffic of a step on several ranks of this machine, and model larger worlds.

Shapes: W ranks, N entries of a weight, K active entries, C candidates.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch

from scale_sft.config.loading import load
from scale_sft.config.options import Config
from scale_sft.errors import UserError
from scale_sft.model.loading import load_model_config
from scale_sft.planning.footprint import Facts
from scale_sft.planning.planner import Plan, Planner, proposal_bytes
from scale_sft.spiel.budgets import budget

from .page import COLUMNS, cells, part

__all__ = ["COLUMNS", "cells", "part", "run"]

PREDICTED_RANKS = (8, 16, 32, 64, 128, 256, 512, 1024)
RANKS_PER_CORE = 4
"""The most ranks to run per core without a GPU."""
_ROOT = Path(__file__).resolve().parents[3]
_SUMMED = ("gradients of deltas", "gradients of candidates")  # the planner's names for traffic of all-reduces


@dataclass(frozen=True, kw_only=True)
class Worlds:
    """The common settings of runs on different numbers of ranks."""

    base: str = "demo"
    data: str = "demo"
    method: str = "ag"
    density: float = 0.02
    sharded: bool = False
    strong: bool = False  # keep the global batch, otherwise each rank's share of it
    batch: int = 4  # sequences of each rank (weak), or of all (strong)
    max_length: int = 128

    def global_batch(self, ranks: int) -> int:
        return self.batch if self.strong else self.batch * ranks

    def config(self, ranks: int, **others: Any) -> Config:
        """Configure a run over one cycle of reallocation after the first one."""
        options = {
            "base": self.base,
            "train_data": self.data,
            "method": self.method,
            "density": self.density,
            "base_placement": "shard" if self.sharded else "replicate",
            "global_batch_size": self.global_batch(ranks),
            "max_length": self.max_length,
            "log_every_steps": 1,
            **others,
        }
        sparse = load(None, {**options, "steps": 1}).sparse
        return load(None, {**options, "steps": sparse.estimation_steps + sparse.update_interval_steps})


def check(worlds: Worlds, ranks: Sequence[int]) -> None:
    """Refuse impossible runs before the first.

    Raises:
        UserError: GPUs are fewer than ranks, cores are far fewer, launch files are missing, or a batch does not divide.
    """
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else None
    if gpus is not None and max(ranks) > gpus:
        raise UserError(f"--ranks: got {max(ranks)}, but there are {gpus} GPUs, and each rank needs its own")
    most = RANKS_PER_CORE * _cores()
    if gpus is None and max(ranks) > most:
        raise UserError(
            f"--ranks: got {max(ranks)}, but this machine has {_cores()} cores, and more than {most} ranks would only "
            f"wait for each other. Fix: give at most {most}; larger worlds are modelled without a run"
        )
    if not (_ROOT / "launch" / "cpu_2proc.yaml").is_file():
        raise UserError(
            "bench scale: got an installed package, expected a clone with its folder launch/. Fix: run it there"
        )
    odd = [count for count in ranks if worlds.global_batch(count) % count]
    if odd:
        raise UserError(f"--batch: {worlds.batch} sequences do not divide over {odd[0]} ranks. Fix: give a multiple")


def _cores() -> int:
    """Count the cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def predicted(worlds: Worlds, ranks: Sequence[int]) -> list[int]:
    """List larger numbers of ranks to model; a constant global batch must divide over them."""
    return [n for n in PREDICTED_RANKS if n > max(ranks) and worlds.global_batch(n) % n == 0]


def run(worlds: Worlds, ranks: Sequence[int]) -> Iterator[tuple[dict[str, Any], dict[str, Any]]]:
    """Yield (settings, result) of each number of ranks, measured and modelled; then of larger worlds, modelled."""
    settings = {
        **vars(worlds),
        "device": "cuda" if torch.cuda.is_available() else "cpu",
        "cores": _cores(),
    }
    planner = Planner(load_model_config(worlds.config(1).model))
    for count in ranks:
        of_run = measure(worlds, count)
        yield {**settings, "ranks": count, "measured": True}, {**of_run, **modelled(planner, worlds, count)}
    for count in predicted(worlds, ranks):
        yield {**settings, "ranks": count, "measured": False}, modelled(planner, worlds, count)


def measure(worlds: Worlds, ranks: int) -> dict[str, Any]:
    """Run on this many ranks and measure one cycle of reallocation, on rank 0 unless stated otherwise.

    `step_seconds` median; `phase_step_seconds` median inside the estimation phase; `cycle_seconds` all S steps of the
    cycle; `collective_seconds` as in `slowest_in_collectives`; `tokens_per_second` over the cycle; `memory_bytes` at
    most; `payload_bytes` by purpose: bytes that a rank passes to collectives per step, averaged over the cycle, without
    DeepSpeed's gathers of ZeRO-3.
    """
    with tempfile.TemporaryDirectory(prefix="scale-sft-bench-") as folder:
        config = worlds.config(ranks, output_dir=str(Path(folder) / "run"))
        options = {
            "base": worlds.base,
            "train_data": worlds.data,
            "method": worlds.method,
            "density": worlds.density,
            "base_placement": config.model.base_placement,
            "global_batch_size": config.run.global_batch_size,
            "max_length": worlds.max_length,
            "log_every_steps": 1,
            "steps": config.run.steps,
            "output_dir": config.run.output_dir,
        }
        words = [word for name, value in options.items() for word in (f"--{name}", str(value))]
        clocks = Path(folder) / "clocks"
        clocks.mkdir()
        program = ["scale_sft/bench/scale/worker.py", str(clocks)]
        _launch([*launcher(ranks, worlds.sharded), *program, *words], f"bench scale: {ranks} ranks")
        lines = (Path(config.run.output_dir) / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
        collectives = [json.loads((clocks / f"{rank}.json").read_text(encoding="utf-8")) for rank in range(ranks)]
    return of_cycle([json.loads(line) for line in lines], config) | {
        "collective_seconds": slowest_in_collectives(collectives, config)
    }


def slowest_in_collectives(by_rank: Sequence[Mapping[str, float]], config: Config) -> float:
    """Compute the median seconds of a plain step in collectives, on the rank that spends most in them.

    Args:
        by_rank: for each rank, seconds by step number.
    """
    phase, interval = config.sparse.estimation_steps, config.sparse.update_interval_steps
    plain = [str(step) for step in range(phase + 1, interval + 1)]
    return max(median(seconds[step] for step in plain) for seconds in by_rank)


def of_cycle(records: Sequence[Mapping[str, Any]], config: Config) -> dict[str, Any]:
    """Compute the result of `measure` from the records of a run over G + S steps, the last S of which count."""
    steps = [r for r in records if r["event"] == "step" and r["step"] > config.sparse.estimation_steps]
    interval, phase = config.sparse.update_interval_steps, config.sparse.estimation_steps
    outside, inside = steps[: interval - phase], steps[interval - phase :]
    cycle = sum(record["seconds"] for record in steps)
    payload: dict[str, float] = {}
    for record in steps:
        for key, count in record.items():
            if key.startswith("comm_"):
                purpose = key.removeprefix("comm_").removesuffix("_bytes")
                payload[purpose] = payload.get(purpose, 0.0) + count / interval
    return {
        "step_seconds": median(record["seconds"] for record in outside),
        "phase_step_seconds": median(record["seconds"] for record in inside),
        "cycle_seconds": cycle,
        "tokens_per_second": sum(record["tokens"] for record in steps) / cycle,
        "memory_bytes": max(record["memory_bytes"] for record in steps),
        "payload_bytes": payload,
    }


def modelled(planner: Planner, worlds: Worlds, ranks: int) -> dict[str, Any]:
    """Model a number of ranks with `scale-sft plan`.

    `sent_bytes`: bytes that a rank sends per step, by purpose, with ring algorithms; `modelled_payload_bytes`: bytes it
    passes to collectives; `modelled_memory_bytes`: its memory at the peak of a step.
    """
    config = worlds.config(ranks)
    plan = planner.plan(config, gpus=ranks)
    return {
        "sent_bytes": plan.traffic,
        "modelled_payload_bytes": payload_of(plan, config, planner.facts(config), ranks),
        "modelled_memory_bytes": plan.step_peak,
    }


def payload_of(plan: Plan, config: Config, facts: Facts, ranks: int) -> dict[str, float]:
    """Compute the bytes that a rank passes to collectives per step, on average, from the bytes that the plan sends.

    An all-reduce of n bytes sends 2 n (W - 1) / W by a ring, a reduce-scatter half of that, an all-gather n (W - 1).
    """
    if ranks == 1:
        return {}
    ring, sparse = (ranks - 1) / ranks, config.sparse
    found = {"gradients": sum(plan.traffic.get(name, 0) for name in _SUMMED) / (2 * ring)}
    if "proposal of candidates" in plan.traffic:
        counts = budget(facts.shapes, density=sparse.density)
        found["proposal"] = sum(proposal_bytes(config, facts, counts, ranks)) / sparse.update_interval_steps
    return found


def launcher(ranks: int, sharded: bool) -> list[str]:
    """Build the `accelerate launch` command for this machine, with the shipped configurations if it has no GPU."""
    words = [sys.executable, "-m", "accelerate.commands.launch", "--num_processes", str(ranks)]
    if torch.cuda.is_available():
        if sharded:
            return [*words, "--config_file", "launch/zero3_8gpu.yaml"]
        return [*words, "--num_machines", "1", "--main_process_port", "0", *(["--multi_gpu"] if ranks > 1 else [])]
    if ranks == 1 and not sharded:
        return [*words, "--cpu"]
    return [*words, "--config_file", f"launch/{'cpu_zero3_2proc' if sharded else 'cpu_2proc'}.yaml"]


def _launch(command: Sequence[str], what: str, timeout_seconds: float = 1800) -> None:
    """Run a command to its end; after a time-out or an interruption, end the ranks along with their launcher.

    Raises:
        UserError: it failed, or did not end in time.
    """
    environment = {"OMP_NUM_THREADS": "1", "TQDM_DISABLE": "1", "PYTHONPATH": str(_ROOT)}
    with tempfile.TemporaryFile("w+") as said:
        child = subprocess.Popen(
            command,
            cwd=_ROOT,
            env=os.environ | environment,
            stdin=subprocess.DEVNULL,
            stdout=said,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            status = child.wait(timeout_seconds)
        except subprocess.TimeoutExpired:
            raise UserError(f"{what}: not finished within {timeout_seconds:.0f} seconds") from None
        finally:
            if child.poll() is None:
                _end_session(child)
        if status:
            said.seek(0)
            lines = said.read().strip().splitlines()
            told = next((line for line in lines if line.startswith("error: ")), lines[-1] if lines else "no message")
            raise UserError(f"{what}: ended with status {status}: {told}")


def _end_session(child: subprocess.Popen) -> None:
    for sign in (signal.SIGTERM, signal.SIGKILL):
        with suppress(ProcessLookupError):
            os.killpg(child.pid, sign)
        with suppress(subprocess.TimeoutExpired):
            child.wait(10)
