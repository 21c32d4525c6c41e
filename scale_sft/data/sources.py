"""The sources of examples, as written in options: NAME or NAME?key=value&key=value.

    data/train.jsonl                                         a file; see `folders` for the endings that are read
    data/                                                    all such files of a folder and its sub-folders
    openai/gsm8k?subset=main&split=train[:1000]              a hub data set
    allenai/tulu-v2-sft-mixture?keep=dataset:flan_v2         only the rows whose column `dataset` is flan_v2
    more.csv?format=prompt_completion&prompt=question&completion=reply&weight=0.5

`weight` is how often a source is used per epoch: 0.5 a fixed random half of it, 2 every example twice.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from scale_sft.config.options import DEMO, DEMO_CHAT, DEMO_PREFERENCES
from scale_sft.config.spelling import unknown
from scale_sft.errors import UserError
from scale_sft.files import ASSETS

from .folders import Finding, find_files, is_data_file

_OF_PROMPTS = ("system", "tools", "history", "chat_template_kwargs")
FORMATS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "messages": (("messages",), ("system", "tools", "chat_template_kwargs")),
    "prompt_completion": (("prompt", "completion"), ("system", "tools", "chat_template_kwargs")),
    "alpaca": (("instruction", "output"), ("input", *_OF_PROMPTS)),
    "text": (("text",), ()),
}
"""The columns that each format must have, and those that it may have."""
_PAIR = (("chosen", "rejected"), ("prompt", "system", "tools", "chat_template_kwargs"))
FORMATS_OF: dict[str, dict[str, tuple[tuple[str, ...], tuple[str, ...]]]] = {
    "sft": FORMATS,
    "pairs": {"preference": _PAIR},
    "marked": {
        "marked": (("prompt", "completion", "label"), ("system", "tools", "chat_template_kwargs")),
        "preference": _PAIR,
    },
}
"""Formats by the kind of example that the objective learns from: answers, pairs of answers, or answers with a mark."""
ALIASES = {
    "prompt": ("question", "instruction", "query"),
    "chosen": ("chosen_response", "preferred"),
    "rejected": ("rejected_response", "dispreferred", "non_preferred"),
    "completion": ("response", "output", "answer"),
    "label": ("labels", "desirable"),
}
"""Usual names of columns in preference data, used where our own is missing."""
COLUMNS = ("messages", "prompt", "completion", "instruction", "input", "output", "text", "chosen", "rejected", "label",
           *_OF_PROMPTS)  # fmt: skip
OF_OTHER_TOOLS = (
    *_OF_PROMPTS,
    "functions",
    "system_prompt",
    "documents",
    "images",
    "videos",
    "audio",
    "weight",
    "train",
)
"""Columns that change the prompt or the loss elsewhere: where they are not used, that is said once."""
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
    kind: str = "sft"  # of examples: a key of FORMATS_OF

    @property
    def path(self) -> Path | None:
        """Its file or folder; None for a hub data set."""
        path = Path(self.name).expanduser()
        hub = re.fullmatch(r"[\w.-]+/[\w.-]+", self.name) and not is_data_file(path)
        return None if hub and not path.exists() else path

    def column(self, name: str) -> str:
        """Return the data's own name of one of COLUMNS."""
        return self.columns.get(name, name)

    def identity(self) -> list[Any]:
        """Return what tells it from others: of files their paths, sizes and times; of hub data name and revision."""
        columns = sorted(self.columns.items())
        own = [self.subset, self.split, self.revision, self.weight, self.format, self.keep, columns]
        if self.path is None:
            return [self.name, *own]
        stats = [(file, file.stat()) for file in find_files(self.path).identity]
        return [[[str(file.resolve()), stat.st_size, stat.st_mtime_ns] for file, stat in stats], *own]


def recognise(columns: Iterable[str], source: Source, origin: str) -> str:
    """Return the format of some rows: as the source says, or from their columns.

    Raises:
        UserError: the columns fit no format, or not the one that was asked for.
    """
    columns = list(columns)
    formats, source = FORMATS_OF[source.kind], with_aliases(source, columns)
    have = {name for name in COLUMNS if source.column(name) in columns}
    for name, (needed, _) in formats.items():
        if source.format in (None, name) and have.issuperset(needed):
            return name
    got = ", ".join(columns) or "none"
    if source.kind == "sft" and have.issuperset(("chosen", "rejected")):
        raise UserError(
            f"data: {origin}: got pairs of answers ({got}), expected examples for objective sft. Fix: --objective dpo, "
            "or name the answers like this: FILE?completion=chosen"
        )
    expected = _EXPECTED[source.kind]
    if source.format:
        expected = " and ".join(formats[source.format][0])
    example = "FILE?prompt=question&completion=answer" if source.kind == "sft" else "FILE?prompt=question&chosen=good"
    raise UserError(
        f"data: {origin}: expected the fields {expected}; got {got}. Name other columns like this: {example}"
    )


_EXPECTED = {
    "sft": "messages; prompt and completion; instruction, input and output; or text",
    "pairs": "chosen and rejected, with or without prompt (pairs of answers, which objectives dpo, ipo and orpo need)",
    "marked": "prompt, completion and label, or chosen and rejected (answers marked as good or bad, for objective kto)",
}


def with_aliases(source: Source, columns: Iterable[str]) -> Source:
    """Map the usual names of columns in preference data to ours, where ours are missing and not named otherwise."""
    if source.kind == "sft":
        return source
    columns = set(columns)
    found = {
        name: next(alias for alias in aliases if alias in columns)
        for name, aliases in ALIASES.items()
        if name not in source.columns and name not in columns and columns.intersection(aliases)
    }
    return replace(source, columns={**found, **source.columns})


def needed_columns(columns: Iterable[str], source: Source, origin: str) -> list[str]:
    """Return those of the columns that a source uses: of its format, and that of `keep`.

    Raises:
        UserError: see `recognise`; or the column to keep rows by does not exist.
    """
    columns = list(columns)
    if source.keep and source.keep[0] not in columns:
        column = source.keep[0]
        raise UserError(f"data: {origin}: {unknown(f'column {column!r}', column, columns)}")
    needed, more = FORMATS_OF[source.kind][recognise(columns, source, origin)]
    named = with_aliases(source, columns)
    used = {named.column(name) for name in (*needed, *more)} | ({source.keep[0]} if source.keep else set())
    return [column for column in columns if column in used]


def is_kept(record: Mapping[str, Any], keep: tuple[str, str]) -> bool:
    """Return True if the record's value in a column reads like that, as Python or JSON writes it."""
    value, wanted = record.get(keep[0]), keep[1]
    return str(value) == wanted or (isinstance(value, bool | None) and json.dumps(value) == wanted)


def parse_sources(written: str | Sequence[str], split: str, kind: str = "sft") -> list[Source]:
    """Read an option value; `split` ('train' or 'eval') says which of the shipped data 'demo' means.

    Args:
        kind: of examples that the objective learns from: a key of FORMATS_OF.

    Raises:
        UserError: an unknown key, a value that does not fit it, or a file that does not exist.
    """
    sources = [_parse(text.strip(), split, kind) for text in ([written] if isinstance(written, str) else written)]
    for source in sources:
        if source.path is not None:
            find_files(source.path)
    return sources


def files_of(source: Source) -> Finding:
    """Find the files of a local source.

    Raises:
        UserError: there are none.
    """
    assert source.path is not None, source
    return find_files(source.path)


def _parse(text: str, split: str, kind: str) -> Source:
    name, _, query = text.partition("?")
    if name == DEMO_CHAT:
        name = str(ASSETS / "demo" / f"chat_{split}.jsonl")
    elif name in (DEMO, DEMO_PREFERENCES):
        pairs = name == DEMO_PREFERENCES or kind != "sft"
        name = str(ASSETS / "demo" / (f"preferences_{split}.jsonl" if pairs else f"{split}.jsonl"))
    values: dict[str, Any] = {"columns": {}, "kind": kind}
    formats = tuple(FORMATS_OF[kind])
    for item in filter(None, query.split("&")):
        key, given, value = item.partition("=")
        if key not in _KEYS:
            raise UserError(f"data: source '{text}': {unknown(f'key {key!r}', key, _KEYS)}")
        if not given or not value:
            raise UserError(f"data: source '{text}': expected {key}=VALUE, got '{item}'")
        if key == "weight":
            values[key] = _weight(value, text)
        elif key == "format" and value not in formats:
            raise UserError(f"data: source '{text}': {unknown(f'format {value!r}', value, formats)}")
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


def _weight(value: str, text: str) -> float:
    try:
        weight = float(value)
    except ValueError:
        weight = math.nan
    if not 0 < weight < math.inf:
        raise UserError(f"data: source '{text}': weight is '{value}', expected a number above 0")
    return weight
