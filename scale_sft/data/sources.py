"""Where examples come from: files, folders and hub data sets, opened with `datasets`; errors name the file and line.

A source is written NAME or NAME?key=value&key=value:

    data/train.jsonl                                         a file: .json, .jsonl, .csv, .parquet, .txt
    data/                                                    all such files of a folder, in the order of their names
    openai/gsm8k?subset=main&split=train[:1000]              a hub data set
    allenai/tulu-v2-sft-mixture?keep=dataset:flan_v2         only the rows whose column `dataset` is flan_v2
    more.csv?format=prompt_completion&prompt=question&completion=reply&weight=0.5

`weight` is how often a source is used per epoch: 0.5 a fixed random half of it, 2 every example twice.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from scale_sft.config.options import DEMO
from scale_sft.config.spelling import unknown
from scale_sft.errors import UserError, first_line
from scale_sft.files import ASSETS
from scale_sft.spiel.seeding import seeded_generator

from .jsonl import refuse_unreadable_json

BUILDERS = {".json": "json", ".jsonl": "json", ".csv": "csv", ".parquet": "parquet", ".txt": "text"}
FORMATS = ("messages", "prompt_completion", "alpaca", "text")
COLUMNS = ("messages", "prompt", "completion", "instruction", "input", "output", "text")
_KEYS = ("subset", "split", "revision", "weight", "format", "keep", *COLUMNS)


@dataclass(frozen=True)
class Source:
    """One source as it was written."""

    name: str
    subset: str | None = None
    split: str | None = None
    revision: str | None = None
    weight: float = 1.0
    format: str | None = None
    keep: tuple[str, str] | None = None  # (column, value)
    columns: dict[str, str] = field(default_factory=dict)  # our name -> the name in the data

    @property
    def path(self) -> Path | None:
        """Its file or folder; None for a hub data set."""
        path = Path(self.name)
        hub = re.fullmatch(r"[\w.-]+/[\w.-]+", self.name) and path.suffix not in BUILDERS
        return None if hub and not path.exists() else path

    def identity(self) -> list[Any]:
        """What tells it from others: of files their paths, sizes and times; of hub data name and revision."""
        own = [
            self.subset,
            self.split,
            self.revision,
            self.weight,
            self.format,
            self.keep,
            sorted(self.columns.items()),
        ]
        if self.path is None:
            return [self.name, *own]
        return [
            [[str(file.resolve()), (stat := file.stat()).st_size, stat.st_mtime_ns] for file in files_of(self)],
            *own,
        ]


@dataclass
class Part:
    """Some rows of one source: a `datasets.Dataset`, and where each of them stands in its file."""

    rows: Any
    origin: str
    numbers: Sequence[int]  # of each row: its place among the rows of `origin`, from 0
    source: Source

    def select(self, places: Sequence[int]) -> Part:
        """The rows at `places` (each in [0, rows))."""
        return Part(self.rows.select(places), self.origin, [self.numbers[place] for place in places], self.source)

    def where(self, row: int) -> str:
        """'FILE, line N' of a row; 'NAME, example N' where there are no lines."""
        number = int(self.numbers[row])
        line = _line_of(Path(self.origin), number) if self.origin.endswith((".jsonl", ".json")) else None
        return f"{self.origin}, line {line}" if line else f"{self.origin}, example {number + 1}"


def parse_sources(written: str | Sequence[str], split: str) -> list[Source]:
    """The sources of an option value; `split` ('train' or 'eval') says which of the shipped data 'demo' means.

    Raises:
        UserError: an unknown key, a value that does not fit it, or a file that does not exist.
    """
    sources = [_parse(text.strip(), split) for text in ([written] if isinstance(written, str) else written)]
    for source in sources:
        if source.path is not None:
            files_of(source)
    return sources


def _parse(text: str, split: str) -> Source:
    name, _, query = text.partition("?")
    name = str(ASSETS / "demo" / f"{split}.jsonl") if name == DEMO else name
    values: dict[str, Any] = {"columns": {}}
    for item in filter(None, query.split("&")):
        key, given, value = item.partition("=")
        if key not in _KEYS:
            raise UserError(f"data: source '{text}': {unknown(f'key {key!r}', key, _KEYS)}")
        if not given or not value:
            raise UserError(f"data: source '{text}': expected {key}=VALUE, got '{item}'")
        if key == "weight":
            try:
                values[key] = float(value)
            except ValueError:
                values[key] = math.nan
            if not 0 < values[key] < math.inf:
                raise UserError(f"data: source '{text}': weight is '{value}', expected a number above 0")
        elif key == "format" and value not in FORMATS:
            raise UserError(f"data: source '{text}': {unknown(f'format {value!r}', value, FORMATS)}")
        elif key == "keep":
            column, colon, wanted = value.partition(":")
            if not colon:
                raise UserError(f"data: source '{text}': keep is '{value}', expected COLUMN:VALUE")
            values[key] = (column, wanted)
        elif key in COLUMNS:
            values["columns"][key] = value
        else:
            values[key] = value
    return Source(name, **values)


def files_of(source: Source) -> list[Path]:
    """The files of a local source. Raises UserError: there are none."""
    path = source.path
    expected = f"expected {', '.join(BUILDERS)}"
    if path.is_dir():
        files = sorted(file for file in path.iterdir() if file.suffix in BUILDERS and file.is_file())
        if not files:
            raise UserError(f"data: folder {path} holds no data files; {expected}")
        return files
    if not path.exists():
        raise UserError(f"data: no such file: {path}")
    if path.suffix not in BUILDERS:
        raise UserError(f"data: {path}: {expected}, a folder of them, or the id of a hub data set")
    if not path.stat().st_size:
        raise UserError(f"data: {path} is empty; expected one example per line")
    return [path]


def open_sources(sources: Sequence[Source], split: str, limit: int | None, streaming: bool) -> list[Part]:
    """All rows that a run uses, weights applied; of several sources a limit takes from each by its share.

    Args:
        limit: how many rows to use; None for all.
        streaming: read only the first `limit` rows, whatever the size of the data (needs a limit).

    Raises:
        UserError: what is missing, empty or unreadable, with file and line where there is one.
    """
    if streaming and limit is None:
        raise UserError("streaming: reads only the first examples of large data; say how many: max_train_examples")
    opened = [_open(source, split, limit if streaming else None) for source in sources]
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
    return np.concatenate([*(np.arange(size) for _ in range(int(whole))), extra]).astype(np.int64)


def _shares(limit: int, sizes: Sequence[float]) -> list[int]:
    """`limit` cut in proportion to `sizes`; what rounding leaves goes to the largest remainders, in order."""
    exact = [limit * size / sum(sizes) for size in sizes]
    shares = [math.floor(part) for part in exact]
    for n in sorted(range(len(sizes)), key=lambda n: shares[n] - exact[n])[: limit - sum(shares)]:
        shares[n] += 1
    return shares


def _open(source: Source, split: str, first_rows: int | None) -> list[Part]:
    if source.path is None:
        rows = _hub(source, split, first_rows)
        parts = [Part(rows, source.name, range(len(rows)), source)]
    else:
        parts = []
        for file in files_of(source):
            rows = _file(file, first_rows)
            parts.append(Part(rows, str(file), range(len(rows)), source))
        parts = _slice(parts, source) if source.split else parts
    if source.keep:
        parts = [part.select(_matching(part, *source.keep)) for part in parts]
    if not sum(len(part.rows) for part in parts):
        raise UserError(f"data: {source.name} holds no examples" + (f" with {source.keep}" if source.keep else ""))
    return parts


def _matching(part: Part, column: str, value: str) -> np.ndarray:
    if column not in part.rows.column_names:
        raise UserError(f"data: {part.origin}: {unknown(f'column {column!r}', column, part.rows.column_names)}")
    return np.flatnonzero([str(item) == value for item in part.rows[column]])


def _slice(parts: list[Part], source: Source) -> list[Part]:
    """The rows that a split like 'train[:1000]' or 'train[50%:]' names, counted over all files."""
    import datasets

    total = sum(len(part.rows) for part in parts)
    try:
        pieces = datasets.ReadInstruction.from_spec(source.split).to_absolute({source.split.partition("[")[0]: total})
    except (ValueError, AssertionError) as error:
        raise UserError(f"data: {source.name}: split '{source.split}' is not understood: {first_line(error)}") from None
    low, high = pieces[0].from_ or 0, total if pieces[0].to is None else pieces[0].to
    chosen, first = [], 0
    for part in parts:
        start, stop = max(low - first, 0), min(high - first, len(part.rows))
        chosen.append(part.select(range(start, stop) if start < stop else range(0)))
        first += len(part.rows)
    return chosen


def _hub(source: Source, split: str, first_rows: int | None) -> Any:
    import datasets

    wanted = source.split or ("train" if split == "train" else "test")
    try:
        rows = datasets.load_dataset(
            source.name, source.subset, split=wanted, revision=source.revision, streaming=first_rows is not None
        )
    except Exception as error:  # the hub's, the network's and the readers' errors have no common class
        raise UserError(
            f"data: '{source.name}' is neither a file here nor a data set that the hub gave (subset "
            f"{source.subset or 'default'}, split {wanted}): {first_line(error)}"
        ) from None
    return rows if first_rows is None else _taken(rows, first_rows)


def _file(path: Path, first_rows: int | None) -> Any:
    """The rows of a file as a `datasets.Dataset`."""
    import datasets

    if not path.stat().st_size:
        raise UserError(f"data: {path} is empty; expected one example per line")
    if BUILDERS[path.suffix] == "json" and first_rows is None:
        refuse_unreadable_json(path)
    verbosity = datasets.logging.get_verbosity()
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)  # what is wrong is said below, once
    try:
        builder = BUILDERS[path.suffix]
        rows = datasets.load_dataset(builder, data_files=str(path), split="train", streaming=first_rows is not None)
        rows = rows if first_rows is None else _taken(rows, first_rows)
    except Exception as error:  # datasets wraps whatever its reader met; say which line it was
        broken = _broken_line(path) if BUILDERS[path.suffix] == "json" else None
        raise UserError(broken or f"data: {path}: not readable: {first_line(error.__cause__ or error)}") from None
    finally:
        datasets.logging.set_verbosity(verbosity)
    if not len(rows):
        raise UserError(f"data: {path} holds no examples")
    return rows


def _taken(stream: Any, count: int) -> Any:
    import datasets

    return datasets.Dataset.from_list(list(stream.take(count)))


def _broken_line(path: Path) -> str | None:
    """Which line of a JSON Lines file is not a JSON object, and why."""
    objects = 0
    fields: dict[str, str] = {}
    with path.open("rb") as lines:
        for number, raw in enumerate(lines, start=1):
            where = f"data: {path}, line {number}"
            if b"\0" in raw:
                return f"{where}: holds a NUL byte at column {raw.index(0) + 1}; the file is damaged: write it anew"
            try:
                line = raw.decode("utf-8-sig" if number == 1 else "utf-8")
                row = json.loads(line) if line.strip() else {}
            except UnicodeDecodeError as error:
                return f"{where}: not UTF-8: {error.reason} at byte {error.start + 1}"
            except json.JSONDecodeError as error:
                return f"{where}: not JSON: {error.msg} at column {error.colno}"
            if not isinstance(row, dict):
                return f"{where}: expected a JSON object, got {type(row).__name__}"
            for key, value in row.items():
                kind = type(value).__name__
                if value is not None and fields.setdefault(key, kind) != kind:
                    return f"{where}: field '{key}' is {kind}, earlier {fields[key]}"
            objects += bool(row)
    return None if objects else f"data: {path} holds no examples"


def _line_of(path: Path, number: int) -> int | None:
    """The line of the row `number` (from 0) of a JSON Lines file; None where the file is one JSON value."""
    with path.open("rb") as lines:
        found = -1
        for line, raw in enumerate(lines, start=1):
            if not raw.strip():
                continue
            if found < 0 and not raw.lstrip(b"\xef\xbb\xbf").lstrip().startswith(b"{"):
                return None
            found += 1
            if found == number:
                return line
    return None
