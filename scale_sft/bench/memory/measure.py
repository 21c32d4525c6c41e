"""Compare memory: a training step above the frozen base, and bytes per trained parameter by part."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from typing import Any

import torch

from scale_sft.bench.child import ask
from scale_sft.bench.contestants import CONTESTANTS, impossible
from scale_sft.bench.page import Part, part_of_groups
from scale_sft.bench.rows import Row, by_case, machine_name, newest
from scale_sft.bench.step.page import describe_sizes
from scale_sft.bench.workload import Case
from scale_sft.errors import UserError
from scale_sft.reporting.plots import Plot
from scale_sft.reporting.style import CYCLE, WIDTH_INCHES

LIMIT_STEPS = 30  # of the paper's protocol
NO_GPU = "needs a GPU"
GIB, MIB = 1 << 30, 1 << 20
_PARTS = (
    "indices", "deltas", "ages", "base values", "gradients", "moments", "accumulators", "candidates", "adapter",
)  # fmt: skip
_TIMEOUT_SECONDS = 3600
_NOT_OF_A_CASE = ("contestant", "dtype", "quantization", "limit_steps")  # in columns, or not in the title


def run(
    names: Sequence[str], cases: Sequence[Case], *, device: torch.device, limit_steps: int | None
) -> Iterator[tuple[dict[str, Any], dict[str, Any]]]:
    """Measure each contestant in each case, in its own process; yields (settings, result).

    Args:
        limit_steps: steps that must pass in the search for the smallest limit (paper, section 4.3); None: no search.

    Raises:
        UserError: a contestant cannot run here.
    """
    for case in cases:
        for name in names:
            settings = {"contestant": name, **case.settings(), "device": device.type, "limit_steps": limit_steps}
            why = impossible(name, case)
            yield settings, {"left_out": why} if why else measure(name, case, device=device, limit_steps=limit_steps)


def known(names: Sequence[str]) -> list[str]:
    """Return the names if all are contestants.

    Raises:
        UserError: the message names an unknown one, and the contestants.
    """
    wrong = [name for name in names if name not in CONTESTANTS]
    if wrong or not names:
        raise UserError(f"--contestants: got '{', '.join(wrong)}', expected some of {', '.join(CONTESTANTS)}")
    return list(names)


def measure(name: str, case: Case, *, device: torch.device, limit_steps: int | None) -> dict[str, Any]:
    """Return the result of `worker.measure`, and `smallest_limit_gib` (None: see `no_limit_because`)."""
    request = {"name": name, "case": asdict(case), "device": str(device)}
    what = f"bench memory: {name} in {case.dtype}"
    result = _answer(ask("memory.worker", request, what=what, timeout_seconds=_TIMEOUT_SECONDS), what)
    if device.type != "cuda" or limit_steps is None:
        because = NO_GPU if limit_steps is not None else "not asked for"
        return {**result, "smallest_limit_gib": None, "no_limit_because": because}

    def passes(limit_gib: int) -> bool:
        limited = request | {"limit_bytes": limit_gib * GIB, "steps": limit_steps}
        return _answer(ask("memory.worker", limited, what=what, timeout_seconds=_TIMEOUT_SECONDS), what)["fits"]

    total = torch.cuda.get_device_properties(device).total_memory // GIB
    return {**result, "smallest_limit_gib": smallest_limit(passes, total)}


def smallest_limit(passes: Callable[[int], bool], total_gib: int) -> int | None:
    """Find the smallest whole number of GiB, at most `total_gib`, under which a run passes; None if not even that does.

    The paper's protocol (section 4.3): the smallest limit, on a grid of 1 GiB, under which 30 steps pass.
    """
    if total_gib < 1 or not passes(total_gib):
        return None
    low, high = 0, total_gib  # fails under low, passes under high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if passes(middle) else (middle, high)
    return high


def _answer(answer: dict[str, Any], what: str) -> dict[str, Any]:
    if "error" in answer:
        raise UserError(f"{what}: {answer['error']}")
    return answer


COLUMNS = ("contestant", "base", "trained", "bytes each", "in the phase", "kept", "peak of a step", "in the phase",
           "smallest limit")  # fmt: skip


def cells(settings: dict[str, Any], result: dict[str, Any]) -> list[str]:
    """Format one line of the table."""
    head = [settings["contestant"], _base_of(settings)]
    if "left_out" in result:
        return [*head, f"left out: {result['left_out']}", *[""] * (len(COLUMNS) - 3)]
    outside, inside, trained = result["outside"], result["inside"], result["trainable"]
    limit = result["smallest_limit_gib"]
    return [
        *head,
        f"{trained:,}",
        f"{_each(outside, trained):.2f}",
        f"{_each(inside, trained):.2f}" if inside else "",
        _mib(outside["kept_bytes"]),
        _mib(outside["peak_bytes"]),
        _mib(inside["peak_bytes"]) if inside else "",
        result.get("no_limit_because", "none") if limit is None else f"{limit} GiB",
    ]


def part(rows: list[Row]) -> Part:
    """Make a table and two plots for each case on each machine, with each contestant's newest row."""
    groups = [newest(group) for group in by_case(rows, _NOT_OF_A_CASE)]
    return part_of_groups(
        title="Memory",
        text=(
            "All figures are above the frozen base. Bytes each: state per trained parameter, including gradients "
            "(which in PEFT and dense training exist only inside a step). Kept: memory that stays from step to step. "
            "Peak of a step: kept, plus the most that forward, backward and update need. In the phase: with estimation "
            "and reallocation (SFT-MA has no estimation, only the reallocation). Smallest limit: the least memory, in "
            "whole GiB, under which the first steps of a run pass."
        ),
        columns=COLUMNS,
        cells=cells,
        groups=groups,
        title_of=_title,
        plots=_plots,
    )


def _title(group: list[Row]) -> str:
    settings = group[0]["settings"]
    return f"{describe_sizes(settings)}, {settings['device']}: {machine_name(group[0]['machine'])}"


def _plots(group: list[Row]) -> list[Plot]:
    measured = [row for row in group if "left_out" not in row["result"]]
    if not measured:
        return []
    return [
        Plot(
            "memory-parts",
            "Memory: bytes per trained parameter",
            "By part, outside the estimation phase and (lower bar) inside it.",
            lambda _: _plot_parts(measured),
        ),
        Plot(
            "memory-peak",
            "Memory: peak of a step above the frozen base",
            "Memory that stays from step to step, and memory that a step allocates and frees.",
            lambda _: _plot_peaks(measured),
        ),
    ]


def _bars(measured: list[dict[str, Any]]) -> list[tuple[str, dict[str, Any], int]]:
    """List (label, outside or inside, trained) of each bar."""
    bars = []
    for row in measured:
        result, label = row["result"], f"{row['settings']['contestant']}, {_base_of(row['settings'])}"
        bars.append((label, result["outside"], result["trainable"]))
        if result["inside"]:
            bars.append((f"{label}, in the phase", result["inside"], result["trainable"]))
    return bars


def _plot_parts(measured: list[dict[str, Any]]) -> Any:
    bars = _bars(measured)
    found = {name for _, state, _ in bars for name in state["parts"]}
    names = [name for name in _PARTS if name in found] + sorted(found - set(_PARTS))
    values = {name: [state["parts"].get(name, 0) / trained for _, state, trained in bars] for name in names}
    return _stacked([label for label, _, _ in bars], values, "bytes per trained parameter", "{:.1f}")


def _plot_peaks(measured: list[dict[str, Any]]) -> Any:
    bars = _bars(measured)
    values = {
        "kept": [state["kept_bytes"] / MIB for _, state, _ in bars],
        "taken by a step": [state["step_bytes"] / MIB for _, state, _ in bars],
    }
    return _stacked([label for label, _, _ in bars], values, "MiB above the frozen base", "{:,.0f}")


def _stacked(labels: list[str], values: dict[str, list[float]], unit: str, form: str) -> Any:
    """Draw horizontal bars, one per label from top to bottom, with their sums."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(WIDTH_INCHES, 1.2 + 0.32 * len(labels)), layout="constrained")
    ax = figure.subplots()
    left = [0.0] * len(labels)
    for n, (name, widths) in enumerate(values.items()):
        ax.barh(range(len(labels)), widths, left=left, color=CYCLE[n % len(CYCLE)], height=0.7, label=name,
                hatch="//" if n >= len(CYCLE) else None)  # fmt: skip
        left = [a + b for a, b in zip(left, widths, strict=True)]
    for place, total in enumerate(left):
        ax.text(total, place, " " + form.format(total), va="center", fontsize=8)
    ax.set_yticks(range(len(labels)), labels, fontsize=8)
    ax.set_xlim(0, 1.12 * max(left))
    ax.invert_yaxis()
    ax.grid(axis="y", visible=False)
    ax.set_xlabel(unit)
    ax.legend(loc="lower center", bbox_to_anchor=(0.4, 1.0), ncols=5, fontsize=8)
    return figure


def _base_of(settings: dict[str, Any]) -> str:
    return settings["dtype"] if settings["quantization"] == "none" else settings["quantization"]


def _each(state: dict[str, Any], trained: int) -> float:
    return sum(state["parts"].values()) / trained


def _mib(count: int) -> str:
    return f"{count / MIB:,.1f} MiB"
