"""Style of the pictures: colours, axes, heat maps.

No pyplot: figures are plain objects and nothing global changes. Text and axes are drawn in `INK` and `GRID`, which the
page replaces by the colours of the reader's theme.
"""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter

from .records import Run

INK, GRID = "#24292f", "#d8dee4"
BLUE, ORANGE, GREEN, PURPLE, RED, GREY = "#2f7fd1", "#d9772b", "#2f9e6e", "#8a63d2", "#d1495b", "#8b949e"
CYCLE = [BLUE, ORANGE, GREEN, PURPLE, RED, "#b08800", "#17a2b8", "#e667a3"]
WIDTH_INCHES = 8.4
PERCENT = FuncFormatter(lambda value, _: f"{100 * value:.4g}%")
PLAIN = FuncFormatter(lambda value, _: f"{value:.6g}")
STYLE: dict[str, Any] = {
    "font.size": 10, "axes.titlesize": 10, "axes.titlelocation": "left", "axes.titleweight": "bold",
    "text.color": INK, "axes.labelcolor": INK, "axes.edgecolor": GREY, "axes.titlecolor": INK,
    "xtick.color": GREY, "ytick.color": GREY, "xtick.labelcolor": INK, "ytick.labelcolor": INK,
    "axes.spines.top": False, "axes.spines.right": False, "axes.facecolor": "none",
    "axes.grid": True, "grid.color": GRID, "grid.linewidth": 0.8, "axes.axisbelow": True,
    "legend.frameon": False, "lines.linewidth": 1.6, "figure.dpi": 144, "savefig.dpi": 144,
}  # fmt: skip


def figure_over_steps(run: Run | None, height: float, rows: int = 1) -> tuple[Figure, list[Axes]]:
    """Make panels over the optimizer steps of `run`, with a dotted line wherever it was resumed."""
    figure = Figure(figsize=(WIDTH_INCHES, height), layout="constrained")
    axes = list(np.atleast_1d(figure.subplots(rows, sharex=True)))
    if run is not None:
        axes[-1].set_xlabel("optimizer step" + (" (dotted: resumed)" if run.resumed_at else ""))
        axes[-1].xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
        axes[-1].xaxis.set_major_locator(MaxNLocator(integer=True))
        for ax in axes:
            ax.set_xlim(-0.012 * max(1, run.last_step), 1.012 * max(1, run.last_step))
            for step in run.resumed_at:
                ax.axvline(step, color=GREY, linestyle=":", linewidth=1.2)
    return figure, axes


def heat_map(ax: Axes, grid: np.ndarray, layers: Sequence[object], kinds: list[str], title: str, unit: str) -> None:
    """Draw `grid` [kinds, layers] in colours; NaN leaves a cell empty."""
    low, high = float(np.nanmin(grid)), float(np.nanmax(grid))
    if is_uniform(grid):
        low, high = 0.0, high * 1.25 or 1.0
    x, y = np.arange(len(layers) + 1) - 0.5, np.arange(len(kinds) + 1) - 0.5
    mesh = ax.pcolormesh(x, y, np.ma.masked_invalid(grid), cmap="viridis", vmin=low, vmax=high, edgecolors="face",
                         linewidth=0.2)  # fmt: skip
    ax.invert_yaxis()
    ax.grid(False)
    ax.spines[:].set_visible(False)
    ax.tick_params(length=0)
    ax.set_yticks(range(len(kinds)), kinds)
    every = math.ceil(len(layers) / 24)
    ax.set_xticks(range(0, len(layers), every), [str(layer) for layer in layers[::every]])
    ax.set_title(title)
    bar = ax.figure.colorbar(mesh, ax=ax, pad=0.01, fraction=0.05, aspect=12)
    bar.outline.set_visible(False)
    bar.ax.yaxis.set_major_locator(MaxNLocator(4))
    bar.ax.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.3g}{unit}"))


def is_uniform(grid: np.ndarray) -> bool:
    """Tell whether all values are the same but for rounding; colours would only magnify the difference."""
    return float(np.nanmax(grid) - np.nanmin(grid)) <= 0.02 * float(np.nanmax(np.abs(grid)))


def from_zero(ax: Axes, values: np.ndarray) -> None:
    """Make the y axis linear, from 0 to a little above the highest value."""
    finite = values[np.isfinite(values)]
    ax.set_ylim(0, 1.2 * float(finite.max(initial=0.0)) or 1.0)


def log_axis(ax: Axes, values: np.ndarray) -> None:
    """Make the y axis logarithmic, with plain numbers at 1, 2, 5 as long as there are few of them."""
    positive = values[np.isfinite(values) & (values > 0)]
    ax.set_yscale("log")
    if len(positive) == 0:
        return
    low, high = positive.min() / 1.3, positive.max() * 1.3
    ax.set_ylim(low, high)
    subs = (1, 2, 5) if high / low < 1000 else (1,)
    ax.yaxis.set_major_locator(LogLocator(subs=subs, numticks=20))
    ax.yaxis.set_major_formatter(PLAIN)
    ax.yaxis.set_minor_formatter(NullFormatter())
