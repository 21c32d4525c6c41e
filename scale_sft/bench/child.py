"""Run a measurement in its own process, which holds nothing else in memory and may die."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from scale_sft.errors import UserError


def ask(module: str, request: dict[str, Any], *, what: str, timeout_seconds: float) -> dict[str, Any]:
    """Run `python -m scale_sft.bench.<module> REQUEST`, and return its answer: its last line, JSON.

    Raises:
        UserError: it died, or did not answer in time; `what` names the measurement.
    """
    root = str(Path(__file__).resolve().parents[2])
    paths = os.pathsep.join(filter(None, (root, os.environ.get("PYTHONPATH"))))
    words = [sys.executable, "-m", f"{__package__}.{module}", json.dumps(request)]
    try:
        done = subprocess.run(
            words,
            env=os.environ | {"PYTHONPATH": paths, "PYTHONWARNINGS": "ignore"},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=timeout_seconds,
            check=False,
        )
    except subprocess.TimeoutExpired:
        raise UserError(f"{what}: no answer within {timeout_seconds:.0f} seconds. Fix: try a smaller case") from None
    if done.returncode or not done.stdout.strip():
        if done.returncode == -9:
            raise UserError(f"{what}: killed by the system, most likely out of memory. Fix: try a smaller case")
        lines = done.stderr.strip().splitlines() or ["it printed nothing"]
        raise UserError(f"{what}: ended with status {done.returncode}: {lines[-1]}")
    return json.loads(done.stdout.strip().splitlines()[-1])
