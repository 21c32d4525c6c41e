"""How options name layers: by a path, by the end of one, or by a regular expression."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping
from typing import Protocol

from scale_sft.errors import UserError


class Named(Protocol):
    """A layer that options can name."""

    @property
    def names(self) -> tuple[str, ...]: ...

    @property
    def kind(self) -> str: ...


def paths_named(layers: Mapping[str, Named], wanted: tuple[str, ...] | str, option: str) -> list[str]:
    """List the paths that `wanted` matches, in the model's order.

    The work grows with the number of layers, and not with that of names: there may be thousands of both.

    Args:
        layers: by path.
        wanted: names, or one name or regular expression.
        option: what errors name.

    Raises:
        UserError: a name matches nothing, or is not a regular expression.
    """
    meant: dict[str, list[str]] = {}  # paths by full name
    for path, layer in layers.items():
        for name in layer.names:
            meant.setdefault(name, []).append(path)
    matches: dict[str, list[str]] = {name: [] for name in ((wanted,) if isinstance(wanted, str) else wanted)}
    depths = {name.count(".") for name in matches}
    for name, paths in meant.items():
        for ending in (_ending(name, dots) for dots in depths):
            if ending in matches:
                matches[ending] += paths
    if isinstance(wanted, str) and not matches[wanted]:
        try:
            pattern = re.compile(wanted)
        except re.error as error:
            raise UserError(f"{option}: '{wanted}' is not a regular expression: {error}") from None
        matches[wanted] = [path for name, paths in meant.items() if pattern.fullmatch(name) for path in paths]
    missing = next((name for name, paths in matches.items() if not paths), None)
    if missing is not None:
        raise UserError(f"{option}: '{missing}' matches no layer; this model has {listing(layers)}")
    chosen = set().union(*matches.values())
    return [path for path in layers if path in chosen]


def _ending(name: str, dots: int) -> str:
    """Return the last parts of a name with so many dots between them; all of it if it has fewer."""
    first, *rest = name.rsplit(".", dots + 1)
    return name[len(first) + 1 :] if len(rest) > dots else name


def listing(layers: Mapping[str, Named]) -> str:
    """List the kinds of layers: 'q_proj (8x), ...'."""
    counts = Counter(layer.kind for layer in layers.values())
    return ", ".join(f"{kind} ({count}x)" for kind, count in counts.items()) or "none"
