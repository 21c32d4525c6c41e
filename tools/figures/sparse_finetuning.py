"""Draw the picture of the README: one weight matrix through update, drop and grow, and what is stored of it.

python -m tools.figures.sparse_finetuning [docs/images/sparse_finetuning.png]
"""

from __future__ import annotations

import sys
from collections.abc import Iterable
from io import BytesIO
from pathlib import Path

import numpy as np
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.colors import to_hex, to_rgb
from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch, PathPatch
from matplotlib.path import Path as Outline
from PIL import Image

INK, SOFT, PAPER, EDGE = "#1f2933", "#66727f", "#ffffff", "#d5dbe1"
PLUS, MINUS, DROPPED, GROWN = "#2f7fd1", "#e0812f", "#d1495b", "#2f9e6e"

SIDE, CELL = 8, 1.0  # the weight is SIDE x SIDE, drawn in units of one cell
GAP = 0.12  # between two cells
INDICES, DELTAS = -2.3, -3.4  # heights of the two lists that are stored
PANEL = SIDE + 3.1  # from one panel to the next
LEFT, RIGHT, BOTTOM, TOP = -1.3, 3 * PANEL + SIDE + 0.9, -6.3, SIDE + 3.5

UPDATED = {5: 0.7, 10: -0.4, 19: 0.1, 28: 0.9, 38: -0.8, 41: 0.5, 51: -0.1, 62: 0.6}
"""Delta (in tenths, as the picture writes it in whole numbers) by flat index, after some steps of the optimizer."""
DROP = (19, 51)  # the smallest |delta|
GROW = (22, 33)  # the largest gradients
SURVIVING = {index: delta for index, delta in UPDATED.items() if index not in DROP}
REGROWN = dict(sorted({**SURVIVING, **dict.fromkeys(GROW, 0.0)}.items()))

STYLE = {
    "font.family": "DejaVu Sans",
    "font.size": 9,
    "text.color": INK,
}


def shade(delta: float) -> str:
    """Colour of a delta in [-1, 1]: hue by sign, strength by size."""
    strength = 0.25 + 0.75 * abs(delta)
    colour = np.array(to_rgb(PLUS if delta > 0 else MINUS))
    return to_hex(1 - strength * (1 - colour))


def corner(index: int) -> tuple[float, float]:
    """Lower left corner of the cell of a flat index, row 0 on top."""
    row, column = divmod(index, SIDE)
    return column * CELL, (SIDE - 1 - row) * CELL


def cells(ax: Axes, corners: Iterable[tuple[float, float]], **look) -> None:
    """Squares of one look."""
    outlines = []
    for x, y in corners:
        low_x, low_y, high_x, high_y = x + GAP / 2, y + GAP / 2, x + CELL - GAP / 2, y + CELL - GAP / 2
        outlines.append(Outline([(low_x, low_y), (high_x, low_y), (high_x, high_y), (low_x, high_y), (low_x, low_y)],
                                [Outline.MOVETO, *[Outline.LINETO] * 3, Outline.CLOSEPOLY]))  # fmt: skip
    ax.add_patch(PathPatch(Outline.make_compound_path(*outlines), **{"linewidth": 0, **look}))


def base(ax: Axes, left: float, darkest: float) -> None:
    """The frozen weights: grey by size, in a few tones."""
    tones = np.random.default_rng(3).integers(0, 5, SIDE * SIDE)
    for tone in range(5):
        grey = 0.9 - darkest * tone / 4
        at = [corner(index) for index in np.flatnonzero(tones == tone)]
        cells(ax, [(left + x, y) for x, y in at], facecolor=(grey, grey + 0.012, grey + 0.026))


def active(ax: Axes, left: float, deltas: dict[int, float]) -> None:
    """The entries that are trained, on top of the base."""
    for index, delta in deltas.items():
        x, y = corner(index)
        if delta:
            cells(ax, [(left + x, y)], facecolor=shade(delta))


def marked(ax: Axes, left: float, indices: Iterable[int], sign: str, colour: str) -> None:
    """Entries that leave or arrive."""
    for index in indices:
        x, y = corner(index)
        cells(ax, [(left + x, y)], facecolor=PAPER, edgecolor=colour, linewidth=1.6)
        ax.text(left + x + 0.5, y + 0.47, sign, color=colour, ha="center", va="center", weight="bold", fontsize=10)


def strip(ax: Axes, left: float, deltas: dict[int, float], marks: dict[int, str]) -> None:
    """What is stored: sorted indices, and a delta for each."""
    cells(ax, [(left + place * CELL, INDICES) for place in range(len(deltas))], facecolor="#e9edf1")
    for place, (index, delta) in enumerate(deltas.items()):
        x, mark = left + place * CELL, marks.get(index)
        fill = PAPER if mark else shade(delta)
        cells(ax, [(x, DELTAS)], facecolor=fill, **({"edgecolor": mark, "linewidth": 1.4} if mark else {}))
        ax.text(x + 0.5, INDICES + 0.47, f"{index}", ha="center", va="center", fontsize=8.2, color=mark or INK)
        number = f"{10 * delta:.0f}".replace("-", "\N{MINUS SIGN}")
        pale = not mark and abs(delta) > 0.55
        ax.text(x + 0.5, DELTAS + 0.47, number, ha="center", va="center", fontsize=8.2,
                color=mark or (PAPER if pale else INK))  # fmt: skip


def heading(ax: Axes, left: float, title: str, text: str, colour: str = INK) -> None:
    """Two lines over a panel."""
    ax.text(left, SIDE + 1.5, title, fontsize=11.5, weight="bold", color=colour, va="baseline")
    ax.text(left, SIDE + 0.52, text, fontsize=8.4, color=SOFT, va="baseline")


def arrow(ax: Axes, start: tuple[float, float], end: tuple[float, float], **look) -> None:
    """From panel to panel."""
    ax.add_patch(FancyArrowPatch(start, end, arrowstyle="-|>", mutation_scale=13, color=SOFT, linewidth=1.5,
                                 shrinkA=0, shrinkB=0, **look))  # fmt: skip


def draw() -> Figure:
    """The whole picture."""
    width = 9.0
    figure = Figure(figsize=(width, width * (TOP - BOTTOM) / (RIGHT - LEFT)))
    ax = figure.add_axes((0, 0, 1, 1))
    ax.set(xlim=(LEFT, RIGHT), ylim=(BOTTOM, TOP), aspect="equal")
    ax.axis("off")
    ax.add_patch(FancyBboxPatch((LEFT + 0.35, BOTTOM + 0.35), RIGHT - LEFT - 0.7, TOP - BOTTOM - 0.7,
                                boxstyle="round,pad=0.2,rounding_size=0.7", facecolor=PAPER, edgecolor=EDGE,
                                linewidth=1))  # fmt: skip

    first, second, third, fourth = (PANEL * place for place in range(4))
    heading(ax, first, "Base", "frozen weights")
    base(ax, first, 0.38)

    heading(ax, second, "Update", "train the active entries", PLUS)
    base(ax, second, 0.1)
    active(ax, second, UPDATED)
    strip(ax, second, UPDATED, {})

    heading(ax, third, "Drop", "the smallest deltas leave", DROPPED)
    base(ax, third, 0.1)
    active(ax, third, SURVIVING)
    marked(ax, third, DROP, "\N{MULTIPLICATION SIGN}", DROPPED)
    strip(ax, third, UPDATED, dict.fromkeys(DROP, DROPPED))

    heading(ax, fourth, "Grow", "where gradients are largest", GROWN)
    base(ax, fourth, 0.1)
    active(ax, fourth, REGROWN)
    marked(ax, fourth, GROW, "+", GROWN)
    strip(ax, fourth, REGROWN, dict.fromkeys(GROW, GROWN))

    ax.text(first + SIDE + 1.55, SIDE / 2, "+", fontsize=20, color=SOFT, ha="center", va="center")
    for left in (second, third):
        arrow(ax, (left + SIDE + 0.75, SIDE / 2), (left + PANEL - 0.75, SIDE / 2))
    arrow(ax, (fourth + SIDE / 2, -3.9), (second + SIDE / 2, -3.9), connectionstyle="bar,fraction=-0.035")
    ax.text(third + SIDE / 2, -5.35, "repeat every few steps until training ends", fontsize=8.6, color=SOFT,
            ha="center", va="center")  # fmt: skip

    ax.text(first, (INDICES + DELTAS + 1) / 2, "an adapter\nis two lists", fontsize=8.6, color=SOFT, va="center")
    for y, name in ((INDICES, "indices"), (DELTAS, "deltas")):
        ax.text(second - 0.5, y + 0.45, name, fontsize=9.5, weight="bold", ha="right", va="center")
    return figure


def main(target: Path = Path("docs/images/sparse_finetuning.png")) -> None:
    """Write the picture as PNG with a palette, which is a third of the size."""
    pixels = BytesIO()
    with rc_context(STYLE):
        draw().savefig(pixels, transparent=True, dpi=200)
    Image.open(pixels).quantize(256).save(target, optimize=True)


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:2]))
