"""Build the parts of a self-contained HTML page.

The markup is in two templates: `page.html.jinja`, the shell with its style, and `parts.html.jinja`, a macro for each
part. Both escape whatever is not markup already, so text from a run cannot become markup.
"""

import io
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup, escape
from matplotlib import rc_context
from matplotlib.figure import Figure

from .plots import Plot
from .style import GRID, INK, STYLE

_TEMPLATES = Environment(
    loader=FileSystemLoader(Path(__file__).parent),
    autoescape=True,
    undefined=StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
    keep_trailing_newline=True,
)
_PARTS: Any = _TEMPLATES.get_template("parts.html.jinja").module


def render(figure: Figure, plot: Plot) -> tuple[bytes, Markup]:
    """Draw a figure as a PNG, and as an `<svg>` element whose ink and grid follow the colours of the page."""
    png, svg = io.BytesIO(), io.StringIO()
    # The salt makes the identifiers inside differ between the pictures of one page, and equal between two reports.
    with rc_context({**STYLE, "svg.fonttype": "path", "svg.hashsalt": plot.name}):
        figure.savefig(png, format="png", facecolor="white")
        figure.set_layout_engine("none")  # the layout found for the PNG is good for both
        figure.savefig(svg, format="svg", facecolor="none", metadata={"Date": None})
    element = svg.getvalue()
    element = element[element.index("<svg") :]
    element = re.sub(r"<metadata>.*?</metadata>|<!--.*?-->", "", element, flags=re.DOTALL)
    element = element.replace(INK, "var(--ink)").replace(GRID, "var(--grid)")
    element = element.replace("<svg", f'<svg role="img" aria-label="{escape(plot.title)}"', 1)
    return png.getvalue(), Markup(element)  # matplotlib escapes the texts inside


def page_of(title: str, parts: Iterable[Markup | str]) -> str:
    """Join parts into a page of HTML that needs no other file; empty parts are left out."""
    return _TEMPLATES.get_template("page.html.jinja").render(title=title, parts=[part for part in parts if part])


def heading(title: str, quiet: str = "") -> Markup:
    """Title of the page, with a quiet line below it."""
    return _PARTS.heading(title, quiet)


def section(plot: Plot, svg: Markup) -> Markup:
    """Put a picture under its title."""
    return _PARTS.section(plot, svg)


def picture(plot: Plot) -> Markup:
    """Draw a plot that needs no run, under its title; where there is nothing to draw, say why."""
    figure = plot.figure()
    if isinstance(figure, str):
        return titled(plot.title, "", text=f"Nothing to draw: {figure}.")
    return section(plot, render(figure, plot)[1])


def titled(title: str, content: Markup | str, text: str = "", level: int = 2) -> Markup:
    """Put content under a title, with a paragraph of text between them."""
    return _PARTS.titled(title, content, text, level)


def pairs(rows: Mapping[str, object]) -> Markup:
    """Make a table of names and values."""
    return _PARTS.pairs(rows)


def table(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> Markup:
    """Make a table of numbers: the first column left-aligned, all others right-aligned."""
    return _PARTS.table(columns, rows)


def listed(items: Iterable[str]) -> Markup:
    """Make a list with bullets."""
    return _PARTS.listed(items)


def details(title: str, content: Markup | str) -> Markup:
    """Make content that opens at a click."""
    return _PARTS.details(title, content)


def preformatted(text: str) -> Markup:
    """Show text with its line breaks, in a fixed-width font."""
    return _PARTS.preformatted(text)
