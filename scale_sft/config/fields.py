"""The declaration of an option, and the checks of a single value."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import field
from typing import Any, Literal, TypeAlias

Check: TypeAlias = Callable[[Any], "str | None"]
"""Returns what is wrong with a value, or None."""


def option(
    default: Any,
    help: str,
    *,
    check: Check | None = None,
    choices: tuple[str, ...] = (),
    on_resume: Literal["fixed", "by_effect", "free"] = "fixed",
    path: bool = False,
) -> Any:
    """Declare a dataclass field that is an option.

    Args:
        default: its value where none is given.
        help: what it means, for `--help` and the schema.
        check: of a value that has the right type.
        choices: the only values.
        on_resume: what a resumed run may do with it. fixed: it must be as in the checkpoint; by_effect: what it leads
            to must be the same (hash of the target weights, digest of the examples, total of steps, active entries of
            each weight); free: it does not matter.
        path: a file or folder, or a list of them: `~` and environment variables are expanded.
    """
    metadata = {"help": help, "check": check, "choices": choices, "on_resume": on_resume, "path": path}
    return field(default=default, metadata=metadata)


def at_least(low: float) -> Check:
    """Check low <= value."""
    return lambda value: None if value >= low else f"must be at least {low}"


def above(low: float) -> Check:
    """Check low < value."""
    return lambda value: None if value > low else f"must be above {low}"


def between(low: float, high: float, *, open_low: bool = False) -> Check:
    """Check low <= value <= high (low < value where `open_low`)."""

    def check(value: Any) -> str | None:
        if (value > low if open_low else value >= low) and value <= high:
            return None
        return f"must be in {'(' if open_low else '['}{low}, {high}]"

    return check


def two_betas(value: Any) -> str | None:
    """Check the decay rates of two moments."""
    return None if len(value) == 2 and all(0 <= beta < 1 for beta in value) else "must be two numbers in [0, 1)"


def a_pattern(value: str) -> str | None:
    """Check a regular expression."""
    try:
        re.compile(value)
    except re.error as error:
        return f"is not a regular expression: {error}"
    return None


def a_density(value: float) -> str | None:
    """Check a fraction of the target weights."""
    if 0 < value <= 1:
        return None
    return "must be in (0, 1]: it is a fraction, 0.02 trains 2 % of the target weights"
