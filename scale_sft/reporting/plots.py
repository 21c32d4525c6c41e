"""Draw the pictures of a report. Each function returns a figure, or the reason why there is nothing to draw."""

import math
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
from matplotlib import rc_context
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator

from .records import Run
from .spread import SPREAD_CAPTION, spread
from .style import (
    BLUE,
    CYCLE,
    GREEN,
    INK,
    ORANGE,
    PERCENT,
    PLAIN,
    PURPLE,
    RED,
    STYLE,
    WIDTH_INCHES,
    figure_over_steps,
    from_zero,
    heat_map,
    is_uniform,
    log_axis,
)
from .weight_names import by_kind, by_layer_and_kind


@dataclass(frozen=True)
class Plot:
    """A titled picture of a page; a report also saves it as `<name>.png`."""

    name: str
    title: str
    caption: str
    draw: Callable[[Any], Figure | str]  # called with the run; with None on pages about other things

    def figure(self, run: Run | None = None) -> Figure | str:
        """Draw the picture, or say why there is nothing to draw."""
        with rc_context(STYLE):
            return self.draw(run)


def loss(run: Run) -> Figure | str:
    """Draw training and held-out loss, with a cross at each step whose loss is not finite."""
    if not run.steps and not run.evaluations:
        return "no step has been logged yet"
    figure, (ax,) = figure_over_steps(run, 3.8)
    steps, values = np.array(run.at), np.array(run.values("loss"))
    if len(steps) >= 20:
        ax.plot(steps, values, color=BLUE, alpha=0.4, linewidth=1, label="training")
        ax.plot(steps, _smooth(values), color=BLUE, linewidth=2, label="training, smoothed")
    elif len(steps):
        ax.plot(steps, values, color=BLUE, marker="o", markersize=3, label="training")
    evaluations = [(e["step"], e["loss"]) for e in run.evaluations if e.get("loss") is not None]
    if evaluations:
        ax.plot(*zip(*evaluations, strict=True), color=ORANGE, marker="D", markersize=5, linewidth=1, label="held out")
    bad = steps[~np.isfinite(values)]
    if len(bad):
        ax.plot(bad, np.full(len(bad), 0.02), "x", color=RED, transform=ax.get_xaxis_transform(), label="not finite")
    ax.set_ylabel("loss (nats per target token)")
    ax.legend(loc="upper right")
    return figure


def exact_match(run: Run) -> Figure | str:
    """Draw exact match of the evaluations that generated answers."""
    points = [(e["step"], e["exact_match"]) for e in run.evaluations if e.get("exact_match") is not None]
    if not points:
        return "no evaluation with generated answers has been recorded"
    figure, (ax,) = figure_over_steps(run, 2.8)
    ax.plot(*zip(*points, strict=True), color=ORANGE, marker="D", markersize=5)
    ax.set_ylim(0, max(0.01, 1.15 * max(value for _, value in points)))
    ax.yaxis.set_major_formatter(PERCENT)
    ax.set_ylabel("exact match")
    return figure


def learning_rate(run: Run) -> Figure | str:
    """Draw the learning rate by step."""
    if len(run.steps) < 2:
        return "fewer than two steps have been logged"
    figure, (ax,) = figure_over_steps(run, 2.6)
    ax.plot(run.at, run.values("learning_rate"), color=GREEN)
    ax.set_ylim(bottom=0)
    ax.yaxis.set_major_formatter(PLAIN)
    ax.set_ylabel("learning rate")
    return figure


def grad_norm(run: Run) -> Figure | str:
    """Draw the norm of the gradients of the deltas, on a logarithmic axis, with the limit at which it is clipped."""
    values = np.array(run.values("grad_norm"))
    if np.count_nonzero(np.isfinite(values) & (values > 0)) < 2:
        return "fewer than two steps have a gradient norm"
    figure, (ax,) = figure_over_steps(run, 2.6)
    largest = np.array(run.values("grad_norm_max"))
    if np.nanmax(largest - values, initial=0.0) > 0:  # a line stands for several steps
        ax.plot(run.at, largest, color=PURPLE, alpha=0.35, linewidth=1, label="largest since the previous logged step")
    ax.plot(run.at, values, color=PURPLE, label="mean")
    log_axis(ax, np.concatenate([values, largest]))
    limit = run.option("optimizer", "max_grad_norm")
    if isinstance(limit, int | float) and math.isfinite(limit) and limit > 0:
        ax.axhline(limit, color=RED, linestyle="--", linewidth=1, label=f"clipped at {limit:g}")
    ax.set_ylabel("L2 norm of the\ndelta gradients")
    ax.legend(loc="upper right", ncols=3)
    return figure


def turnover(run: Run) -> Figure | str:
    """Draw the share of the active entries that each reallocation replaced."""
    if not run.reallocations:
        return "no reallocation has been recorded"
    first, later = run.reallocations[0], run.reallocations[1:]
    if not later:
        return f"a single reallocation: {first['turnover']:.1%} of the entries were replaced at step {first['step']:,}"
    figure, (ax,) = figure_over_steps(run, 2.8)
    ax.plot([r["step"] for r in later], [r["turnover"] for r in later], color=PURPLE, marker="o", markersize=4)
    top = 1.25 * max(r["turnover"] for r in later) or 0.01
    if first["turnover"] <= top:
        ax.plot(first["step"], first["turnover"], "o", color=ORANGE, markersize=5)
    else:  # nearly all: it would flatten the rest
        ax.plot(first["step"], 0.94, "^", color=ORANGE, markersize=7, transform=ax.get_xaxis_transform())
        ax.annotate(
            f"reallocation {first['number']}, step {first['step']:,}: {first['turnover']:.1%}",
            (first["step"], 0.94), xycoords=ax.get_xaxis_transform(), xytext=(8, 0), textcoords="offset points",
            va="center",
        )  # fmt: skip
    ax.set_ylim(0, top)
    ax.yaxis.set_major_formatter(PERCENT)
    ax.set_ylabel("replaced active entries")
    return figure


def ages(run: Run) -> Figure | str:
    """Draw Figure 3 of the paper: which iteration of growth the active entries come from."""
    if len(run.reallocations) < 2:
        return f"{_count(run)}: with a fixed set of indices there are no ages to compare"
    last = run.reallocations[-1]
    figure, (ax,) = figure_over_steps(None, 4.2)
    kinds = {name: values.cohort_counts for name, values in by_kind(run).items() if sum(values.cohort_counts)}
    if 1 < len(kinds) <= len(CYCLE):
        for (name, counts), color in zip(sorted(kinds.items()), CYCLE, strict=False):
            ax.plot(*_proportions(counts), color=color, linewidth=1.2, alpha=0.9, label=name)
    x, y = _proportions(last["cohort_counts"])
    ax.plot(x, y, color=INK, marker="o" if len(x) <= 60 else "", markersize=4, linewidth=2, label="all weights")
    log_axis(ax, np.concatenate([line.get_ydata() for line in ax.lines]))
    ax.set_xlim(-0.4, len(last["cohort_counts"]) - 0.6)
    ax.xaxis.set_major_locator(MaxNLocator(integer=True, steps=[1, 2, 5, 10]))
    ax.set_xlabel(f"iteration of growth (number of the reallocation{_when(last['cohort_steps'])})")
    ax.set_ylabel("proportion of the active entries")
    if len(ax.lines) > 1:
        figure.legend(loc="outside right upper", fontsize=9)
    return figure


def survival(run: Run) -> Figure | str:
    """Draw the share of the entries grown at one reallocation that is still active later; up to eight cohorts."""
    records = run.reallocations
    if len(records) < 3:
        return f"{_count(run)}: the survival of a cohort shows after three or more"
    born = {r["number"]: r["cohort_counts"][r["number"]] for r in records if len(r["cohort_counts"]) > r["number"]}
    cohorts = [number for number, count in born.items() if count > 0][:-1]
    if not cohorts:
        return "no reallocation has grown any entry"
    chosen = sorted({cohorts[round(i)] for i in np.linspace(0, len(cohorts) - 1, min(8, len(cohorts)))})
    figure, (ax,) = figure_over_steps(run, 3.6)
    lightest = ["#4dabf7", "#38a3a5", "#57a773", "#90a955", "#c9a227", "#e07b39", "#d1495b"]
    for place, cohort in enumerate(chosen):
        alive = [(r["step"], r["cohort_counts"][cohort] / born[cohort]) for r in records if r["number"] >= cohort]
        color, width = (INK, 2.4) if place == 0 else (lightest[place - 1], 1.3)
        marker = "o" if len(records) <= 60 else ""
        ax.plot(
            *zip(*alive, strict=True),
            marker=marker,
            markersize=3,
            label=f"reallocation {cohort}",
            color=color,
            linewidth=width,
        )
    ax.set_ylim(0, 1.04)
    ax.yaxis.set_major_formatter(PERCENT)
    ax.set_ylabel("still active")
    figure.legend(loc="outside right upper", title="grown at", fontsize=9)
    return figure


def throughput(run: Run) -> Figure | str:
    """Draw tokens per second, and seconds per step."""
    if len(run.steps) < 2:
        return "fewer than two steps have been logged"
    figure, (above, below) = figure_over_steps(run, 4.0, rows=2)
    rate = np.array(run.values("tokens_per_second"))
    above.plot(run.at, rate, color=BLUE)
    above.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}" if value >= 10 else f"{value:g}"))
    above.set_ylabel("tokens/s")
    seconds = np.array(run.values("seconds")) / np.maximum(1, np.nan_to_num(run.values("steps"), nan=1))
    below.plot(run.at, seconds, color=ORANGE)
    below.set_ylabel("seconds per step")
    for ax, values in ((above, rate), (below, seconds)):  # the first step compiles and warms up: let it leave the axis
        usual = values[np.isfinite(values)]
        ax.set_ylim(0, 1.3 * float(np.percentile(usual, 98)) if len(usual) else None)
    return figure


def memory(run: Run) -> Figure | str:
    """Draw the peak memory by step."""
    keys = run.step_keys("memory")
    if not keys:
        return "the step records hold no memory_bytes"
    figure, (ax,) = figure_over_steps(run, 2.6)
    lines = {key: np.array(run.values(key)) / 2**30 for key in keys}
    for (key, values), color in zip(lines.items(), CYCLE * len(lines), strict=False):
        label = key.removeprefix("memory_").removesuffix("bytes").replace("_", " ").strip() or "peak"
        ax.plot(run.at, values, color=color, label=label)
    from_zero(ax, np.concatenate(list(lines.values())))
    ax.set_ylabel("memory (GiB)")
    if len(keys) > 1:
        ax.legend(ncols=4)
    return figure


def communication(run: Run) -> Figure | str:
    """Draw bytes and seconds of the collectives by step, a panel for each unit."""
    keys = run.step_keys("comm_")
    if not keys:
        return "the step records hold no values comm_* (one process has nothing to send)"
    units = {"bytes": ("MiB per step", 2**20), "seconds": ("seconds per step", 1), "": ("per step", 1)}
    groups: dict[str, list[str]] = {}
    for key in keys:
        groups.setdefault(next(unit for unit in units if key.endswith(unit)), []).append(key)
    figure, axes = figure_over_steps(run, 0.6 + 2.0 * len(groups), rows=len(groups))
    for ax, (unit, members) in zip(axes, groups.items(), strict=True):
        label, divisor = units[unit]
        lines = {key: np.array(run.values(key)) / divisor for key in members}
        for (key, values), color in zip(lines.items(), CYCLE * len(lines), strict=False):
            name = key.removeprefix("comm_").removesuffix(unit).replace("_", " ").strip() or "all"
            ax.plot(run.at, values, color=color, label=name)
        means = [float(np.nanmean(values)) for values in lines.values()]
        if min(means) > 0 and max(means) > 30 * min(means):  # a linear axis would hide the smaller one
            log_axis(ax, np.concatenate(list(lines.values())))
        else:
            from_zero(ax, np.concatenate(list(lines.values())))
        ax.set_ylabel(label)
        if len(members) > 1:
            ax.legend(loc="center right", ncols=4, fontsize=9)
    return figure


def per_layer(run: Run) -> Figure | str:
    """Draw density and size of the deltas as heat maps over layers and kinds of module, leaving out uniform ones."""
    table = {(key[0], key[1]): weight for key, weight in by_layer_and_kind(run).items() if key[0] is not None}
    if not table:
        return "the run has not written the counts of each weight yet" if run.end is None else "no weight is in a layer"
    layers = sorted({layer for layer, _ in table})
    kinds = list(dict.fromkeys(kind for _, kind in table))
    panels = [
        ("density: active entries / all entries of the weight", "%", lambda w: 100 * w.active / w.numel),
        ("L2 norm of the deltas", "", lambda w: math.sqrt(w.square_delta)),
        ("root mean square of the active deltas", "", lambda w: math.sqrt(w.square_delta / w.active)),
        ("entries that stayed since the first reallocation", "%", lambda w: 100 * w.cohort_counts[1] / w.active),
    ]
    grids = []
    for title, unit, value in panels:
        grid = np.full((len(kinds), len(layers)), np.nan)
        for (layer, kind), weight in table.items():
            with suppress(IndexError, ZeroDivisionError):  # no active entry, or no reallocation
                grid[kinds.index(kind), layers.index(layer)] = value(weight)
        if np.isfinite(grid).any():
            grids.append((title, unit, grid))
    if not grids:
        return "the counts of the weights are empty"
    grids = [panel for panel in grids if not is_uniform(panel[2])] or grids[:1]
    figure = Figure(figsize=(WIDTH_INCHES, len(grids) * (0.75 + 0.24 * len(kinds)) + 0.3), layout="constrained")
    for ax, (title, unit, grid) in zip(np.atleast_1d(figure.subplots(len(grids), sharex=True)), grids, strict=True):
        heat_map(ax, grid, layers, kinds, title, unit)
    ax.set_xlabel("layer")
    return figure


PLOTS = [
    Plot("loss", "Loss", "Training loss (mean since the previous point) and held-out loss, by optimizer step.", loss),
    Plot("exact_match", "Exact match", "Share of held-out examples whose answer is exactly right.", exact_match),
    Plot("ages", "Parameter ages",
         "Which iteration last grew the entries that are active at the end (Figure 3 of the paper). A line that falls "
         "to the right: early choices stay. 0: the random initial indices.", ages),
    Plot("survival", "Survival", "Of the entries grown at one reallocation, the share still active later.", survival),
    Plot("turnover", "Turnover",
         "Share of the active entries that each reallocation replaced. At the first one all are up for replacement.",
         turnover),
    Plot("per_layer", "Deltas by layer", "One cell per weight, at the end of the run.", per_layer),
    Plot("spread", "Where the entries are", SPREAD_CAPTION, spread),
    Plot("learning_rate", "Learning rate", "", learning_rate),
    Plot("grad_norm", "Gradient norm", "", grad_norm),
    Plot("throughput", "Throughput", "Tokens of the global batch per second, and the length of a step.", throughput),
    Plot("memory", "Memory", "", memory),
    Plot("communication", "Communication", "", communication),
]  # fmt: skip


def _count(run: Run) -> str:
    number = len(run.reallocations)
    return {0: "no reallocation has been recorded", 1: "a single reallocation"}.get(number, f"{number} reallocations")


def _proportions(counts: list[int] | tuple[int, ...]) -> tuple[np.ndarray, np.ndarray]:
    """Compute the share of each cohort; NaN (a gap on a logarithmic axis) where it has died out."""
    share = np.array(counts, dtype=float) / max(1, sum(counts))
    return np.arange(len(share)), np.where(share > 0, share, np.nan)


def _when(cohort_steps: list[int]) -> str:
    gaps = {after - before for before, after in pairwise(cohort_steps[1:])}
    return f"; the first at step {cohort_steps[1]:,}, then every {gaps.pop():,}" if len(gaps) == 1 else ""


def _smooth(values: np.ndarray) -> np.ndarray:
    """Take a Gaussian mean over about 3 % of the points to each side; points that are not finite do not count."""
    sigma = max(1.0, len(values) / 80)
    reach = min(math.ceil(3 * sigma), (len(values) - 1) // 2)
    kernel = np.exp(-0.5 * (np.arange(-reach, reach + 1) / sigma) ** 2)
    finite = np.isfinite(values)
    total = np.convolve(np.where(finite, values, 0.0), kernel, mode="same")
    weight = np.convolve(finite.astype(float), kernel, mode="same")
    return np.divide(total, weight, out=np.full(len(values), np.nan), where=weight > 1e-9)
