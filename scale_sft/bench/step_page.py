"""What `scale-sft bench step` has found: tables for the console and the page, and two plots."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from scale_sft.report_axes import BLUE, CYCLE, GREY, INK, ORANGE, PERCENT, WIDTH_INCHES
from scale_sft.report_plots import Plot

from .page import Part

PEERS = ("peft-lora", "full")
"""Whom steps are compared with: LoRA at equal trainable parameters; forward and backward of dense fine-tuning."""

_PEER_NAMES = {"peft-lora": "peft-lora", "full": "dense forward + backward"}
Row = Mapping[str, Any]


def describe(settings: Mapping[str, Any]) -> str:
    """One line for a case."""
    budget = f"rank {settings['rank']}" if settings["rank"] else f"density {settings['density']:g}"
    base = settings["base"]
    parts = [
        Path(base).name if Path(base).is_dir() else base,
        settings["dtype"] + (f" in {settings['quantization']}" if settings["quantization"] != "none" else ""),
        f"{settings['micro_batch']} x {settings['length']} tokens",
        budget + " equivalent" * bool(settings["rank"]),
    ]
    parts += ["checkpointing"] * settings["gradient_checkpointing"] + ["kernels"] * (settings["kernels"] == "auto")
    return ", ".join(parts)


def breakdown_table(rows: Sequence[Mapping[str, Any]]) -> tuple[list[str], list[list[str]]]:
    """Columns and lines: the pieces of each contestant's step in milliseconds, and the cost of reallocation."""
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


def table_of(rows: Sequence[Row], *, common: Sequence[str] | None = None) -> tuple[list[str], list[list[str]]]:
    """Columns and lines: one line for each row of results; with `common`, also its case, but for these parts of it."""
    with_case = common is not None
    columns = ["case"] * with_case + ["contestant", "trainable", "ms per step", "quartiles", "tokens/s"]
    columns += [f"x {peer}" for peer in PEERS]
    lines = []
    for row in rows:
        result, settings = row["result"], row["settings"]
        low, high = (1e3 * value for value in result["quartiles_seconds"])
        lines.append(
            [", ".join(part for part in _case(row).split(", ") if part not in (common or ())) or "plain"] * with_case
            + [
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
    """What the page says of the steps: each case as it was last measured on the machine, at the commit, of the last row."""
    last = rows[-1]
    alike = [row for row in rows if row["machine"] == last["machine"] and row.get("commit") == last.get("commit")]
    runs = {_case(row): row["run"] for row in alike}  # the newest of each case
    rows = [row for row in alike if row["run"] == runs[_case(row)]]
    first, *others = ({*_case(row).split(", ")} for row in rows)
    common = [part for part in _case(rows[0]).split(", ") if part in first.intersection(*others)]
    columns, lines = table_of(rows, common=common if len(runs) > 1 else None)
    return Part(
        title="One optimizer step",
        text=(
            "Contestants take turns: in each round every one of them makes one step, on the same micro-batch, in an "
            "order drawn anew. Ratios are medians over rounds of the ratio of two steps of one round. A step is whole: "
            "data, forward, backward, update, and for ours the write into the weights. full is forward and backward of "
            "dense fine-tuning without an update, frozen the floor of any adapter: gradients of the inputs alone. "
            f"All cases: {', '.join(common)}."
        ),
        columns=columns,
        rows=lines,
        source=last,
        plots=_plots(rows),
    )


def _case(row: Row) -> str:
    return describe(row["settings"])


def _plots(rows: Sequence[Row]) -> list[Plot]:
    groups: dict[str, list[Row]] = {}
    for row in rows:
        groups.setdefault(_case(row), []).append(row)
    plots = []
    for number, peer in enumerate(PEERS):
        known = {case: group for case, group in groups.items() if all(peer in r["result"]["relative"] for r in group)}
        if known:
            plots.append(
                Plot(
                    name=f"step-relative-{number}",
                    title=f"Time of a step, relative to {_PEER_NAMES[peer]}",
                    caption="Median over rounds of ratios within a round; lines are quartiles. Ours in blue.",
                    draw=lambda _, known=known, peer=peer: _relative(known, peer),
                )
            )
    own = [row for row in rows if "breakdown" in row["result"]]
    if own:
        caption = "Clocks around the pieces of the real code path; reallocation is spread over its interval of steps."
        plots.append(Plot("step-breakdown", "Where our step goes", caption, lambda _: _breakdown(own)))
    return plots


def _panels(heights: Sequence[int]) -> tuple[Figure, list[Axes]]:
    """Panels one above the other, each high enough for its number of bars."""
    figure = Figure(figsize=(WIDTH_INCHES, 0.8 + sum(0.34 * bars + 0.5 for bars in heights)), layout="constrained")
    axes = figure.subplots(len(heights), squeeze=False, sharex=True, height_ratios=heights)
    return figure, list(axes[:, 0])


def _relative(groups: Mapping[str, Sequence[Row]], peer: str) -> Figure:
    """Bars from 0, one panel for each case, with a line at the peer."""
    figure, axes = _panels([len(group) for group in groups.values()])
    for ax, (case, group) in zip(axes, groups.items(), strict=True):
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


def _breakdown(rows: Sequence[Row]) -> Figure:
    """One stacked bar for each of our contestants in each case: shares of a step."""
    groups: dict[str, list[Row]] = {}
    for row in rows:
        groups.setdefault(_case(row), []).append(row)
    pieces = [*dict.fromkeys(piece for row in rows for piece in row["result"]["breakdown"]["pieces"]), "reallocation"]
    shades = CYCLE + [GREY, "#5b6b7d", "#c2a5e8", "#7fc7a5"]
    figure, axes = _panels([len(group) for group in groups.values()])
    for ax, (case, group) in zip(axes, groups.items(), strict=True):
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
