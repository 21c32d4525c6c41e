"""Show the results of `scale-sft bench step`: tables for the console and the page, and two plots."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from scale_sft.bench.page import Part, Table
from scale_sft.bench.rows import Row, by_case, last_run, machine_name
from scale_sft.reporting.plots import Plot
from scale_sft.reporting.style import BLUE, CYCLE, GREY, INK, ORANGE, PERCENT, WIDTH_INCHES

PEERS = ("peft-lora", "full")
"""The contestants that steps are compared with: LoRA with as many trainable parameters, and dense fine-tuning's
forward and backward."""

_PEER_NAMES = {"peft-lora": "peft-lora", "full": "dense forward + backward"}
_NOT_OF_A_CASE = ("contestant", "rounds", "together")  # the participant, and the length of the measurement


def describe(settings: Mapping[str, Any]) -> str:
    """Describe a case in one line."""
    quantized = f" in {settings['quantization']}" if settings["quantization"] != "none" else ""
    attention = settings.get("attention", "sdpa")  # older rows lack it
    parts = [f"{settings['dtype']}{quantized}", describe_sizes(settings)]
    parts += [f"{attention} attention"] if attention != "sdpa" else []
    return ", ".join(parts)


def describe_sizes(settings: Mapping[str, Any]) -> str:
    """Describe a case without the dtype and attention of its base."""
    budget = f"rank {settings['rank']}" if settings["rank"] else f"density {settings['density']:g}"
    base = settings["base"]
    parts = [
        Path(base).name if Path(base).is_dir() else base,
        f"{settings['micro_batch']} x {settings['length']} tokens",
        budget + " equivalent" * bool(settings["rank"]),
    ]
    plain = ("off",) if settings.get("device", "cpu") == "cpu" else ("off", "cpu")
    parts += ["checkpointing"] * settings["gradient_checkpointing"] + ["no kernels"] * (settings["kernels"] in plain)
    return ", ".join(parts)


def breakdown_table(rows: Sequence[Row]) -> tuple[list[str], list[list[str]]]:
    """Tabulate the pieces of each contestant's step in milliseconds, and the cost of reallocation: columns, lines."""
    names = [row["settings"]["contestant"] for row in rows]
    found = [row["result"]["breakdown"] for row in rows]
    every = list(dict.fromkeys(piece for one in found for piece in one["pieces"]))
    lines = [[piece, *(f"{1e3 * one['pieces'].get(piece, 0.0):,.1f}" for one in found)] for piece in every]
    lines.append(["step, with a clock around each piece", *(f"{1e3 * one['seconds']:,.1f}" for one in found)])
    interval = found[0]["interval_steps"]
    share = [
        f"{1e3 * one['reallocation']['seconds_per_step']:,.1f} ({one['reallocation']['fraction']:.1%})" for one in found
    ]
    lines.append([f"reallocation every {interval} steps, per step", *share])
    return ["milliseconds (one rank: nothing to all-reduce)", *names], lines


def table_of(rows: Sequence[Row]) -> tuple[list[str], list[list[str]]]:
    """Tabulate the results, one line per row: columns, lines."""
    columns = ["contestant", "trainable", "ms per step", "quartiles", "tokens/s"]
    columns += [f"x {peer}" for peer in PEERS]
    lines = []
    for row in rows:
        result, settings = row["result"], row["settings"]
        low, high = (1e3 * value for value in result["quartiles_seconds"])
        lines.append(
            [
                settings["contestant"],
                f"{result['trainable']:,}",
                f"{1e3 * result['median_seconds']:,.1f}",
                f"{low:,.1f} to {high:,.1f}",
                f"{result['tokens_per_second']:,.0f}",
            ]
            + [_ratio(result["relative"].get(peer)) for peer in PEERS]
        )
    return columns, lines


def _ratio(found: Mapping[str, Any] | None) -> str:
    return f"{found['median']:.3f}" if found else "-"


def part(rows: list[Row]) -> Part:
    """Show each case on each machine as it was last measured there."""
    groups = [last_run(group) for group in by_case(rows, _NOT_OF_A_CASE)]
    machines: dict[str, list[list[Row]]] = {}
    for group in groups:
        machines.setdefault(machine_name(group[0]["machine"]), []).append(group)
    return Part(
        title="One optimizer step",
        text=(
            "Contestants take turns: in each round, each of them makes one step on the same micro-batch, in a new "
            "random order. A ratio is the median, over rounds, of the ratio of two steps of the same round. A "
            "step is complete: data, forward, backward, update, and for the sparse deltas the write into the weights. "
            "The contestant full is forward and backward of dense fine-tuning without an update; frozen computes the "
            "gradients of the inputs alone, the cost that no adapter can avoid."
        ),
        tables=[_table(group) for of_machine in machines.values() for group in of_machine],
        plots=[
            plot
            for place, (machine, of_machine) in enumerate(machines.items())
            for plot in _plots(of_machine, f"-{place}", f", {machine}" if len(machines) > 1 else "")
        ],
    )


def _table(group: Sequence[Row]) -> Table:
    columns, lines = table_of(group)
    title = f"{describe(group[0]['settings'])}: {machine_name(group[0]['machine'])}"
    return Table(columns=columns, rows=lines, sources=group, title=title)


def _plots(cases: Sequence[Sequence[Row]], suffix: str, where: str) -> list[Plot]:
    groups = {(number, describe(group[0]["settings"])): group for number, group in enumerate(cases)}
    plots = []
    for number, peer in enumerate(PEERS):
        known = {case: group for case, group in groups.items() if all(peer in r["result"]["relative"] for r in group)}
        if known:
            plots.append(
                Plot(
                    name=f"step-relative-{number}{suffix}",
                    title=f"Time of a step, relative to {_PEER_NAMES[peer]}{where}",
                    caption="Median over rounds of the ratios within a round; lines are quartiles. Ours in blue.",
                    draw=partial(_relative, known, peer),
                )
            )
    own = {case: [row for row in group if "breakdown" in row["result"]] for case, group in groups.items()}
    own = {case: group for case, group in own.items() if group}
    if own:
        caption = "Timed around the pieces of the real code path; reallocation is spread over its interval of steps."
        plots.append(Plot(f"step-breakdown{suffix}", f"Where our step goes{where}", caption, lambda _: _breakdown(own)))
    return plots


def _panels(heights: Sequence[int]) -> tuple[Figure, list[Axes]]:
    """Stack panels, each high enough for its number of bars."""
    figure = Figure(figsize=(WIDTH_INCHES, 0.8 + sum(0.34 * bars + 0.5 for bars in heights)), layout="constrained")
    axes = figure.subplots(len(heights), squeeze=False, sharex=True, height_ratios=heights)
    return figure, list(axes[:, 0])


def _relative(groups: Mapping[tuple[int, str], Sequence[Row]], peer: str, _: object = None) -> Figure:
    """Draw bars from 0, one panel per case, with a line at the peer."""
    figure, axes = _panels([len(group) for group in groups.values()])
    for ax, ((_, case), group) in zip(axes, groups.items(), strict=True):
        for place, row in enumerate(group):
            found, name = row["result"]["relative"][peer], row["settings"]["contestant"]
            (low, high), median = found["quartiles"], found["median"]
            colour = BLUE if name.startswith("ours-") else ORANGE if name == peer else GREY
            ax.barh(place, median, color=colour, height=0.66)
            ax.plot([low, high], [place, place], color=INK, linewidth=1.2)
            ax.annotate(f"{median:.2f}", (max(high, median), place), (4, 0), textcoords="offset points", va="center")
        ax.axvline(1, color=ORANGE, linewidth=1.2, linestyle="--")
        _name_bars(ax, [row["settings"]["contestant"] for row in group])
        ax.set_title(case)
    axes[-1].set_xlabel(f"time of a step / time of a step of {_PEER_NAMES[peer]}")
    axes[-1].margins(x=0.12)
    axes[-1].set_xlim(left=0)
    return figure


def _breakdown(groups: Mapping[tuple[int, str], Sequence[Row]]) -> Figure:
    """Draw one stacked bar, of shares of a step, for each of our contestants in each case."""
    rows = [row for group in groups.values() for row in group]
    pieces = [*dict.fromkeys(piece for row in rows for piece in row["result"]["breakdown"]["pieces"]), "reallocation"]
    shades = [*CYCLE, GREY, "#5b6b7d", "#c2a5e8", "#7fc7a5"]
    figure, axes = _panels([len(group) for group in groups.values()])
    for ax, ((_, case), group) in zip(axes, groups.items(), strict=True):
        for place, row in enumerate(group):
            found = row["result"]["breakdown"]
            seconds = found["pieces"] | {"reallocation": found["reallocation"]["seconds_per_step"]}
            start, total = 0.0, found["seconds"]
            for piece, colour in zip(pieces, shades, strict=False):
                share = seconds.get(piece, 0.0) / total
                ax.barh(place, share, left=start, color=colour, height=0.66, label=None if place else piece)
                start += share
        _name_bars(ax, [row["settings"]["contestant"] for row in group])
        ax.set_title(case)
    axes[-1].set_xlabel("share of a step that only updates")
    axes[-1].xaxis.set_major_formatter(PERCENT)
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=6, fontsize=8)
    return figure


def _name_bars(ax: Axes, names: Sequence[str]) -> None:
    ax.set_yticks(range(len(names)), names)
    ax.invert_yaxis()
    ax.grid(False, axis="y")
    ax.tick_params(axis="y", length=0)
