"""Pictures of a run: `report.html`, one file that needs nothing else, and the same pictures as PNG beside it."""

import io
import math
import re
import time
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from pathlib import Path

from matplotlib import rc_context
from matplotlib.figure import Figure

from scale_sft.files import write_bytes
from scale_sft.report_axes import GRID, INK, STYLE
from scale_sft.report_data import KindOfWeight, Run, by_kind, load_run, overview
from scale_sft.report_plots import PLOTS, Plot

REPORT_FILE = "report.html"


def write_report(output_dir: Path) -> Path:
    """Read the records of a finished, running or dead run and write `report.html` and its PNGs; the path of the former.

    A picture without data is left out, and one of an earlier report is removed.
    """
    output_dir = Path(output_dir)
    run = load_run(output_dir)
    sections, missing = [], {}
    for plot in PLOTS:
        figure = plot.figure(run)
        picture = output_dir / f"{plot.name}.png"
        if isinstance(figure, str):
            picture.unlink(missing_ok=True)
            missing[plot.title] = figure
            continue
        png, svg = render(figure, plot)
        write_bytes(picture, png)
        sections.append(section(plot, svg))
    page = _page(run, sections, missing)
    write_bytes(output_dir / REPORT_FILE, page.encode("utf-8"))
    return output_dir / REPORT_FILE


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


def _page(run: Run, sections: Sequence[str], missing: Mapping[str, str]) -> str:
    left_out = "".join(f"<li>{escape(title)}: {escape(reason)}.</li>" for title, reason in missing.items())
    parts = [
        f"<h1>{escape(run.name)}</h1>",
        f'<p class="quiet">Sparse fine-tuning with scale_sft. Report of {time.strftime("%Y-%m-%d %H:%M:%S %Z")}.</p>',
        pairs(overview(run)),
        *sections,
        _kinds(by_kind(run)),
        f"<section><h2>Left out</h2><ul>{left_out}</ul></section>" if left_out else "",
        _description(run),
        details("Every weight", _weights(run)) if run.per_weight else "",
        details("Configuration", f"<pre>{escape(run.config_text)}</pre>") if run.config_text else "",
    ]
    return page_of(f"{run.name}: sparse fine-tuning", parts)


def page_of(title: str, parts: Iterable[str]) -> str:
    """A page of HTML that needs no other file."""
    return _HTML.replace("{title}", escape(title)).replace("{body}", "\n".join(part for part in parts if part))


def _description(run: Run) -> str:
    if run.description is None:
        return ""
    rows, kinds = run.description.get("rows") or {}, run.description.get("table") or []
    columns = list(dict.fromkeys(name for row in kinds for name in row))
    content = pairs(rows)
    if columns:
        content += table(columns, ([row.get(name, "") for name in columns] for row in kinds))
    return details(run.description.get("title") or "What was trained", content)


def _kinds(kinds: Mapping[str, KindOfWeight]) -> str:
    if not kinds:
        return ""
    columns = ["module", "weights", "entries", "active", "density", "L2 norm of deltas", "largest |delta|"]
    rows = (
        [
            name,
            f"{kind.weights:,}",
            f"{kind.numel:,}",
            f"{kind.active:,}",
            f"{kind.active / kind.numel:.3%}" if kind.numel else "",
            _figures(kind.square_delta**0.5),
            _figures(kind.max_abs_delta),
        ]
        for name, kind in kinds.items()
    )
    return f"<section><h2>Deltas by kind of module</h2>{table(columns, rows)}</section>"


def _weights(run: Run) -> str:
    columns = ["weight", "entries", "active", "L2 norm of deltas", "largest |delta|"]
    rows = (
        [
            name,
            f"{int(values.get('numel') or 0):,}",
            f"{int(values.get('active') or 0):,}",
            _figures(values.get("l2_delta")),
            _figures(values.get("max_abs_delta")),
        ]
        for name, values in run.per_weight.items()
    )
    return table(columns, rows)


def _figures(value: float | None) -> str:
    return "" if value is None or math.isnan(value) else f"{value:.4g}"


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
