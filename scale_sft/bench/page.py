"""All results of a folder as one HTML page with plots, which needs no other file."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from html import escape
from importlib import import_module
from pathlib import Path
from typing import Any

from matplotlib import rc_context

from scale_sft.errors import UserError
from scale_sft.files import write_text
from scale_sft.reporting.html import page_of, pairs, render, section, table
from scale_sft.reporting.plots import Plot
from scale_sft.reporting.style import STYLE

from .rows import Row, machine_name, read_rows

PAGE = "bench.html"
BENCHMARKS = {
    "step": "step.page",
    "memory": "memory.measure",
    "reallocate": "reallocate",
    "scale": "scale.page",
    "quality": "quality.page",
}
"""By name, the module of this package with `part(rows) -> Part`, rows of all its runs in a folder, oldest first."""


@dataclass(frozen=True)
class Table:
    """Lines that belong together: of one case, measured on one machine."""

    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    sources: Sequence[Row]  # the rows of results that it was made from
    title: str = ""


@dataclass(frozen=True)
class Part:
    """What a page says of one benchmark: every case on every machine that it was measured on."""

    title: str
    text: str  # how to read it, some sentences
    tables: Sequence[Table]
    plots: Sequence[Plot] = field(default_factory=tuple)  # `draw` is called with None


def part_of_groups(
    title: str,
    text: str,
    columns: Sequence[str],
    cells: Callable[[dict[str, Any], dict[str, Any]], Sequence[str]],
    groups: Sequence[list[Row]],
    title_of: Callable[[list[Row]], str],
    plots: Callable[[list[Row]], Sequence[Plot]],
) -> Part:
    """A part with a table, and plots, for each group of rows.

    Args:
        cells: of the line for (settings, result) of a row.
        title_of: what sets a group apart: the title of its table, and the beginning of its plots' captions.
    """
    return Part(
        title=title,
        text=text,
        tables=[
            Table(
                columns, [cells(row["settings"], row["result"]) for row in group], sources=group, title=title_of(group)
            )
            for group in groups
        ],
        plots=[
            replace(plot, name=f"{plot.name}-{number}", caption=f"{title_of(group)}. {plot.caption}")
            for number, group in enumerate(groups)
            for plot in plots(group)
        ],
    )


def write_page(folder: Path) -> Path:
    """Write `bench.html` beside the rows; its path.

    Raises:
        UserError: there is no row in the folder, or a line that is none, or none of this benchmark.
    """
    parts = []
    for name in BENCHMARKS:
        rows = read_rows(folder, name)
        if rows:
            parts.append(_part_of(rows, name, Path(folder) / f"{name}.jsonl"))
    if not parts:
        raise UserError(
            f"bench: no results in {folder}; expected {next(iter(BENCHMARKS))}.jsonl or another of `scale-sft bench`"
        )
    head = "<h1>Sparse fine-tuning beside its peers</h1>"
    write_text(Path(folder) / PAGE, page_of("scale_sft: benchmarks", [head, *parts]))
    return Path(folder) / PAGE


_FOREIGN = (LookupError, TypeError, ValueError, AttributeError)


def _part_of(rows: list[Row], benchmark: str, path: Path) -> str:
    """HTML of all rows of a benchmark, the lines of a file in their order.

    Raises:
        UserError: a row has other settings or results than rows of this benchmark have.
    """
    html = lambda some: _html(import_module(f"{__package__}.{BENCHMARKS[benchmark]}").part(some))
    try:
        return html(rows)
    except _FOREIGN:
        for number, row in enumerate(rows, start=1):
            try:
                html([row])
            except _FOREIGN as error:
                raise UserError(
                    f"bench: {path}, line {number} is no row of `bench {benchmark}` as this version writes them "
                    f"({type(error).__name__}: {error}); remove it"
                ) from None
        raise


def _html(part: Part) -> str:
    pictures = []
    for plot in part.plots:
        with rc_context(STYLE):
            figure = plot.draw(None)
        pictures.append(section(plot, render(figure, plot)[1]))
    head = f"<section><h2>{escape(part.title)}</h2><p>{escape(part.text)}</p></section>"
    return "".join([head, *(_table_html(one) for one in part.tables), *pictures])


def _table_html(one: Table) -> str:
    title = f"<h3>{escape(one.title)}</h3>" if one.title else ""
    return f"<section>{title}{table(one.columns, one.rows)}</section>" + pairs(origin(one.sources))


def origin(sources: Sequence[Row]) -> dict[str, str]:
    """Where rows come from: all that differs between their invocations is told, the last of each measured when."""
    last = {row["run"]: row for row in sources}.values()
    every = {
        "machine": [machine_name(row["machine"]) for row in last],
        "command": [row["command"] for row in last],
        "commit": [row["commit"] for row in last],
        "measured": [row["finished"] for row in last],
        "versions": [", ".join(f"{name} {value}" for name, value in row["versions"].items()) for row in last],
    }
    return {name: "; ".join(dict.fromkeys(values)) for name, values in every.items()}
