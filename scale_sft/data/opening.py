"""The rows that a run uses: read from every source into one Arrow file each, sliced, weighted and limited.

A row is kept as the JSON text of its object, so that no schema mixes rows; the `Encoder` parses it.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from scale_sft.errors import UserError, first_line
from scale_sft.spiel.seeding import seeded_generator

from .notes import Notes
from .sources import Source, files_of, is_kept
from .tables import Reading, Row

FLUSH_ROWS = 10_000
FLUSH_CHARACTERS = 1 << 25


@dataclass
class Part:
    """Some rows of one source."""

    rows: Any
    """A `datasets.Dataset` of `row` (JSON text of an object) and `line` (from 1; minus the number of the example, from
    1, where rows are not lines)."""
    origin: str
    source: Source
    columns: tuple[str, ...]

    def select(self, places: Iterable[int]) -> Part:
        """Return the rows at `places` (each in [0, rows))."""
        return Part(self.rows.select(places), self.origin, self.source, self.columns)

    def where(self, row: int) -> str:
        """Name the place of a row: 'FILE, line N'; 'NAME, example N' in formats without lines."""
        line = int(self.rows[int(row)]["line"])
        return f"{self.origin}, line {line}" if line > 0 else f"{self.origin}, example {-line}"


def open_sources(
    sources: Sequence[Source],
    split: str,
    limit: int | None,
    streaming: bool,
    *,
    scratch: Path,
    notes: Notes | None = None,
) -> list[Part]:
    """Read all rows that a run uses, weights applied; of several sources a limit takes from each by its share.

    Args:
        split: 'train' or 'eval'.
        limit: how many rows to use; None for all.
        streaming: read no further than the first `limit` rows of each source (needs a limit).
        scratch: folder for the rows, needed for as long as they are.
        notes: takes what a user should know.

    Raises:
        UserError: what is missing, empty or unreadable, with file and line where there is one.
    """
    if streaming and limit is None:
        raise UserError("streaming: reads only the first examples of large data; say how many: max_train_examples")
    scratch.mkdir(parents=True, exist_ok=True)
    opened = []
    for number, source in enumerate(sources):
        opened.append(_open(source, split, limit if streaming else None, scratch / f"{number:03d}", notes or Notes()))
    sizes = [sum(len(part.rows) for part in parts) for parts in opened]
    places = [_weighted(size, source) for size, source in zip(sizes, sources, strict=True)]
    if limit is not None:
        basis = [source.weight for source in sources] if streaming else [len(order) for order in places]
        places = [order[:share] for order, share in zip(places, _shares(limit, basis), strict=True)]
    chosen = []
    for parts, order in zip(opened, places, strict=True):
        first = 0
        for part in parts:
            inside = order[(order >= first) & (order < first + len(part.rows))] - first
            if len(inside):
                chosen.append(part if _all_of(inside, part) else part.select(inside))
            first += len(part.rows)
    return chosen


def _all_of(places: np.ndarray, part: Part) -> bool:
    return len(places) == len(part.rows) and bool((np.diff(places) == 1).all())


def _weighted(size: int, source: Source) -> np.ndarray:
    """Places of a source of `size` rows in one epoch. The random part depends on nothing but the source's name."""
    whole, fraction = divmod(source.weight, 1.0)
    some = round(fraction * size)
    extra = torch.randperm(size, generator=seeded_generator(0, "mixture", source.name))[:some].sort().values.numpy()
    places = np.concatenate([*(np.arange(size) for _ in range(int(whole))), extra]).astype(np.int64)
    if not len(places):
        raise UserError(
            f"data: source '{source.name}': weight {source.weight:g} of its {size:,} examples leaves none; raise the "
            f"weight to {0.5 / size:.2g} or more, or leave the source out"
        )
    return places


def _shares(limit: int, sizes: Sequence[float]) -> list[int]:
    """`limit` cut in proportion to `sizes`; what rounding leaves goes to the largest remainders, in order."""
    exact = [limit * size / sum(sizes) for size in sizes]
    shares = [math.floor(part) for part in exact]
    for n in sorted(range(len(sizes)), key=lambda n: shares[n] - exact[n])[: limit - sum(shares)]:
        shares[n] += 1
    return shares


def _open(source: Source, split: str, first_rows: int | None, scratch: Path, notes: Notes) -> list[Part]:
    default = "train" if split == "train" else "test"
    sliced = source.path is not None and source.split is not None
    keep = None if sliced else source.keep
    parts: list[Part] = []
    if source.path is None:
        reading = Reading(source.name, source)
        rows = reading.hub(default, first_rows is not None)
        parts.append(_part(reading, rows, scratch.with_suffix(".arrow"), keep, first_rows))
    else:
        found = files_of(source)
        for note in found.notes:
            notes.add(note)
        left = None if sliced else first_rows  # a slice counts over all rows
        for number, file in enumerate(found.files):
            reading = Reading(str(file), source)
            path = scratch.with_name(f"{scratch.name}-{number:05d}.arrow")
            parts.append(_part(reading, reading.rows(file, default), path, keep, left))
            left = None if left is None else left - len(parts[-1].rows)
            if left == 0:
                break
    if sliced:
        parts = _slice(parts, source)
        parts = [part.select(_matching(part, source.keep)) for part in parts] if source.keep else parts
    if not sum(len(part.rows) for part in parts):
        raise UserError(f"data: {source.name} holds no examples" + (f" with {source.keep}" if source.keep else ""))
    return parts


def _part(reading: Reading, rows: Iterable[Row], path: Path, keep: tuple[str, str] | None, most: int | None) -> Part:
    """Write the rows of a file, at most `most` of them and those to keep, as a part."""
    import datasets
    import pyarrow

    schema = pyarrow.schema([("row", pyarrow.large_string()), ("line", pyarrow.int64())])
    texts: list[str] = []
    lines: list[int] = []
    kept, characters, number = 0, 0, 0
    with pyarrow.OSFile(str(path), "wb") as sink, pyarrow.ipc.new_stream(sink, schema) as stream:

        def flush() -> None:
            columns = [pyarrow.array(texts, schema.field("row").type), pyarrow.array(lines, schema.field("line").type)]
            stream.write_batch(pyarrow.record_batch(columns, schema=schema))
            texts.clear()
            lines.clear()

        for number, (line, record, text) in enumerate(rows, start=1):
            if keep is not None and not is_kept(record, keep):
                continue
            texts.append(_as_json(record, reading, number) if text is None else text)
            lines.append(line or -number)
            kept, characters = kept + 1, characters + len(texts[-1])
            if len(texts) >= FLUSH_ROWS or characters >= FLUSH_CHARACTERS:
                flush()
                characters = 0
            if kept == most:
                break
        flush()
    if not number:
        raise UserError(f"data: {reading.origin} holds no examples")
    reading.found(())  # the columns of JSON are known only now
    return Part(datasets.Dataset.from_file(str(path)), reading.origin, reading.source, tuple(reading.columns))


def _as_json(record: dict[str, Any], reading: Reading, number: int) -> str:
    try:
        return json.dumps(record, ensure_ascii=False)
    except TypeError:
        for name, value in record.items():
            try:
                json.dumps(value)
            except TypeError as error:
                kind = type(value).__name__
                told = kind if kind not in ("dict", "list") else first_line(error)
                raise UserError(
                    f"data: {reading.origin}, example {number}: field '{name}' is {told}, expected text"
                ) from None
        raise


def _matching(part: Part, keep: tuple[str, str]) -> np.ndarray:
    return np.flatnonzero([is_kept(json.loads(text), keep) for text in part.rows["row"]])


def _slice(parts: list[Part], source: Source) -> list[Part]:
    """Select the rows of a split like 'train[:1000]' or 'train[50%:]', counted over all files."""
    import datasets

    total = sum(len(part.rows) for part in parts)
    asked = source.split or ""
    try:
        pieces = datasets.ReadInstruction.from_spec(asked).to_absolute({asked.partition("[")[0]: total})
    except (ValueError, AssertionError) as error:
        raise UserError(f"data: {source.name}: split '{asked}' is not understood: {first_line(error)}") from None
    low, high = pieces[0].from_ or 0, total if pieces[0].to is None else pieces[0].to
    chosen, first = [], 0
    for part in parts:
        start, stop = max(low - first, 0), min(high - first, len(part.rows))
        chosen.append(part.select(range(start, stop) if start < stop else range(0)))
        first += len(part.rows)
    return chosen
