"""Answer a misspelt name with the nearest known one."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


def unknown(what: str, name: str, known: Iterable[str]) -> str:
    """Say 'unknown WHAT; did you mean ...?' with the nearest of the known names, or list them all."""
    known = list(known)
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    return f"unknown {what}" + (f"; did you mean '{near[0]}'?" if near else f"; known: {', '.join(known)}")
