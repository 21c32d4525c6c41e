"""All results of a folder as one HTML page with plots, which needs no other file."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from html import escape
from importlib import import_module
from pathlib import Path
from typing import Any

from matplotlib import rc_context

from scale_sft.errors import UserError
from scale_sft.files import write_text
from scale_sft.report import page_of, pairs, render, section, table
from scale_sft.report_axes import STYLE
from scale_sft.report_plots import Plot

from .rows import machine_name, read_rows

PAGE = "bench.html"
BENCHMARKS = ("step", "memory", "reallocate", "scale", "quality")
"""Each is a module of this package with `part(rows) -> Part`, rows of all its runs in a folder, oldest first."""


@dataclass(frozen=True)
class Part:
    """What a page says of one benchmark: of its newest run, or of all where they belong together."""

    title: str
    text: str  # how to read it, one or two sentences
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    source: dict[str, Any]  # the row whose machine, versions, commit and command stand for all
    plots: Sequence[Plot] = field(default_factory=tuple)  # `draw` is called with None


def write_page(folder: Path) -> Path:
    """Write `bench.html` beside the rows; its path.

    Raises:
        UserError: there is no row in the folder, or a line that is none.
    """
    parts = []
    for name in BENCHMARKS:
        rows = read_rows(folder, name)
        if rows:
            parts.append(_html(import_module(f"{__package__}.{name}").part(rows)))
    if not parts:
        raise UserError(
            f"bench: no results in {folder}; expected {BENCHMARKS[0]}.jsonl or another of `scale-sft bench`"
        )
    head = "<h1>Sparse fine-tuning beside its peers</h1>"
    write_text(Path(folder) / PAGE, page_of("scale_sft: benchmarks", [head, *parts]))
    return Path(folder) / PAGE


def _html(part: Part) -> str:
    source = part.source
    of = {
        "machine": machine_name(source["machine"]),
        "command": source["command"],
        "commit": source["commit"],
        "measured": source["finished"],
        "versions": ", ".join(f"{name} {value}" for name, value in source["versions"].items()),
    }
    pictures = []
    for plot in part.plots:
        with rc_context(STYLE):
            figure = plot.draw(None)
        pictures.append(section(plot, render(figure, plot)[1]))
    content = (
        f"<section><h2>{escape(part.title)}</h2><p>{escape(part.text)}</p>{table(part.columns, part.rows)}</section>"
    )
    return content + "".join(pictures) + pairs(of)
