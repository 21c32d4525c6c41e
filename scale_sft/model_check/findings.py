"""What was found for each type, in a file of JSON lines that a later walk continues."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import cache
from importlib.metadata import version
from pathlib import Path

from scale_sft.errors import UserError
from scale_sft.files import PACKAGE, write_text

TRAINS, REACHED, EXPERTS, ANSWERS, RANKS = "trains", "reached", "experts reached", "answers", "ZeRO-3"
COLUMNS = (TRAINS, REACHED, EXPERTS, "gradient", "merge", "checkpointing", "packing", "4 bits", RANKS, ANSWERS)
REFUSED, FAILED = "refused", "FAILED"


@dataclass
class Findings:
    """What was found for one type: columns of the table by name."""

    model_type: str
    cells: dict[str, str] = field(default_factory=dict)
    remark: str = ""
    seconds: float = 0.0
    code: str = ""  # see `code_version`

    @property
    def failures(self) -> list[str]:
        """Columns in which something went wrong that is not a clear refusal."""
        return [name for name, cell in self.cells.items() if cell.startswith(FAILED)]

    @property
    def trains(self) -> bool:
        """True if the type was trained."""
        return not self.cells.get(TRAINS, FAILED).startswith((FAILED, REFUSED))

    @property
    def clean(self) -> bool:
        """True if the type trains and nothing failed in any column."""
        return self.trains and not self.failures

    def refuse(self, name: str, error: UserError) -> None:
        """Note a refusal: a clear error is a result."""
        self.cells[name] = REFUSED
        text = str(error)
        self.remark += f"{text} " if text.startswith(name) else f"{name}: {text} "


@cache
def code_version() -> str:
    """Return a digest of this package's code and of the versions of transformers and torch: 12 hexadecimal digits."""
    digest = hashlib.sha256(f"{version('transformers')} {version('torch')}".encode())
    for path in sorted(file for kind in ("py", "c", "h") for file in PACKAGE.rglob(f"*.{kind}")):
        digest.update(path.relative_to(PACKAGE).as_posix().encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()[:12]


def read(file: Path) -> dict[str, Findings]:
    """Read findings by type; none where there is no file.

    Raises:
        UserError: the file holds something else.
    """
    if not file.is_file():
        return {}
    try:
        rows = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
        return {row["model_type"]: Findings(**row) for row in rows}
    except (ValueError, TypeError, KeyError) as error:
        raise UserError(f"write: {file} does not hold findings: {error!r}. Fix: remove it") from None


def write(file: Path, findings: Iterable[Findings]) -> None:
    """Write findings in the order of their types."""
    rows = sorted(findings, key=lambda one: one.model_type)
    write_text(file, "".join(json.dumps(dataclasses.asdict(one)) + "\n" for one in rows))
