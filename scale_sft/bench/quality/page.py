"""Show `bench quality` on the page: its table, and pictures of losses, rates and curves."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import mean

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter

from scale_sft.bench.page import Part, Table
from scale_sft.reporting.plots import Plot
from scale_sft.reporting.style import CYCLE, PERCENT, PLAIN, WIDTH_INCHES, log_axis

from .contestants import BASE
from .summary import COLUMNS, Row, Summary, comparable, summaries


def part(rows: Sequence[Row]) -> Part:
    """Show the newest settings in a folder, with the runs of earlier invocations that have the same settings.

    Args:
        rows: of all invocations, oldest first.
    """
    chosen = comparable(rows)
    found = summaries(chosen)
    shared = chosen[-1]["settings"]["shared"]
    remarks = "; ".join(remark for summary in found if (remark := summary.remark()) is not None)
    text = (
        f"Base {shared['base']}, data {shared['train_data']}, {shared['steps']} steps of {shared['global_batch_size']} "
        f"sequences, {shared['dtype']}. Sparse deltas and LoRA train as many weights as LoRA of rank "
        f"{shared['rank_equivalent']}; IA3 and full (the same layers, densely) have counts of their own. The learning "
        f"rate is the one with the lowest loss on {shared['validation_examples']} examples kept out of the training "
        "data. Figures are on the held-out data: mean and standard deviation over seeds."
    )
    return Part(
        title="Quality: held-out loss and exact match",
        text=f"{text} {remarks}." if remarks else text,
        tables=[Table(COLUMNS, [summary.cells() for summary in found], sources=chosen)],
        plots=_plots(found),
    )


def _plots(found: Sequence[Summary]) -> list[Plot]:
    trained = [summary for summary in found if summary.name != BASE.name and summary.runs]
    if not trained:
        return []
    return [
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
        Plot(
            "quality-curves",
            "Training loss",
            "At the best rate, mean over the seeds; each point is the mean over a few steps.",
            lambda _: curves(trained),
        ),
    ]


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
                ax.plot(values, [place] * len(values), "o", color=_color(place), markersize=5, alpha=0.6)
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
        ax.plot(rates, losses, color=color, marker="o", markersize=4, label=summary.name)
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


def _color(place: int) -> str:
    return CYCLE[place % len(CYCLE)]
