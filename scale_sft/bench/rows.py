"""Results as rows of JSON: settings and figures, with machine, versions, commit and command."""

from __future__ import annotations

import json
import os
import platform
import shlex
import subprocess
import sys
import time
from collections.abc import Collection, Mapping, Sequence
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from scale_sft.errors import UserError
from scale_sft.version import __version__

_PACKAGES = ("torch", "triton", "transformers", "accelerate", "peft", "trl", "deepspeed", "bitsandbytes")
_SOURCES = ("scale_sft", "ds_configs", "launch")


class Results:
    """The rows of one invocation, appended to `<folder>/<benchmark>.jsonl` as they are measured.

    Rows of one invocation share `run`; earlier rows of the file stay.
    """

    def __init__(self, folder: Path, benchmark: str):
        self.path, self.benchmark = Path(folder) / f"{benchmark}.jsonl", benchmark
        self.run = f"{time.strftime('%Y%m%dT%H%M%S', time.gmtime())}-{os.getpid()}"
        self.path.parent.mkdir(parents=True, exist_ok=True)

    def add(self, settings: Mapping[str, Any], on: Mapping[str, Any] | None = None, **result: Any) -> dict[str, Any]:
        """Append one row: the `settings` requested and the `result` measured. Returns the row.

        Args:
            on: the machine, if another process has described it.
        """
        row = {
            "benchmark": self.benchmark,
            "run": self.run,
            "finished": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
            "command": command(),
            "commit": commit(),
            "machine": dict(on or machine()),
            "versions": versions(),
            "settings": dict(settings),
            "result": result,
        }
        line = json.dumps(row, ensure_ascii=False) + "\n"
        with self.path.open("a", encoding="utf-8") as file:  # one write: a row is complete or absent
            file.write(line)
            file.flush()
            os.fsync(file.fileno())
        return row


def read_rows(folder: Path, benchmark: str) -> list[dict[str, Any]]:
    """Read all rows of a benchmark in a folder, oldest first; a last line cut off by a crash is skipped.

    Raises:
        UserError: another line is not a row.
    """
    path = Path(folder) / f"{benchmark}.jsonl"
    rows = []
    lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
    for number, line in enumerate(lines, start=1):
        try:
            row = json.loads(line)
            rows.append({key: row[key] for key in ("benchmark", "run", "machine", "settings", "result")} | row)
        except (ValueError, KeyError, TypeError):
            if number < len(lines):
                raise UserError(f"bench: {path}, line {number} is not a row of results. Fix: remove it") from None
    return rows


Row = dict[str, Any]


def by_case(rows: Sequence[Row], apart: Collection[str]) -> list[list[Row]]:
    """Group rows of the same case on the same machine, cases in the order of their first measurement.

    Args:
        apart: settings in which rows of one case may differ.
    """
    cases: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        alike = {name: value for name, value in row["settings"].items() if name not in apart}
        cases.setdefault((machine_name(row["machine"]), json.dumps(alike, sort_keys=True)), []).append(row)
    return list(cases.values())


def last_run(rows: Sequence[Row]) -> list[Row]:
    """Select the rows of the newest invocation."""
    return [row for row in rows if row["run"] == rows[-1]["run"]]


def newest(rows: Sequence[Row]) -> list[Row]:
    """Select the last of rows with the same settings, in the order of their first appearance."""
    return list({json.dumps(row["settings"], sort_keys=True): row for row in rows}.values())


def command() -> str:
    """Return the command line of this process, as a user would type it."""
    program = Path(sys.argv[0]).name
    return shlex.join(["scale-sft" if program in ("__main__.py", "cli.py", "-c") else program, *sys.argv[1:]])


@cache
def commit() -> str:
    """Return the commit of a source checkout (with `+` if files have changed since), or the installed version."""
    return commit_of(Path(__file__).resolve().parents[2])


def commit_of(checkout: Path) -> str:
    """Return the commit like `commit`; rows added to the results in the source do not count as a change."""
    if not (checkout / ".git").exists():
        return f"version {__version__}"
    run = lambda *words: subprocess.run(
        ["git", "-C", str(checkout), *words], capture_output=True, text=True, timeout=20, check=True
    ).stdout.strip()
    try:
        changed = run("status", "--porcelain", "--untracked-files=no", "--", *_SOURCES)
        return run("rev-parse", "--short=10", "HEAD") + ("+" if changed else "")
    except (OSError, subprocess.SubprocessError):
        return f"version {__version__}"


@cache
def machine() -> dict[str, Any]:
    """Describe the machine: processor, cores this process may use, memory, GPUs, but not the host's name."""
    import psutil
    import torch

    found: dict[str, Any] = {
        "processor": _processor(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "threads": torch.get_num_threads(),
        "memory_gib": round(psutil.virtual_memory().total / 2**30, 1),
    }
    if torch.cuda.is_available():
        found["gpus"] = [torch.cuda.get_device_name(n) for n in range(torch.cuda.device_count())]
    return found


def machine_name(found: Mapping[str, Any]) -> str:
    """Format `machine` in one line."""
    if found.get("gpus"):
        return f"{len(found['gpus'])} x {found['gpus'][0]}"
    return f"{found['processor']}, {found['threads']} of {found['cores']} cores"


def _processor() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.lower().startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


@cache
def versions() -> dict[str, str]:
    """Return the installed versions of the libraries involved."""
    found = {"scale_sft": __version__, "python": platform.python_version()}
    for package in _PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found
