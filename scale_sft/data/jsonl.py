"""JSON that crashes the process in its reader (pyarrow), or that the reader takes and cannot give back."""

from __future__ import annotations

import re
from pathlib import Path

from scale_sft.errors import UserError

DEEPEST = 200
_TOKENS = re.compile(rb'"(?:[^"\\]|\\.)*"|[\[{]|[\]}]', re.DOTALL)


def refuse_unreadable_json(path: Path) -> None:
    """Only lines with very many brackets are read closely, so files of examples cost one look at each line.

    Raises:
        UserError: a line is not UTF-8 or nested too deeply to be data, or the first value is null; names the line.
    """
    depth, blank = 0, True
    with path.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            if blank and line.lstrip(b"\xef\xbb\xbf \t\r").startswith(b"null"):
                raise UserError(f"data: {path}, line {number}: expected a JSON object, got null")
            blank = blank and not line.strip()
            try:
                line.decode("utf-8")
            except UnicodeDecodeError as error:
                raise UserError(
                    f"data: {path}, line {number}: not UTF-8: {error.reason} at byte {error.start + 1}"
                ) from None
            opened = line.count(b"[") + line.count(b"{")
            if opened < DEEPEST and depth < DEEPEST:
                depth = 0 if path.suffix == ".jsonl" else max(0, depth + opened - line.count(b"]") - line.count(b"}"))
                continue
            for token in _TOKENS.finditer(line):
                first = token[0][:1]
                depth += (first in b"[{") - (first in b"]}")
                if depth > DEEPEST:
                    raise UserError(
                        f"data: {path}, line {number}: brackets nested more than {DEEPEST} deep are no data"
                    )
