"""Show measured rows in the terminal, the file of results and the page, as each is finished."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from .rows import Results

_WIDTH = 130  # narrower terminals wrap lines, as a squeezed table would be unreadable

Found = Iterator[tuple[dict[str, Any], dict[str, Any]]]
"""Pairs (settings, result), as soon as each is measured."""


def report(
    output: Path,
    benchmark: str,
    found: Found,
    *,
    count: int,
    columns: Sequence[str],
    cells: Callable[[dict[str, Any], dict[str, Any]], Sequence[str]],
) -> None:
    """Write each row as it is measured, with progress; when finished or interrupted, show the table and write the page.

    Args:
        count: expected number of rows.
        columns, cells: of the table; `cells(settings, result)` is one line of it.
    """
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
    from rich.table import Table

    results, lines = Results(output, benchmark), []
    bar = Progress(
        TextColumn(f"bench {benchmark}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        console=Console(stderr=True),
        transient=True,
    )
    try:
        with bar:
            task = bar.add_task("", total=count)
            for settings, result in found:
                results.add(settings, **result)
                lines.append(cells(settings, result))
                bar.advance(task)
    finally:
        if lines:
            from .page import write_page

            table = Table(*columns, show_edge=False)
            for column in table.columns[1:]:
                column.justify = "right"
            for line in lines:
                table.add_row(*line)
            console = Console(width=max(Console().width, _WIDTH), highlight=False)
            console.print(table)
            console.print(f"rows: {results.path}, page: {write_page(output)}", soft_wrap=True)
