"""Build the parts of a self-contained HTML page."""

import io
import re
from collections.abc import Iterable, Mapping, Sequence
from html import escape

from matplotlib import rc_context
from matplotlib.figure import Figure

from .plots import Plot
from .style import GRID, INK, STYLE


def render(figure: Figure, plot: Plot) -> tuple[bytes, str]:
    """The figure as a PNG, and as an `<svg>` element whose ink and grid follow the colours of the page."""
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
    return png.getvalue(), element.replace("<svg", f'<svg role="img" aria-label="{escape(plot.title)}"', 1)


def section(plot: Plot, svg: str) -> str:
    """One picture under its title."""
    caption = f"<p>{escape(plot.caption)}</p>" if plot.caption else ""
    return f'<section id="{plot.name}"><h2>{escape(plot.title)}</h2>{caption}{svg}</section>'


def page_of(title: str, parts: Iterable[str]) -> str:
    """A page of HTML that needs no other file."""
    return _HTML.replace("{title}", escape(title)).replace("{body}", "\n".join(part for part in parts if part))


def pairs(rows: Mapping[str, object]) -> str:
    """A table of names and values."""
    cells = "".join(f"<tr><th>{escape(str(k))}</th><td>{escape(str(v))}</td></tr>" for k, v in rows.items())
    return f'<table class="pairs">{cells}</table>'


def table(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """The first column to the left, all others, being numbers, to the right."""
    head = "".join(f"<th>{escape(name)}</th>" for name in columns)
    body = "".join("<tr>" + "".join(f"<td>{escape(str(cell))}</td>" for cell in row) + "</tr>" for row in rows)
    return f'<div class="wide"><table class="numbers"><tr>{head}</tr>{body}</table></div>'


def details(title: str, content: str) -> str:
    """Content that opens at a click."""
    return f"<details><summary>{escape(title)}</summary>{content}</details>"


_HTML = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>{title}</title>
<style>
:root { --ink: #24292f; --grid: #d8dee4; --quiet: #59636e; --page: #ffffff; --card: #f6f8fa; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e6edf3; --grid: #30363d; --quiet: #9198a1; --page: #0d1117; --card: #161b22; }
}
body { margin: 2rem auto; max-width: 54rem; padding: 0 1rem; background: var(--page); color: var(--ink);
  font: 15px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif; }
h1 { margin: 0; font-size: 1.7rem; overflow-wrap: anywhere; }
h2 { margin: 2.4rem 0 .2rem; font-size: 1.15rem; }
section p, .quiet, section ul { margin: .1rem 0 .6rem; color: var(--quiet); }
svg { display: block; width: 100%; height: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { padding: .25rem .7rem; text-align: left; vertical-align: top; border-bottom: 1px solid var(--grid); }
th { font-weight: 600; white-space: nowrap; }
td { overflow-wrap: anywhere; }
.pairs { width: 100%; background: var(--card); border-radius: 6px; margin: 1rem 0; }
.pairs th { width: 11rem; font-weight: 400; color: var(--quiet); }
.wide { overflow-x: auto; }
.numbers { width: 100%; font-size: .9rem; }
.numbers td { white-space: nowrap; }
.numbers th:not(:first-child), .numbers td:not(:first-child) { text-align: right; }
details { margin: 1rem 0; border-top: 1px solid var(--grid); padding-top: .6rem; }
summary { cursor: pointer; font-weight: 600; }
pre { overflow-x: auto; padding: .8rem; background: var(--card); border-radius: 6px; font-size: .85rem; }
</style>
</head>
<body>
{body}
</body>
</html>
"""
