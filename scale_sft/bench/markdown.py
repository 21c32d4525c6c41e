"""Write all results of a folder as Markdown tables: docs/benchmarks.md."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from importlib import import_module
from pathlib import Path
from textwrap import fill

from scale_sft.files import write_text

from .page import BENCHMARKS, Table, origin
from .rows import Row, read_rows
from .step.page import breakdown_table

NOTES = "notes.md"
"""A file in the folder of the rows: text about figures that have no rows, appended unchanged."""

_HEAD = """# Benchmarks

The tables below are written from the rows of `{folder}/*.jsonl` by

    scale-sft bench page {folder} --markdown {target}

so change the rows, not this file. [bench.md](bench.md) says how each benchmark measures and how to read it.
"""


def write_markdown(folder: Path, target: Path) -> Path:
    """Write all results of `folder` to `target`, and return it.

    `page.write_page` checks the rows; call it first.
    """
    write_text(target, markdown_of(folder, target))
    return target


def markdown_of(folder: Path, target: Path) -> str:
    """Render the page: a section for each benchmark that has rows, with its tables and their origin."""
    measured = {name: rows for name in BENCHMARKS if (rows := read_rows(folder, name))}
    parts = [_HEAD.format(folder=Path(folder).as_posix(), target=Path(target).as_posix())]
    for name, rows in measured.items():
        part = import_module(f"{__package__}.{BENCHMARKS[name]}").part(rows)
        parts.append(f"## {part.title}\n\n{fill(_escaped(part.text), 120)}\n")
        parts += [_section(table) for table in part.tables]
    if (notes := Path(folder) / NOTES).is_file():
        parts.append(notes.read_text(encoding="utf-8").strip() + "\n")
    parts.append("## Versions\n\n" + "\n".join(f"- {one}" for one in _versions(measured.values())) + "\n")
    return "\n".join(parts)


def _section(table: Table) -> str:
    """Render a table under its title, with its commands and, if measured, the pieces of its steps."""
    blocks = [f"### {table.title}\n"] if table.title else []
    blocks += [_made_by(table)] if table.sources else []
    blocks += [_table(table.columns, table.rows, words=table.words)]
    blocks += [f"{fill(_escaped(table.note), 120, break_on_hyphens=False)}\n"] if table.note else []
    timed = [row for row in table.sources if "breakdown" in row["result"]]
    if timed:
        blocks += ["Pieces of a step:\n", _table(*breakdown_table(timed))]
    return "\n".join(blocks)


def _made_by(table: Table) -> str:
    """Render the commands as a block, then commit, day and, unless the title names it, machine."""
    found = origin(table.sources)
    commands = "\n".join(f"    {command}" for command in found["command"].split("; "))
    days = ", ".join(dict.fromkeys(day[:10] for day in found["measured"].split("; ")))
    machine = "" if found["machine"] in table.title else f"{found['machine']}; "
    return f"{commands}\n\n{machine}commit {found['commit']}; {days}\n"


def _table(columns: Sequence[str], rows: Iterable[Sequence[str]], *, words: bool = False) -> str:
    """Render a table with its first column left-aligned, and all others, unless they are words, right-aligned."""
    line = lambda cells: f"| {' | '.join(map(_escaped, cells))} |"
    return (
        "\n".join([line(columns), f"|---{('|---' if words else '|---:') * (len(columns) - 1)}|", *map(line, rows)])
        + "\n"
    )


def _versions(benchmarks: Iterable[Sequence[Row]]) -> Iterator[str]:
    """Yield each set of versions that rows were measured with, once."""
    for versions in dict.fromkeys(origin(rows)["versions"] for rows in benchmarks):
        yield from dict.fromkeys(versions.split("; "))


def _escaped(text: str) -> str:
    return str(text).replace("|", "\\|").replace("<", "&lt;")
