"""Draw where the entries are: the share of them that the fullest rows and columns of their weights hold, by layer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib import colormaps
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from .records import Run
from .style import GREY, INK, PERCENT, WIDTH_INCHES
from .weight_names import layer_of

Layer = tuple[int, Sequence[float], Sequence[float]]
"""(entries, share in the fullest rows, share in the fullest columns) of one weight; shares by fraction."""

SPREAD_CAPTION = (
    "One line per layer: the share of its entries that the fullest rows (left) or columns (right) of their weights "
    "hold. Lines far above the dashed one mean entries that crowd into few rows or columns."
)


def spread(run: Run) -> Figure | str:
    """Draw the spread at the end of a run."""
    fractions = (run.end or {}).get("spread_fractions")
    weights = {name: values for name, values in run.per_weight.items() if "spread_rows" in values}
    if not fractions or not weights:
        return "the end record has no counts by row and column"
    of_weight = {n: (int(v.get("active") or 0), v["spread_rows"], v["spread_columns"]) for n, v in weights.items()}
    return draw_spread(fractions, of_weight)


def draw_spread(fractions: Sequence[float], weights: Mapping[str, Layer]) -> Figure:
    """Draw one line per layer: the share of its entries in the fullest rows (left) and columns (right).

    Args:
        fractions: of the rows or columns, fullest first, in (0, 1).
        weights: by name; see `Layer`.
    """
    layers: dict[int | None, list[Layer]] = {}
    for name, values in weights.items():
        layers.setdefault(layer_of(name), []).append(values)
    numbers = sorted(layer for layer in layers if layer is not None)
    scale = Normalize(min(numbers, default=0), max(numbers, default=1) or 1)
    figure = Figure(figsize=(WIDTH_INCHES, 3.2), layout="constrained")
    axes = figure.subplots(1, 2, sharey=True)
    x = np.array([*fractions, 1.0])
    for place, (ax, what) in enumerate(zip(axes, ("rows", "columns"), strict=True), start=1):
        ax.plot(x, x, color=GREY, linestyle="--", linewidth=1.2, label="evenly spread")
        for layer, members in sorted(layers.items(), key=lambda item: -1 if item[0] is None else item[0]):
            counts = np.array([one[0] for one in members], dtype=float)
            shares = np.average([one[place] for one in members], axis=0, weights=np.maximum(counts, 1))
            color = INK if layer is None else colormaps["viridis"](scale(layer))
            ax.plot(x, [*shares, 1.0], color=color, linewidth=1.3, marker="o", markersize=2.5)
        ax.set_xscale("log")
        ax.set_xticks(x, [f"{100 * value:.3g}%" for value in x])
        ax.minorticks_off()
        ax.yaxis.set_major_formatter(PERCENT)
        ax.set_ylim(0, 1.02)
        ax.set_xlabel(f"fullest {what} of each weight")
    axes[0].set_ylabel("share of the entries")
    axes[0].legend(loc="upper left")
    if len(numbers) > 1:
        bar: Any = figure.colorbar(ScalarMappable(scale, "viridis"), ax=list(axes), pad=0.01, fraction=0.04, aspect=24)
        bar.outline.set_visible(False)
        bar.locator = MaxNLocator(6, integer=True)
        bar.set_label("layer")
    return figure
