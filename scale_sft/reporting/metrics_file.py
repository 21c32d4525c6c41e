"""Read and write `metrics.jsonl`: a JSON object per line, readable after any crash, no step twice."""

import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from scale_sft.files import write_text

METRICS_FILE = "metrics.jsonl"
PREVIOUS_FILE = "metrics.previous.jsonl"


def read_metrics(path: Path) -> list[dict]:
    """Read all records of a `metrics.jsonl`, without the torn last line that a killed process leaves.

    Raises:
        ValueError: another line is not a JSON object.
    """
    lines = [(number, line) for number, line in enumerate(path.read_bytes().split(b"\n"), 1) if line.strip(b"\0 \r\t")]
    records = []
    for number, line in lines:
        try:
            record, reason = json.loads(line), "not an object"
        except ValueError as error:  # also JSONDecodeError and UnicodeDecodeError
            record, reason = None, str(error)
        if isinstance(record, dict):
            records.append(record)
        elif number != lines[-1][0]:
            raise ValueError(
                f"{path}, line {number}: expected one JSON object per line, got {line[:60]!r} ({reason}). "
                "Only the last line of a killed run may be incomplete: remove or repair this line."
            )
    return records


def discard_after(path: Path, first_step: int) -> None:
    """Remove the records of steps after `first_step`, and a torn last line; for a new run, set the file aside."""
    if not path.exists():
        return
    if first_step == 0:
        os.replace(path, path.with_name(PREVIOUS_FILE))
        return
    kept = [record for record in read_metrics(path) if record["step"] <= first_step and record["event"] != "end"]
    write_text(path, "".join(json.dumps(r, ensure_ascii=False) + "\n" for r in kept))


def jsonable(value: Any) -> Any:
    """Convert to plain JSON types: NaN and infinities become null, tensor and numpy scalars become numbers."""
    if value is None or isinstance(value, bool | str):
        return value
    if isinstance(value, int):
        return int(value)
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(key): jsonable(item) for key, item in value.items()}
    if hasattr(value, "tolist"):  # a tensor or a numpy array or scalar
        return jsonable(value.tolist())
    if isinstance(value, list | tuple):
        return [jsonable(item) for item in value]
    return str(value)
