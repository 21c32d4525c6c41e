"""Several ranks on this machine: time, memory and traffic of a step, and a model of larger worlds held against them.

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

from scale_sft.config import Config, load
from scale_sft.errors import UserError
from scale_sft.model import load_model_config
from scale_sft.plan import Facts
from scale_sft.planner import Plan, Planner, proposal_bytes
from scale_sft.report_axes import CYCLE, GREY, WIDTH_INCHES, log_axis
from scale_sft.report_plots import Plot
from scale_sft.spiel.delta import budget

from .page import Part, Table
from .rows import Row, by_case, last_run, machine_name

PREDICTED_RANKS = (8, 16, 32, 64, 128, 256, 512, 1024)
MIB = 1 << 20
_ROOT = Path(__file__).resolve().parents[2]
_PURPOSES = ("gradients", "proposal")  # as a run counts them
_SUMMED = ("gradients of deltas", "gradients of candidates")  # as the planner calls what goes into all-reduces


@dataclass(frozen=True, kw_only=True)
class Worlds:
    """What runs on different numbers of ranks have in common."""

    base: str = "demo"
    data: str = "demo"
    method: str = "ag"
    density: float = 0.02
    sharded: bool = False
    strong: bool = False  # the global batch stays; otherwise each rank's share of it does
    batch: int = 4  # sequences of each rank (weak), or of all (strong)
    max_length: int = 128

    def global_batch(self, ranks: int) -> int:
        return self.batch if self.strong else self.batch * ranks

    def config(self, ranks: int, **others: Any) -> Config:
        """A run over one cycle of reallocation after the first one."""
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
    """Refuse what cannot be run, before anything is.

    Raises:
        UserError: there are fewer GPUs than ranks, or no launch files, or a batch does not divide.
    """
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else None
    if gpus is not None and max(ranks) > gpus:
        raise UserError(f"--ranks: got {max(ranks)}, but there are {gpus} GPUs, and each rank needs its own")
    if not (_ROOT / "launch" / "cpu_2proc.yaml").is_file():
        raise UserError("bench scale: needs a checkout of the source, with its folder launch/; this is an installation")
    odd = [count for count in ranks if worlds.global_batch(count) % count]
    if odd:
        raise UserError(f"--batch: {worlds.batch} sequences do not divide over {odd[0]} ranks; give a multiple")


def predicted(worlds: Worlds, ranks: Sequence[int]) -> list[int]:
    """Numbers of ranks beyond those that are measured; a batch that stays the same must divide over them."""
    return [n for n in PREDICTED_RANKS if n > max(ranks) and worlds.global_batch(n) % n == 0]


def run(worlds: Worlds, ranks: Sequence[int]) -> Iterator[tuple[dict[str, Any], dict[str, Any]]]:
    """(settings, result) of each number of ranks, measured beside modelled; then of larger worlds, modelled."""
    settings = {
        **vars(worlds),
        "device": "cuda" if torch.cuda.is_available() else "cpu",
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
    }
    planner = Planner(load_model_config(worlds.config(1).model))
    for count in ranks:
        of_run = measure(worlds, count)
        yield {**settings, "ranks": count, "measured": True}, {**of_run, **modelled(planner, worlds, count)}
    for count in predicted(worlds, ranks):
        yield {**settings, "ranks": count, "measured": False}, modelled(planner, worlds, count)


def measure(worlds: Worlds, ranks: int) -> dict[str, Any]:
    """One run on that many ranks: medians and means over one cycle of reallocation, of rank 0.

    `step_seconds` median; `phase_step_seconds` median inside the estimation phase; `cycle_seconds` all S steps of the
    cycle; `tokens_per_second` over the cycle; `memory_bytes` at most; `payload_bytes` by purpose: what a rank gives
    into collectives per step, averaged over the cycle, without ZeRO-3's own gathers, which are DeepSpeed's.
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
        _launch([*launcher(ranks, worlds.sharded), "scale_sft/train.py", *words], f"bench scale: {ranks} ranks")
        lines = (Path(config.run.output_dir) / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return of_cycle([json.loads(line) for line in lines], config)


def of_cycle(records: Sequence[Mapping[str, Any]], config: Config) -> dict[str, Any]:
    """What `measure` gives, from the records of a run over G + S steps, the last S of which count."""
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
    """`sent_bytes`: what a rank sends per step, by purpose, with ring algorithms; `modelled_payload_bytes`: what it
    gives into collectives; `modelled_memory_bytes`: its memory at the peak of a step. By `scale-sft plan`."""
    config = worlds.config(ranks)
    plan = planner.plan(config, gpus=ranks)
    return {
        "sent_bytes": plan.traffic,
        "modelled_payload_bytes": payload_of(plan, config, planner.facts(config), ranks),
        "modelled_memory_bytes": plan.step_peak,
    }


def payload_of(plan: Plan, config: Config, facts: Facts, ranks: int) -> dict[str, float]:
    """What a rank gives into collectives per step, on average, where the plan says what it sends.

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
    """`accelerate launch` on this machine: by the shipped configurations where there is no GPU."""
    words = [sys.executable, "-m", "accelerate.commands.launch", "--num_processes", str(ranks)]
    if torch.cuda.is_available():
        if sharded:
            return [*words, "--config_file", "launch/zero3_8gpu.yaml"]
        return [*words, "--num_machines", "1", "--main_process_port", "0", *(["--multi_gpu"] if ranks > 1 else [])]
    if ranks == 1 and not sharded:
        return [*words, "--cpu"]
    return [*words, "--config_file", f"launch/{'cpu_zero3_2proc' if sharded else 'cpu_2proc'}.yaml"]


def _launch(command: Sequence[str], what: str, timeout_seconds: float = 1800) -> None:
    """Run to the end; ranks that are left behind by a time-out or an interruption are ended with their launcher.

    Raises:
        UserError: it ended with an error, or did not end in time.
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


COLUMNS = ("ranks", "step", "in the phase", "tokens / s", "per rank", "memory of rank 0", "into collectives", "by the model",
           "sent, by the model")  # fmt: skip


def cells(settings: dict[str, Any], result: dict[str, Any]) -> list[str]:
    """One line of the table."""
    ranks = settings["ranks"]
    model = [_kib(sum(result["modelled_payload_bytes"].values())), _kib(sum(result["sent_bytes"].values()))]
    if not settings["measured"]:
        return [f"{ranks} (model)", *[""] * 6, *model]
    payload = sum(count for purpose, count in result["payload_bytes"].items() if purpose in _PURPOSES)
    return [
        f"{ranks}",
        f"{1e3 * result['step_seconds']:,.0f} ms",
        f"{1e3 * result['phase_step_seconds']:,.0f} ms",
        f"{result['tokens_per_second']:,.0f}",
        f"{result['tokens_per_second'] / ranks:,.0f}",
        f"{result['memory_bytes'] / MIB:,.0f} MiB",
        _kib(payload),
        *model,
    ]


def part(rows: list[Row]) -> Part:
    """A table and two plots for each kind of worlds on each machine, of its newest invocation."""
    groups = [last_run(group) for group in by_case(rows, ("ranks", "measured"))]
    return Part(
        title="Ranks",
        text=(
            "One cycle of reallocation. Into collectives: what a rank gives into them per step on average, counted by "
            "the run, beside what the planner's arithmetic says; sent: what ring algorithms make of it on the wire, "
            "gathers of a sharded base included (DeepSpeed does those, the run does not count them)."
        ),
        tables=[
            Table(COLUMNS, [cells(row["settings"], row["result"]) for row in group], sources=group, title=_title(group))
            for group in groups
        ],
        plots=[plot for number, group in enumerate(groups) for plot in _plots(group, number)],
    )


def _title(group: list[Row]) -> str:
    settings = group[0]["settings"]
    kept = "the same global batch for every number of ranks" if settings["strong"] else "the same batch for each rank"
    most = max((row["settings"]["ranks"] for row in group if row["settings"]["measured"]), default=1)
    cores = settings["cores"]
    crowded = settings["device"] == "cpu" and most > cores
    return (
        f"{settings['base']}, SFT-{settings['method'].upper()}, density {settings['density']:g}, {kept} "
        f"({settings['batch']} x {settings['max_length']} tokens at most), base "
        f"{'sharded' if settings['sharded'] else 'replicated'}: {machine_name(group[0]['machine'])}"
        + (f". Up to {most} ranks share {cores} cores: times beyond that say nothing" if crowded else "")
    )


def _plots(group: list[Row], number: int) -> list[Plot]:
    return [
        Plot(
            f"scale-time-{number}",
            "Ranks: tokens per second",
            f"{_title(group)}. Measured; dotted: as many times that of the fewest ranks.",
            lambda _: _plot_speed(group),
        ),
        Plot(
            f"scale-traffic-{number}",
            "Ranks: bytes per rank and step",
            f"{_title(group)}. What a rank gives into collectives, measured (points) and modelled (line), and what rings "
            "send.",
            lambda _: _plot_traffic(group),
        ),
    ]


def _plot_speed(rows: list[dict[str, Any]]) -> Any:
    points = [(r["settings"]["ranks"], r["result"]["tokens_per_second"]) for r in rows if r["settings"]["measured"]]
    if not points:
        return "no run has finished"
    figure, ax = _axes("tokens per second")
    ax.plot(*zip(*points, strict=True), color=CYCLE[0], marker="o")
    (fewest, speed), most = points[0], points[-1][0]
    ax.plot([fewest, most], [speed, speed * most / fewest], color=GREY, linestyle=":")
    ax.set_xticks([ranks for ranks, _ in points])
    ax.set_ylim(bottom=0)
    return figure


def _plot_traffic(rows: list[dict[str, Any]]) -> Any:
    import numpy as np

    figure, ax = _axes("KiB per step", base=2)
    several = [row for row in rows if row["settings"]["ranks"] > 1]
    for n, purpose in enumerate(_PURPOSES):
        at = [row["settings"]["ranks"] for row in several]
        values = [row["result"]["modelled_payload_bytes"].get(purpose, 0) / 1024 for row in several]
        ax.plot(at, values, color=CYCLE[n], label=f"{purpose}, modelled")
        found = [
            (row["settings"]["ranks"], row["result"]["payload_bytes"].get(purpose, 0) / 1024)
            for row in several
            if row["settings"]["measured"]
        ]
        ax.plot(*zip(*found, strict=True), "o", color=CYCLE[n], label=f"{purpose}, measured") if found else None
    sent = [sum(row["result"]["sent_bytes"].values()) / 1024 for row in several]
    ax.plot([row["settings"]["ranks"] for row in several], sent, color=GREY, linestyle="--", label="sent by rings")
    shown = [line.get_ydata() for line in ax.lines]
    log_axis(ax, np.concatenate(shown) if shown else np.ones(1))
    ax.legend(loc="best", fontsize=8)
    return figure


def _axes(unit: str, base: int | None = None) -> tuple[Any, Any]:
    from matplotlib.figure import Figure
    from matplotlib.ticker import FuncFormatter

    figure = Figure(figsize=(WIDTH_INCHES, 3.6), layout="constrained")
    ax = figure.subplots()
    ax.set_xscale("log", base=base) if base else None
    ax.set_xlabel("ranks")
    ax.set_ylabel(unit)
    ax.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    return figure, ax


def _kib(count: float) -> str:
    return f"{count / 1024:,.1f} KiB"
