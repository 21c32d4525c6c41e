"""Write all results of a folder as one HTML page with plots that needs no other file."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from importlib import import_module
from itertools import zip_longest
from pathlib import Path
from typing import Any

from markupsafe import Markup

from scale_sft.errors import UserError
from scale_sft.files import write_text
from scale_sft.reporting.html import heading, page_of, pairs, picture, table, titled
from scale_sft.reporting.plots import Plot

from .rows import Row, machine_name, read_rows

PAGE = "bench.html"
BENCHMARKS = {
    "step": "step.page",
    "dpo": "step.pair_page",
    "memory": "memory.measure",
    "reallocate": "reallocate",
    "scale": "scale.page",
    "quality": "quality.page",
    "merging": "quality.merging",
    "drift": "quality.drift",
    "sync": "sync",
    "gpu": "gpu.page",
}
"""Modules of this package by benchmark; `part(rows) -> Part` takes the rows of all runs in a folder, oldest first."""


@dataclass(frozen=True)
class Table:
    """The lines of one case, measured on one machine."""

    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    sources: Sequence[Row]  # the rows of results behind it; empty: those of the table before
    title: str = ""
    words: bool = False  # its cells are text, aligned left
    note: str = ""  # below it


@dataclass(frozen=True)
class Part:
    """One benchmark on a page: every case, on every machine that measured it."""

    title: str
    text: str  # how to read it, in a few sentences
    tables: Sequence[Table]
    plots: Sequence[Plot] = field(default_factory=tuple)


def part_of_groups(
    title: str,
    text: str,
    columns: Sequence[str],
    cells: Callable[[dict[str, Any], dict[str, Any]], Sequence[str]],
    groups: Sequence[list[Row]],
    title_of: Callable[[list[Row]], str],
    plots: Callable[[list[Row]], Sequence[Plot]],
) -> Part:
    """Make a part with a table, and plots, for each group of rows.

    Args:
        cells: (settings, result) of a row -> the cells of its line.
        title_of: group -> its distinctive settings, for the title of its table and the start of its plots' captions.
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
    """Write `bench.html` next to the rows, and return its path.

    Raises:
        UserError: the folder has no rows, or a line is not a row of its benchmark.
    """
    parts = []
    for name in BENCHMARKS:
        rows = read_rows(folder, name)
        if rows:
            parts.append(_part_of(rows, name, Path(folder) / f"{name}.jsonl"))
    if not parts:
        raise UserError(
            f"bench: got no results in {folder}, expected {next(iter(BENCHMARKS))}.jsonl or another file of `scale-sft "
            "bench`. Fix: run a benchmark with this folder as its output first"
        )
    page = page_of("scale_sft: benchmarks", [heading("Sparse fine-tuning and its peers"), *parts])
    write_text(Path(folder) / PAGE, page)
    return Path(folder) / PAGE


_FOREIGN = (LookupError, TypeError, ValueError, AttributeError)


def _part_of(rows: list[Row], benchmark: str, path: Path) -> Markup:
    """Make the HTML of one benchmark from all lines of its file, in order.

    Raises:
        UserError: a row lacks settings or results that rows of this benchmark have.
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
                    f"bench: {path}, line {number}: expected a row as `bench {benchmark}` writes it, got another "
                    f"({type(error).__name__}: {error}). Fix: remove the line"
                ) from None
        raise


def _html(part: Part) -> Markup:
    parts = [titled(part.title, "", part.text)]
    sources: Sequence[Row] = ()
    for one, following in zip_longest(part.tables, part.tables[1:]):
        sources = one.sources or sources
        parts.append(titled(one.title, table(one.columns, one.rows), text=one.note, level=3))
        parts += [pairs(origin(sources))] if following is None or following.sources else []
    return Markup("").join([*parts, *(picture(plot) for plot in part.plots)])


def origin(sources: Sequence[Row]) -> dict[str, str]:
    """Tell where rows come from: machine, command, commit, time and versions of each invocation."""
    last = {row["run"]: row for row in sources}.values()
    every = {
        "machine": [machine_name(row["machine"]) for row in last],
        "command": [row["command"] for row in last],
        "commit": [row["commit"] for row in last],
        "measured": [row["finished"] for row in last],
        "versions": [", ".join(f"{name} {value}" for name, value in row["versions"].items()) for row in last],
    }
    return {name: "; ".join(dict.fromkeys(values)) for name, values in every.items()}
