"""Measure the time and peak memory of reallocating one weight, AG proposals included, against N and K.

Shapes: O rows, I columns, N = O * I entries of the weight; K active entries, C = K candidates.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn

from scale_sft.errors import UserError
from scale_sft.kernels.backends import exchanges_of
from scale_sft.kernels.cpu.topk import top_k_magnitude
from scale_sft.model.resident import ResidentDeltas, WeightPart
from scale_sft.reporting.plots import Plot
from scale_sft.reporting.style import CYCLE, GREY, WIDTH_INCHES, log_axis
from scale_sft.spiel.algorithm import SparseFineTuning
from scale_sft.spiel.deltas import DeltaStore
from scale_sft.spiel.schedules import Phase, ReallocationSchedule
from scale_sft.spiel.seeding import seeded_generator
from scale_sft.spiel.settings import Backends, MethodSettings

from .page import Part, part_of_groups
from .peak import available_bytes, peak_of, seconds_of
from .rows import Row, by_case, machine_name, newest

NAME = "weight"
METHODS = ("ag", "ma")
_NOT_OF_A_CASE = ("method", "weights", "density", "shape", "active", "repeats")
_WARM_UP_WEIGHTS = 1 << 15
_BYTES_PER_ACTIVE = 200  # state and the temporaries of drop and grow, roughly
_RESERVE_BYTES = 1 << 28


@dataclass(frozen=True, kw_only=True)
class Case:
    """One weight under one method."""

    method: str  # ag or ma
    weights: int  # N
    density: float  # K / N
    dtype: str = "bfloat16"  # of the weight and of its dense gradient, or float32
    replaced: float = 1.0  # fraction of K up for replacement: 1 at the first reallocation of a run

    @property
    def shape(self) -> tuple[int, int]:
        """The most square shape (O, I) of N entries."""
        rows = next(o for o in range(math.isqrt(self.weights), 0, -1) if self.weights % o == 0)
        return rows, self.weights // rows

    @property
    def active(self) -> int:
        return max(1, int(self.density * self.weights))

    @property
    def needed_bytes(self) -> int:
        """Bytes of weight, dense gradient, state and temporaries."""
        dense = 2 * self.weights * getattr(torch, self.dtype).itemsize
        return dense + _BYTES_PER_ACTIVE * self.active + _RESERVE_BYTES


def cases(
    weights: Sequence[int], densities: Sequence[float], methods: Sequence[str], device: torch.device, **others: Any
) -> list[Case]:
    """List every method with every size and density, small ones first; `others` as in `Case`.

    Raises:
        UserError: a size does not fit the memory.
    """
    found = [
        Case(method=method, weights=n, density=density, **others)
        for n in sorted(weights)
        for density in sorted(densities)
        for method in methods
    ]
    largest, free = max(found, key=lambda case: case.needed_bytes), available_bytes(device)
    if largest.needed_bytes > free:
        fitting = max((case.weights for case in found if case.needed_bytes <= free), default=0)
        raise UserError(
            f"bench reallocate: a weight of {largest.weights:.0e} entries in {largest.dtype}, {largest.density:.2%} of "
            f"them active, needs {largest.needed_bytes / 2**30:.1f} GiB, {free / 2**30:.1f} GiB are free on {device}; "
            + (f"the largest requested that fits has {fitting:.0e}" if fitting else "none of those requested fits")
            + ". Fix: leave larger ones out of --weights"
        )
    return found


class Bench:
    """A weight with its gradient, its deltas and their carrier, ready for any number of reallocations.

    Every step proposes and reallocates. Gradients are normal, accumulators uniform random numbers.
    """

    def __init__(self, case: Case, device: torch.device):
        self.case, self.device, self.step = case, device, 0
        dtype = getattr(torch, case.dtype)
        # ones: the system would allocate the memory of zeros only when they are written, in the middle of a measurement
        self.weight = nn.Parameter(torch.ones(case.shape, dtype=dtype, device=device), requires_grad=False)
        self.gradient = torch.empty(case.shape, dtype=dtype, device=device) if case.method == "ag" else None
        self.random = seeded_generator(0, "bench reallocate", str(case))
        schedule = ReallocationSchedule(
            total_steps=1 << 40,
            update_interval_steps=1,
            estimation_steps=1,
            initial_replacement_fraction=case.replaced,
            estimates=case.method == "ag",
        )
        store = DeltaStore({NAME: case.shape}, {NAME: case.active}, device=device)
        exchanges = exchanges_of(device, "cpu")
        backends = Backends(select=top_k_magnitude, exchanges=exchanges)
        self.tuning = SparseFineTuning(store, MethodSettings(method=case.method), schedule, backends)
        self.carrier = ResidentDeltas(store, {NAME: WeightPart.whole(self.weight)})

    def begin(self) -> None:
        """Open a step with new deltas and a new gradient."""
        self.step += 1
        flat = self.tuning.store.flat
        flat.copy_(torch.randn(flat.shape, generator=self.random))
        if self.gradient is not None:
            _fill_normal(self.gradient, self.random)
            return
        for accumulator in self.tuning.optimizer.state_of(NAME).values():
            accumulator.copy_(torch.rand(accumulator.shape, generator=self.random))

    def record(self, phase: Phase) -> None:
        """Record the dense gradient of one backward pass."""
        self.tuning.recorder.begin_step(phase)
        if self.gradient is not None:
            self.tuning.recorder.record(NAME, self.gradient)

    def estimate(self) -> None:
        """Add one term to the candidates' running estimates."""
        self.tuning.recorder.end_step()

    def reallocate(self) -> int:
        """Drop and grow; returns the number of new entries."""
        return self.tuning.reallocate(self.step, self.carrier).replaced

    def reallocate_with_proposal(self) -> None:
        """Do all that a reallocation adds to a run, except the gathers of the estimation phase."""
        if self.gradient is not None:
            self.record(Phase.PROPOSE)
            self.estimate()
        self.reallocate()


def measure(case: Case, *, repeats: int, device: torch.device) -> dict[str, Any]:
    """Measure medians over `repeats` reallocations of one weight (seconds), and the peak of one more (bytes).

    `propose_seconds` is the proposing backward pass's recording, `record_seconds` that of a step outside the phase,
    `estimate_seconds` that of each other step of the phase; `reallocate_seconds` is drop and grow; `seconds` is the
    cost of one reallocation: all of these except `record_seconds`. `peak_bytes` is the memory of proposal, drop and
    grow above weight, gradient and state, candidates included.
    """
    bench = Bench(case, device)
    steps: list[dict[str, float]] = []
    for _ in range(repeats):
        bench.begin()
        taken = {"reallocate_seconds": 0.0}
        if bench.gradient is not None:
            taken["record_seconds"] = seconds_of(lambda: bench.record(Phase.OFF), device)
            taken["propose_seconds"] = seconds_of(lambda: bench.record(Phase.PROPOSE), device)
            taken["estimate_seconds"] = seconds_of(lambda: bench.record(Phase.ESTIMATE), device)
            bench.estimate()
        taken["reallocate_seconds"] = seconds_of(bench.reallocate, device)
        steps.append(taken)
    result = {name: median(step[name] for step in steps) for name in steps[0]}
    others = max(0.0, result.get("propose_seconds", 0.0) - result.get("record_seconds", 0.0))
    bench.begin()
    peak = peak_of(bench.reallocate_with_proposal, device)
    return {
        **result,
        "seconds": result["reallocate_seconds"] + others,
        "peak_bytes": peak.added,
        "peak_by": peak.by,
    }


def run(
    chosen: Iterable[Case], *, repeats: int, device: torch.device
) -> Iterator[tuple[dict[str, Any], dict[str, Any]]]:
    """Yield (settings, result) of each case, as soon as it is measured."""
    warm: set[str] = set()
    for case in chosen:
        if case.method not in warm:  # excludes lazy loading of code and the start of threads
            measure(replace(case, weights=_WARM_UP_WEIGHTS), repeats=1, device=device)
            warm.add(case.method)
        settings = asdict(case) | {
            "shape": case.shape,
            "active": case.active,
            "repeats": repeats,
            "device": device.type,
            "threads": torch.get_num_threads(),
        }
        yield settings, measure(case, repeats=repeats, device=device)


def _fill_normal(tensor: Tensor, generator: torch.Generator, chunk: int = 1 << 22) -> None:
    """Fill a contiguous tensor with normal numbers in chunks, without another tensor of its size."""
    flat = tensor.view(-1)
    for start in range(0, flat.numel(), chunk):
        part = flat[start : start + chunk]
        part.copy_(torch.randn(part.shape, generator=generator))


COLUMNS = ("method", "N", "K / N", "propose", "drop and grow", "together", "ns per entry", "peak", "peak / N")


def cells(settings: dict[str, Any], result: dict[str, Any]) -> list[str]:
    """Format one line of the table."""
    n = settings["weights"]
    return [
        settings["method"],
        f"{n:.0e}".replace("e+0", "e"),
        f"{settings['density']:.2%}",
        _milliseconds(result.get("propose_seconds")),
        _milliseconds(result["reallocate_seconds"]),
        _milliseconds(result["seconds"]),
        f"{result['seconds'] / n * 1e9:.3g}",
        f"{result['peak_bytes'] / 2**20:,.2f} MiB",
        f"{result['peak_bytes'] / n:.3g} B",
    ]


def part(rows: list[Row]) -> Part:
    """Make a table and two plots for each dtype, fraction replaced and machine, with each weight's newest row."""
    by_size = lambda row: (row["settings"]["weights"], row["settings"]["density"], row["settings"]["method"])
    groups = [sorted(newest(group), key=by_size) for group in by_case(rows, _NOT_OF_A_CASE)]
    return part_of_groups(
        title="One reallocation",
        text=(
            "Time and peak memory of reallocating one weight of N entries, K of them active. All of those are up for "
            "replacement at the first reallocation of a run, a fifth or less later. In AG the candidates are chosen "
            "from a dense gradient. The peak is measured above weight, gradient and state; for comparison, a mask of "
            "the weight would take 1 byte per entry."
        ),
        columns=COLUMNS,
        cells=cells,
        groups=groups,
        title_of=_title,
        plots=_plots,
    )


def _title(group: list[Row]) -> str:
    settings = group[0]["settings"]
    what = f"{settings['dtype']}, {settings['replaced']:.0%} up for replacement, {settings['device']}"
    return f"{what}: {machine_name(group[0]['machine'])}"


def _plots(group: list[Row]) -> list[Plot]:
    return [
        Plot(
            "reallocate-time",
            "One reallocation: time",
            "Proposal, drop and grow by number of entries N, one line per method and density. Grey: one and ten "
            "nanoseconds per entry.",
            lambda _: _plot(group, "seconds", "seconds", {"1 ns N": 1e-9, "10 ns N": 1e-8}),
        ),
        Plot(
            "reallocate-memory",
            "One reallocation: peak memory",
            "Above weight, gradient and state. Grey: a bool mask and an fp32 tensor of N entries.",
            lambda _: _plot(group, "peak_bytes", "MiB", {"N bytes": 1.0, "4 N bytes": 4.0}, unit_size=1 << 20),
        ),
    ]


def _plot(rows: list[dict[str, Any]], key: str, unit: str, guides: dict[str, float], unit_size: float = 1) -> Any:
    import numpy as np
    from matplotlib.figure import Figure

    figure = Figure(figsize=(WIDTH_INCHES, 4.2), layout="constrained")
    ax = figure.subplots()
    lines: dict[tuple[str, float], list[tuple[int, float]]] = {}
    for row in rows:
        settings = row["settings"]
        lines.setdefault((settings["method"], settings["density"]), []).append(
            (settings["weights"], max(row["result"][key], 1e-9) / unit_size)
        )
    sizes = np.array(sorted({row["settings"]["weights"] for row in rows}), dtype=float)
    densities = sorted({density for _, density in lines})
    for (method, density), points in sorted(lines.items()):
        ax.plot(
            *zip(*sorted(points), strict=True),
            color=CYCLE[densities.index(density) % len(CYCLE)],
            linestyle="-" if method == "ag" else "--",
            marker="o" if method == "ag" else "s",
            markersize=4,
            label=f"{method}, K/N {density:.2%}",
        )
    ends = np.array([sizes[0], max(sizes[-1], 10 * sizes[0])])
    for name, slope in guides.items():
        line = slope * ends / unit_size
        ax.plot(ends, line, color=GREY, linestyle=":", linewidth=1.2)
        ax.annotate(name, (ends[-1], line[-1]), color=GREY, ha="right", va="bottom", fontsize=8)
    ax.set_xscale("log")
    log_axis(ax, np.array([value for points in lines.values() for _, value in points]))
    ax.set_xlabel("entries of the weight, N")
    ax.set_ylabel(unit)
    ax.legend(loc="upper left", fontsize=8)
    return figure


def _milliseconds(seconds: float | None) -> str:
    return "" if seconds is None else f"{1e3 * seconds:,.3g} ms"
