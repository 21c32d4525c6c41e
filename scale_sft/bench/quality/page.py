"""Show `bench quality` on the page: its table, and pictures of losses, rates and curves."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from statistics import mean

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter

from scale_sft.bench.page import Part, Table
from scale_sft.reporting.plots import Plot
from scale_sft.reporting.style import CYCLE, GREY, PERCENT, PLAIN, WIDTH_INCHES, log_axis

from .contestants import BASE
from .intervals import PARTS
from .summary import Row, Summary, groups_of, retained_names, short_name, summaries, value_of
from .table import REFERENCE, tables_of


def part(rows: Sequence[Row]) -> Part:
    """Show every group of runs with the same settings, of all invocations: a table and its plots, the newest first.

    Args:
        rows: of all invocations, oldest first.
    """
    groups = groups_of(rows)
    tables, plots = [], []
    for number, group in enumerate(groups, start=1):
        title = title_of(group)
        tables += _tables(group, title)
        for plot in _plots(group):
            plots.append(
                replace(plot, name=f"{plot.name}-{number}", caption=f"{title}. {plot.caption}")
                if len(groups) > 1
                else plot
            )
    text = (
        "Sparse deltas and LoRA train as many weights as LoRA of the rank in the title; IA3 and full (the same layers, "
        "densely) have counts of their own. A grid of learning rates is tried with one seed, and grows while its best "
        "rate is at an end; best is the lowest loss on examples kept out of the training data. Figures are on the "
        "held-out data, at the best rate: the mean over the seeds and its 95 % confidence interval by Student's t "
        "distribution, which is wide for few seeds (for 3 of them 2.5 standard deviations). "
        f"Losses less those of {REFERENCE}: seed by seed, their mean and its interval over the seeds; in brackets how "
        "far the difference depends on the examples that it is measured on, a 95 % interval by the jackknife over "
        f"{PARTS} parts of them. Losses on other data show what the model has kept: compare them with those of the "
        "base. Norms of the update (merged minus base) are means over the weights; visible in bf16 is the share of "
        "changed entries that a merge in bfloat16 changes. Seconds include the choice of entries; runs that share a "
        "machine slow each other down. Peak memory is that of training above the weights of the base. A dash: not "
        "measured."
    )
    return Part(title="Quality: held-out loss and what is retained", text=text, tables=tables, plots=plots)


def title_of(group: Sequence[Row]) -> str:
    """Name a group of runs: task, base, length and budget."""
    shared = group[-1]["settings"]["shared"]
    data = shared.get("task") or short_name(shared["train_data"])
    seeds = max((len(summary.runs) for summary in summaries(group) if summary.name != BASE.name), default=0)
    return (
        f"{data} on {short_name(shared['base'])}, {shared['steps']} steps of {shared['global_batch_size']} sequences, "
        f"rank {shared['rank_equivalent']}, {shared['dtype']}, {seeds} seed{'s' * (seeds != 1)}"
    )


def _tables(group: Sequence[Row], title: str) -> list[Table]:
    """Make all tables of a group; the first has the title of the group, and remarks below it."""
    remarks = "; ".join(remark for summary in summaries(group) if (remark := summary.remark()) is not None)
    (_, learned), *others = tables_of(group)
    first = Table(*learned, sources=group, title=title, note=f"{remarks}." if remarks else "")
    return [first, *(Table(*table, sources=(), title=name) for name, table in others)]


def _plots(group: Sequence[Row]) -> list[Plot]:
    found = summaries(group)
    trained = [summary for summary in found if summary.name != BASE.name and summary.runs]
    if not trained:
        return []
    base = next((summary for summary in found if summary.name == BASE.name), None)
    plots = [
        Plot(
            "quality-methods",
            "Held-out loss and exact match",
            "One point per seed, at the best rate, and a line at their mean.",
            lambda _: by_method(trained),
        ),
        Plot(
            "quality-rates",
            "Learning rates",
            "Loss on the examples that choose the rate, for one seed; the ring marks the best. Where the ring is at an "
            "end of the line, a rate beyond it may be better. Crosses at the top: runs that did not finish.",
            lambda _: over_rates(trained),
        ),
    ]
    if names := retained_names(group):
        plots.append(
            Plot(
                "quality-retained",
                "Learned and retained",
                "A line per method: one point per learning rate of one seed, ascending, the best one ringed. Lower "
                "left is better: little loss on the task, little on other data. Dotted: the base.",
                lambda _: learned_and_retained(trained, base, names),
            )
        )
    plots.append(
        Plot(
            "quality-curves",
            "Training loss",
            "At the best rate, mean over the seeds; each point is the mean over a few steps.",
            lambda _: curves(trained),
        )
    )
    return plots


def learned_and_retained(found: Sequence[Summary], base: Summary | None, names: Sequence[str]) -> Figure:
    """Draw the loss on other data against the held-out loss of the task, a panel for each of the other data."""
    figure = Figure(figsize=(WIDTH_INCHES, 0.7 + 3.3 * len(names)), layout="constrained")
    for ax, name in zip(figure.subplots(len(names), 1, squeeze=False)[:, 0], names, strict=True):
        key = f"retained.{name}"
        for place, summary in enumerate(found):
            points = [
                (row["settings"]["learning_rate"], x, y)
                for row in summary.of_grid
                if (x := value_of(row, "held_out_loss")) is not None and (y := value_of(row, key)) is not None
            ]
            style = {"color": _color(place), "marker": _marker(place), "markersize": 4}
            ax.plot([x for _, x, _ in points], [y for _, _, y in points], label=summary.name, **style)
            ring = [(x, y) for rate, x, y in points if rate == summary.best_rate]
            ax.plot(
                [x for x, _ in ring], [y for _, y in ring], "o", color=_color(place), markersize=11, fillstyle="none"
            )
        if base is not None and base.values(key):
            ax.axhline(base.values(key)[0], color=GREY, linewidth=1.2, linestyle=":")
        ax.set_xlabel("held-out loss of the task")
        ax.set_ylabel(f"loss on {name}")
    handles, labels = figure.axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside right upper", fontsize=9)
    return figure


def by_method(found: Sequence[Summary]) -> Figure:
    """Draw held-out loss and, where it was asked for, exact match: a point per seed."""
    panels = [("held_out_loss", "held-out loss (nats per target token)"), ("exact_match", "exact match")]
    panels = [panel for panel in panels if any(summary.values(panel[0]) for summary in found)]
    figure = Figure(figsize=(WIDTH_INCHES, 0.9 + 0.34 * len(found)), layout="constrained")
    axes = figure.subplots(1, len(panels), sharey=True, squeeze=False)[0]
    for ax, (key, label) in zip(axes, panels, strict=True):
        for place, summary in enumerate(found):
            values = summary.values(key)
            if values:
                ax.plot(values, [place] * len(values), _marker(place), color=_color(place), markersize=5, alpha=0.6)
                ax.plot([mean(values)], [place], "|", color=_color(place), markersize=17, markeredgewidth=2)
        ax.set_xlabel(label)
    axes[0].set_yticks(range(len(found)), [summary.name for summary in found])
    axes[0].set_ylim(len(found) - 0.5, -0.5)
    losses = [value for summary in found for value in summary.values("held_out_loss")]
    if min(losses) > 0 and max(losses) > 4 * min(losses):
        _log_x(axes[0])
    if len(axes) > 1:
        axes[1].xaxis.set_major_formatter(PERCENT)
    return figure


def over_rates(found: Sequence[Summary]) -> Figure:
    """Draw validation loss against learning rate, a line per method."""
    figure, ax = _wide()
    for place, summary in enumerate(found):
        rates, color = list(summary.grid), _color(place)
        losses = list(summary.grid.values())
        ax.plot(rates, losses, color=color, marker=_marker(place), markersize=4, label=summary.name)
        if (best := summary.best_rate) is not None:
            ax.plot([best], [summary.grid[best]], "o", color=color, markersize=11, fillstyle="none")
        failed = list(summary.failures)
        ax.plot(failed, [0.97] * len(failed), "x", color=color, transform=ax.get_xaxis_transform())
    _log_x(ax)
    log_axis(ax, np.array([loss for summary in found for loss in summary.grid.values()]))
    ax.set_xlabel("learning rate")
    ax.set_ylabel("validation loss")
    figure.legend(loc="outside right upper", fontsize=9)
    return figure


def curves(found: Sequence[Summary]) -> Figure:
    """Draw training loss over the steps, mean over the seeds."""
    figure, ax = _wide()
    everything: list[float] = []
    for place, summary in enumerate(found):
        runs = [curve for row in summary.runs if (curve := row["result"].get("curve"))]
        if runs:
            steps = [step for step, _ in runs[0]]
            losses = np.mean([[loss for _, loss in run] for run in runs], axis=0)
            ax.plot(steps, losses, color=_color(place), label=summary.name)
            everything += losses.tolist()
    log_axis(ax, np.array(everything))
    ax.set_xlabel("optimizer step")
    ax.set_ylabel("training loss")
    figure.legend(loc="outside right upper", fontsize=9)
    return figure


def _wide() -> tuple[Figure, Axes]:
    figure = Figure(figsize=(WIDTH_INCHES, 4.2), layout="constrained")
    return figure, figure.subplots()


def _log_x(ax: Axes) -> None:
    """Make the x axis logarithmic, with plain numbers at 1, 2, 5."""
    ax.set_xscale("log")
    ax.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5), numticks=20))
    ax.xaxis.set_major_formatter(PLAIN)
    ax.xaxis.set_minor_formatter(NullFormatter())


def _marker(place: int) -> str:
    """Choose a marker: another one where the colours repeat."""
    return "os^D"[place // len(CYCLE) % 4]


def _color(place: int) -> str:
    return CYCLE[place % len(CYCLE)]
