"""Answer a misspelt name with the nearest known one."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

FEW = 5
"""Names that an error lists as a whole."""


def unknown(what: str, name: str, known: Iterable[str]) -> str:
    """Say 'unknown WHAT; did you mean ...?' with the nearest known name; list them if they are few or none is near."""
    known = list(known)
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    if not near:
        return f"unknown {what}; known: {', '.join(known)}"
    return f"unknown {what}; did you mean '{near[0]}'?" + (f" Known: {', '.join(known)}" if len(known) <= FEW else "")
