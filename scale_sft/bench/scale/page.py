"""Show the results of `scale-sft bench scale`: tables for the console and the page, and two plots."""

from __future__ import annotations

from typing import Any

from scale_sft.bench.page import Part, part_of_groups
from scale_sft.bench.rows import Row, by_case, last_run, machine_name
from scale_sft.reporting.plots import Plot
from scale_sft.reporting.style import CYCLE, GREY, WIDTH_INCHES, log_axis

MIB = 1 << 20
_PURPOSES = ("gradients", "proposal")  # a run's names for them

COLUMNS = ("ranks", "step", "in collectives", "in the phase", "tokens / s", "per rank", "memory of rank 0",
           "into collectives", "by the model", "sent, by the model")  # fmt: skip


def cells(settings: dict[str, Any], result: dict[str, Any]) -> list[str]:
    """Fill one line of the table."""
    ranks = settings["ranks"]
    model = [_kib(sum(result["modelled_payload_bytes"].values())), _kib(sum(result["sent_bytes"].values()))]
    if not settings["measured"]:
        return [f"{ranks} (model)", *[""] * 7, *model]
    payload = sum(count for purpose, count in result["payload_bytes"].items() if purpose in _PURPOSES)
    return [
        f"{ranks}",
        f"{1e3 * result['step_seconds']:,.0f} ms",
        f"{1e3 * result['collective_seconds']:,.1f} ms" if "collective_seconds" in result else "",
        f"{1e3 * result['phase_step_seconds']:,.0f} ms",
        f"{result['tokens_per_second']:,.0f}",
        f"{result['tokens_per_second'] / ranks:,.0f}",
        f"{result['memory_bytes'] / MIB:,.0f} MiB",
        _kib(payload),
        *model,
    ]


def part(rows: list[Row]) -> Part:
    """Show a table and two plots for each case on each machine, from its newest invocation."""
    groups = [last_run(group) for group in by_case(rows, ("ranks", "measured"))]
    return part_of_groups(
        title="Ranks",
        text=(
            "One cycle of reallocation. In collectives: time that a plain step spends in calls that sum gradients and "
            "numbers over the ranks, on the rank where it is longest; this includes waiting for slower ranks, but not "
            "DeepSpeed's gathers of a sharded base. Into collectives: bytes that a rank passes to them per step on "
            "average, as the run counted them and as the planner computes them. Sent: what ring algorithms put on the "
            "wire for that, including the gathers of a sharded base, which the run does not count."
        ),
        columns=COLUMNS,
        cells=cells,
        groups=groups,
        title_of=_title,
        plots=_plots,
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
        + (f". Up to {most} ranks share {cores} cores: times beyond that mean nothing" if crowded else "")
    )


def _plots(group: list[Row]) -> list[Plot]:
    return [
        Plot(
            "scale-time",
            "Ranks: tokens per second",
            "Measured; dotted: perfect scaling from the fewest ranks.",
            lambda _: _plot_speed(group),
        ),
        Plot(
            "scale-traffic",
            "Ranks: bytes per rank and step",
            "Bytes that a rank passes to collectives, measured (points) and modelled (line); dashed: sent by rings.",
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
