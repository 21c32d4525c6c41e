"""What each method means: the options that belong to its name, and hold where they are not given."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

STATIC = {"score": "balanced", "draw": "sample", "temperature": 0.5, "selection_batches": 20, "selection_pool": 8}
"""The best fixed entries that were measured (docs/selection.md): drawn by the root of a balanced score."""

COMBINATIONS: Mapping[str, Mapping[str, Any]] = {
    "random": {},
    "static": STATIC,
    "columns": {},
    "ag": {},
    "ma": {},
}
"""Options by method. What is missing here has the default of its field."""
SEEDED = ("random", "columns")
"""Methods whose entries come from the seed, or from selection_batches: no candidates, ever."""
KEEPING = ("static", *SEEDED)
"""Methods that choose their entries once, and then keep them; the others move them."""

_OF_THE_FIRST_CHOICE = frozenset(STATIC)


def usual_rate(method: str, draw: str) -> float:
    """Return the peak learning rate of a method, for a budget equivalent to rank 8 in 32 blocks.

    Entries that grow where gradients are largest crowd into few rows and columns, and bear a tenth of the rate. SM3
    divides by a sum over all steps, not by a mean. Both come near the paper's rates for 7B (Table 4).
    """
    if method == "ma":
        return 2e-3
    return 5e-4 if method == "ag" and draw == "top" else 5e-3


def with_method(values: Mapping[str, Any], default: str) -> dict[str, Any]:
    """Complete the options that are given by those of their method.

    A run that starts from an adapter has its entries already, so that those of the first choice stay out.

    Args:
        values: option name -> value as given.
        default: the method where none is given.
    """
    own = dict(COMBINATIONS.get(str(values.get("method", default)), {}))
    if _needs_all_entries(values):
        own.pop("selection_pool", None)
    if _is_given(values, "start_from"):
        own = {name: value for name, value in own.items() if name not in _OF_THE_FIRST_CHOICE}
    return {**own, **values}


def _needs_all_entries(values: Mapping[str, Any]) -> bool:
    """Tell whether options that are given leave no use for a pool: tiles, quotas, or no choice before the start."""
    return (
        str(values.get("granularity", "entry")) not in ("auto", "entry")
        or any(_is_given(values, name) for name in ("row_quota", "column_quota"))
        or str(values.get("selection_batches")) == "0"
    )


def _is_given(values: Mapping[str, Any], name: str) -> bool:
    """Tell whether an option whose default is none has another value, as written in a command or a file."""
    return str(values.get(name)).lower() not in ("none", "null")
