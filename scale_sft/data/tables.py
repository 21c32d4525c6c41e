"""Rows of CSV, text and parquet files, saved data sets and hub data, as JSON objects; text stays what the file says.

Every reader yields (line, record, JSON text of the record or None); line is 0 where rows are not lines.
`Reading.columns` grows as columns are seen.
"""

from __future__ import annotations

import csv
import re
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from scale_sft.errors import UserError, first_line

from .folders import SAVED, kind_of, opened
from .jsonl import decode, read_json, refuse_double_fields
from .sources import COLUMNS, Source, needed_columns

Row = tuple[int, dict[str, Any], str | None]
BATCH_ROWS = 1000
_LINES = re.compile(r"[^\r\n]*(?:\r\n|\r|\n)|[^\r\n]+")


@dataclass
class Reading:
    """One file or data set of a source while it is read."""

    origin: str
    source: Source
    columns: dict[str, None] = field(default_factory=dict)

    def found(self, columns: Iterable[str]) -> list[str]:
        """Take note of all columns; return those that are needed."""
        self.columns.update(dict.fromkeys(columns))
        return needed_columns(self.columns, self.source, self.origin)

    def rows(self, path: Path, split: str) -> Iterator[Row]:
        """Yield the rows of a file or saved data set; `split` is the default one of several.

        Raises:
            UserError: it is not readable; names the line where there is one.
        """
        kind = kind_of(path)
        read = {"json": self._json, "csv": self._csv, "parquet": self._parquet, "text": self._text}
        if path.is_file() and not path.stat().st_size:
            raise UserError(f"data: {path} is empty; expected one example per line")
        try:
            yield from self._saved(path, split) if kind == SAVED else read[str(kind)](path)
        except (UserError, GeneratorExit):
            raise
        except Exception as error:  # of seven readers, which have no common class
            reason = first_line(error.__cause__ or error)
            raise UserError(f"data: {path}: not readable: {reason}") from None

    def _json(self, path: Path) -> Iterator[Row]:
        used = {*self.source.columns.values(), *COLUMNS}
        for line, record, text in read_json(path):
            if not self.columns.keys() >= record.keys():
                self.columns.update(dict.fromkeys(record))
            where = f"data: {path}, line {line}" if line else f"data: {path}"
            refuse_double_fields(text, record, [key for key in record if key in used], where)
            yield line, record, text

    def _csv(self, path: Path) -> Iterator[Row]:
        csv.field_size_limit(sys.maxsize)
        with opened(path) as lines:
            rows = csv.reader(self._csv_lines(lines, path), strict=True)
            line = 1
            try:
                header = next((row for row in rows if row), [])
                double = next((name for name in header if header.count(name) > 1), None)
                if double is not None:
                    raise UserError(f"data: {path}, line {rows.line_num}: two columns are called '{double}'")
                places = [header.index(name) for name in self.found(header)]
                line = rows.line_num + 1
                for row in rows:
                    if row and len(row) != len(header):
                        raise UserError(
                            f"data: {path}, line {line}: got {len(row)} fields, expected {len(header)} as in the header"
                        )
                    if row:
                        yield line, {header[place]: row[place] for place in places}, None
                    line = rows.line_num + 1
            except csv.Error as error:
                raise UserError(f"data: {path}, line {line}: not CSV: {error}") from None

    @staticmethod
    def _csv_lines(lines: Iterable[bytes], path: Path) -> Iterator[str]:
        for number, raw in enumerate(lines, start=1):
            text = decode(raw, path, number)
            if "\0" in text:
                raise UserError(f"data: {path}, line {number}: holds a NUL byte at column {raw.index(0) + 1}")
            text = text.removeprefix("\ufeff") if number == 1 else text
            yield from _LINES.findall(text)  # old Macs end lines with \r alone

    def _text(self, path: Path) -> Iterator[Row]:
        (name,) = self.found([self.source.column("text")])
        with opened(path) as lines:
            for number, raw in enumerate(lines, start=1):
                text = decode(raw, path, number)
                text = text.removeprefix("\ufeff") if number == 1 else text
                for line in _LINES.findall(text):  # old Macs end lines with \r alone
                    if line.strip():
                        yield number, {name: line.rstrip("\r\n")}, None

    def _parquet(self, path: Path) -> Iterator[Row]:
        import datasets
        import pyarrow
        import pyarrow.parquet

        with pyarrow.parquet.ParquetFile(path) as file:
            needed = self.found(file.schema_arrow.names)
            for batch in file.iter_batches(BATCH_ROWS, columns=needed):
                table = pyarrow.Table.from_batches([batch])
                features = datasets.Features.from_arrow_schema(table.schema)
                yield from _records(datasets.Dataset(table, datasets.DatasetInfo(features=features)))

    def _saved(self, path: Path, split: str) -> Iterator[Row]:
        import datasets

        found = datasets.load_from_disk(str(path))
        if isinstance(found, datasets.DatasetDict):
            wanted = (self.source.split or split).partition("[")[0]
            if wanted not in found:
                raise UserError(f"data: {path}: no split '{wanted}'; there are: {', '.join(found)}")
            found = found[wanted]
        yield from self.data_set(found.with_format(None))

    def data_set(self, rows: Any) -> Iterator[Row]:
        """Yield the rows of a `datasets.Dataset` or `IterableDataset`."""
        names: Iterable[str] = rows.column_names or next(iter(rows.take(1)), {}).keys()
        yield from _records(rows.select_columns(self.found(names)))

    def hub(self, split: str, streaming: bool) -> Iterator[Row]:
        """Yield the rows of a hub data set.

        Raises:
            UserError: the hub does not give it.
        """
        import datasets

        source = self.source
        wanted = source.split or split
        try:
            yield from self.data_set(
                datasets.load_dataset(
                    source.name, source.subset, split=wanted, revision=source.revision, streaming=streaming
                )
            )
        except (UserError, GeneratorExit):
            raise
        except Exception as error:  # the hub's, the network's and the readers' errors have no common class
            raise UserError(
                f"data: '{source.name}' is neither a file here nor a data set that the hub gave (subset "
                f"{source.subset or 'default'}, split {wanted}): {first_line(error)}"
            ) from None


def _records(rows: Any) -> Iterator[Row]:
    """Yield records without the null fields of structures: Arrow gives each row the keys of all others as nulls."""
    for batch in rows.iter(batch_size=BATCH_ROWS):
        names = list(batch)
        for values in zip(*batch.values(), strict=True):
            yield 0, dict(zip(names, map(_bare, values), strict=True)), None


def _bare(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _bare(item) for key, item in value.items() if item is not None}
    return [_bare(item) for item in value] if isinstance(value, list) else value
