"""Rows of JSON files: one object per line, one array of objects, or objects written over several lines.

Every line is parsed by itself: no schema is guessed, so no row takes a key or a type from another.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from scale_sft.errors import UserError

from .folders import opened

Row = tuple[int, dict[str, Any], str]
"""Line (from 1; 0 where rows are not lines), the parsed object, and its text as the file writes it."""
_BOM = b"\xef\xbb\xbf"


def read_json(path: Path) -> Iterator[Row]:
    """Yield the rows of a file.

    Raises:
        UserError: a line is not UTF-8, not JSON or not an object; names it.
    """
    with opened(path) as lines:
        started = False
        for number, raw in enumerate(lines, start=1):
            raw = raw.removeprefix(_BOM) if number == 1 else raw
            if not raw.strip():
                continue
            if not started and (raw.lstrip().startswith(b"[") or raw.rstrip()[-1:] in b"{,"):
                yield from _values(path, decode(raw + lines.read(), path, number), number)
                return
            started = True
            text = decode(raw, path, number).strip()
            try:
                record = json.loads(text)
            except (ValueError, RecursionError) as error:
                raise _broken(path, number, raw, error) from None
            if not isinstance(record, dict):
                raise _no_object(f"data: {path}, line {number}", record)
            yield number, record, text


def _values(path: Path, text: str, first: int) -> Iterator[Row]:
    """Yield the objects of one array, or objects one after the other; the text begins at line `first` of the file."""
    decoder = json.JSONDecoder()
    array = text.lstrip().startswith("[")
    place, number = _after_space(text, _after_space(text, 0) + array), 0
    try:
        while place < len(text) and not (array and text[place] == "]"):
            if array and number:
                if text[place] != ",":
                    raise json.JSONDecodeError("Expecting ',' delimiter", text, place)
                place = _after_space(text, place + 1)
            begin = place
            record, place = decoder.raw_decode(text, place)
            number += 1
            if not isinstance(record, dict):
                raise _no_object(f"data: {path}, example {number}", record)
            yield 0, record, text[begin:place]
            place = _after_space(text, place)
        if array and place >= len(text):
            raise json.JSONDecodeError("Expecting ']'", text, place)
        if array and text[place + 1 :].strip():
            raise json.JSONDecodeError("Extra data", text, place + 1)
    except json.JSONDecodeError as error:
        line = first + error.lineno - 1
        raw = text.splitlines()[error.lineno - 1 : error.lineno] or [""]
        raise _broken(path, line, raw[0].encode("utf-8", "surrogatepass"), error) from None
    except RecursionError as error:
        raise _broken(path, first, b"", error) from None


def _after_space(text: str, place: int) -> int:
    while place < len(text) and text[place] in " \t\r\n":
        place += 1
    return place


def decode(raw: bytes, path: Path, number: int) -> str:
    """Decode a line, or several that begin at line `number`.

    Raises:
        UserError: it is not UTF-8; names the line.
    """
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError as error:
        before = raw[: error.start]
        line, column = number + before.count(b"\n"), error.start - (before.rfind(b"\n") + 1) + 1
        if number == 1 and raw[:2] in (b"\xff\xfe", b"\xfe\xff"):
            raise UserError(f"data: {path} is UTF-16; save it as UTF-8") from None
        raise UserError(f"data: {path}, line {line}: not UTF-8: {error.reason} at byte {column}") from None


def refuse_double_fields(text: str, record: dict[str, Any], used: list[str], where: str) -> None:
    """Raises UserError if an object writes one of the used fields twice, of which JSON readers keep the last."""
    suspects = [key for key in used if key in record and text.count(f'"{key}"') > 1]
    if suspects:
        pairs = json.loads(text, object_pairs_hook=list)
        written = [key for key, _ in pairs]
        double = next((key for key in suspects if written.count(key) > 1), None)
        if double:
            raise UserError(f"{where}: field '{double}' is written twice")


def _broken(path: Path, number: int, raw: bytes, error: Exception) -> UserError:
    where = f"data: {path}, line {number}"
    if b"\0" in raw:
        column = raw.index(b"\0") + 1
        return UserError(f"{where}: holds a NUL byte at column {column}; the file is damaged: write it again")
    if isinstance(error, RecursionError):
        return UserError(f"{where}: brackets nested too deeply to be data")
    if isinstance(error, json.JSONDecodeError):
        return UserError(f"{where}: not JSON: {error.msg} at column {error.colno}")
    return UserError(f"{where}: not JSON: {str(error).splitlines()[0]:.100}")


def _no_object(where: str, record: Any) -> UserError:
    got = "null" if record is None else type(record).__name__
    return UserError(f"{where}: expected a JSON object, got {got}")
