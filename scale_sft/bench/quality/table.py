"""The table of `bench quality`: its columns, as text and as CSV."""

from __future__ import annotations

import csv
import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from .contestants import BASE
from .intervals import Figure
from .summary import Row, Summary, groups_of, retained_names, summaries

REFERENCE = "lora"
"""The contestant that the others are compared with, where it takes part."""
MISSING = "-"


@dataclass(frozen=True)
class Column:
    """A figure of all contestants."""

    title: str
    key: str  # see `Summary.values`
    shown: Callable[[float], str]
    scale: float = 1.0
    unit: str = ""
    with_spread: bool = True

    def cell(self, found: Figure | None) -> str:
        """Format mean and confidence interval."""
        if found is None:
            return MISSING
        text = self.shown(self.scale * found.mean)
        if self.with_spread and found.half_width is not None:
            text += f" ± {self.shown(self.scale * found.half_width)}"
        return text + self.unit


LOSS = Column("held-out loss", "held_out_loss", "{:.4f}".format)
_MATCH = Column("exact match", "exact_match", "{:.1f}".format, 100.0, " %")
_OTHERS = (
    Column("Frobenius norm", "update_frobenius", "{:.3g}".format, with_spread=False),
    Column("spectral norm", "update_spectral", "{:.3g}".format, with_spread=False),
    Column("visible in bf16", "visible_fraction", "{:.1f}".format, 100.0, " %", with_spread=False),
    Column("seconds", "seconds", "{:,.1f}".format, with_spread=False),
    Column("peak memory", "peak_bytes", "{:,.1f}".format, 2.0**-20, " MiB", with_spread=False),
)


Table = tuple[list[str], list[list[str]]]
"""Columns and lines."""


def tables_of(rows: Sequence[Row]) -> list[tuple[str, Table]]:
    """Make the tables of one group of `summary.groups_of`, with a title each; that of the first is empty."""
    against = difference_table(rows)
    tables = [("", learning_table(rows))]
    if against is not None:
        tables.append((f"Losses less those of {REFERENCE}", against))
    return [*tables, ("Updates and costs", cost_table(rows))]


def learning_table(rows: Sequence[Row]) -> Table:
    """Make the table of what contestants have learned and retained, of one group of `summary.groups_of`."""
    found = summaries(rows)
    columns = [LOSS, *([_MATCH] if any(summary.values(_MATCH.key) for summary in found) else []), *_kept(rows)]

    def line(summary: Summary) -> list[str]:
        rate = f"{summary.best_rate:g}" if summary.best_rate is not None else MISSING
        seeds = str(len(summary.runs)) if summary.name != BASE.name else MISSING
        return [summary.name, rate, seeds, *(column.cell(summary.figure(column.key)) for column in columns)]

    return ["method", "rate", "seeds", *(column.title for column in columns)], [line(summary) for summary in found]


def difference_table(rows: Sequence[Row]) -> Table | None:
    """Make the table of the differences of all losses to those of REFERENCE; None where it has nobody to compare.

    A cell holds the mean over the seeds that both have, the half width of its interval over them, and in brackets that
    over the examples.
    """
    found = summaries(rows)
    other = next((summary for summary in found if summary.name == REFERENCE and summary.runs), None)
    if other is None:
        return None
    columns = [LOSS, *_kept(rows)]
    lines = []
    for summary in found:
        if summary.name not in (BASE.name, other.name) and (first := summary.difference(other, LOSS.key)):
            differences = (_difference(summary, other, column.key) for column in columns)
            lines.append([summary.name, str(first.count), *differences])
    return (["method", "seeds", *(column.title for column in columns)], lines) if lines else None


def _kept(rows: Sequence[Row]) -> list[Column]:
    return [Column(f"loss on {name}", f"retained.{name}", "{:.3f}".format) for name in retained_names(rows)]


def _difference(summary: Summary, other: Summary, key: str) -> str:
    found = summary.difference(other, key)
    if found is None:
        return MISSING
    text = f"{found.mean:+.4f}"
    if found.half_width is not None:
        text += f" ± {found.half_width:.4f}"
    by_examples = summary.half_width_by_examples(other, key)
    return text if by_examples is None else f"{text} (± {by_examples:.4f})"


def cost_table(rows: Sequence[Row]) -> Table:
    """Make the table of updates and costs, of one group of `summary.groups_of`; without the base, which has none."""
    found = [summary for summary in summaries(rows) if summary.name != BASE.name]
    trained = lambda summary: next((f"{row['result']['trainable']:,}" for row in summary.runs), MISSING)
    lines = [
        [summary.name, trained(summary), *(column.cell(summary.figure(column.key)) for column in _OTHERS)]
        for summary in found
    ]
    return ["method", "weights", *(column.title for column in _OTHERS)], lines


def csv_of(rows: Sequence[Row]) -> str:
    """Write all groups as CSV, a line per contestant: for each figure its mean, and half its 95 % interval."""
    names = retained_names(rows)
    keys = ["held_out_loss", "exact_match", *(f"retained.{name}" for name in names)]
    keys += ["update_frobenius", "update_spectral", "visible_fraction", "seconds", "tokens_per_second", "peak_bytes"]
    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    shared_columns = ["task", "base", "train_data", "rank_equivalent", "steps", "global_batch_size"]
    figures = [part for key in keys for part in (key, f"{key} ci95")]
    writer.writerow([*shared_columns, "method", "trained_weights", "learning_rate", "seeds", *figures])
    for group in groups_of(rows):
        shared = group[-1]["settings"]["shared"]
        for summary in summaries(group):
            if not summary.runs:
                continue
            found = [summary.figure(key) for key in keys]
            cells = [part for one in found for part in ((one.mean, one.half_width) if one else (None, None))]
            trained = summary.runs[0]["result"]["trainable"]
            described = [shared.get(name) for name in shared_columns]
            writer.writerow([*described, summary.name, trained, summary.best_rate, len(summary.runs), *cells])
    return file.getvalue()
