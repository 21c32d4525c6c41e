"""Group weights by layer and kind, by their names: `model.layers.3.mlp.up_proj.weight`."""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from .records import Run, _number

_LAYER = re.compile(r"^.*?\.(?P<layer>\d+)\.(?P<kind>.+?)(?:\.weight)?$")


@dataclass(frozen=True)
class KindOfWeight:
    """All weights of one kind in one layer (several in a mixture of experts), or of one kind over the whole model."""

    weights: int = 0
    active: int = 0
    numel: int = 0
    square_delta: float = 0.0  # sum over the deltas
    max_abs_delta: float = 0.0
    cohort_counts: tuple[int, ...] = ()

    def plus(self, other: "KindOfWeight") -> "KindOfWeight":
        length = max(len(self.cohort_counts), len(other.cohort_counts))
        counts = [list(c) + [0] * (length - len(c)) for c in (self.cohort_counts, other.cohort_counts)]
        return KindOfWeight(
            self.weights + other.weights,
            self.active + other.active,
            self.numel + other.numel,
            self.square_delta + other.square_delta,
            max(self.max_abs_delta, other.max_abs_delta),
            tuple(a + b for a, b in zip(*counts, strict=True)),
        )


def by_layer_and_kind(run: Run) -> dict[tuple[int | None, str], KindOfWeight]:
    """Group `per_weight` of the end record by (layer, kind of module).

    `model.layers.3.self_attn.q_proj.weight` is (3, `q_proj`); outside the numbered blocks the layer is None. Experts of
    a layer are added up.
    """
    split = {name: _split_name(name) for name in run.per_weight}
    short = _short_names({kind for _, kind in split.values()})
    table: dict[tuple[int | None, str], KindOfWeight] = {}
    for name, values in run.per_weight.items():
        layer, kind = split[name]
        key = (layer, short[kind])
        table[key] = table.get(key, KindOfWeight()).plus(_one(values))
    return table


def by_parameter(run: Run) -> dict[str, KindOfWeight]:
    """List every weight of the end record; experts that share a parameter are added up, as they may be thousands."""
    table: dict[str, KindOfWeight] = {}
    for name, values in run.per_weight.items():
        key = parameter_of(name)
        table[key] = table[key].plus(_one(values)) if key in table else _one(values)
    return table


def _one(values: Mapping[str, Any]) -> KindOfWeight:
    return KindOfWeight(
        1,
        int(values.get("active") or 0),
        int(values.get("numel") or 0),
        _number(values.get("l2_delta")) ** 2,
        _number(values.get("max_abs_delta")),
        tuple(values.get("cohort_counts") or ()),
    )


def by_kind(run: Run) -> dict[str, KindOfWeight]:
    """Group as `by_layer_and_kind` does, and add up over the layers."""
    table: dict[str, KindOfWeight] = {}
    for (_, kind), values in by_layer_and_kind(run).items():
        table[kind] = table.get(kind, KindOfWeight()).plus(values)
    return table


def layer_of(name: str) -> int | None:
    """Find the number of the block that a weight belongs to; None outside the numbered blocks."""
    return _split_name(name)[0]


def kind_of(names: Iterable[str]) -> dict[str, str]:
    """Find the kind of module of each weight: `q_proj` for `model.layers.3.self_attn.q_proj.weight`."""
    kinds = {name: _split_name(name)[1] for name in names}
    short = _short_names(set(kinds.values()))
    return {name: short[kind] for name, kind in kinds.items()}


def parameter_of(name: str) -> str:
    """Find the parameter that holds a weight: `experts.down_proj` for the slice `experts.down_proj.17`."""
    parameter, _, number = name.rpartition(".")
    return parameter if parameter and number.isdigit() else name


def _split_name(name: str) -> tuple[int | None, str]:
    match = _LAYER.match(name)
    if match is None:
        return None, name.removesuffix(".weight")
    return int(match["layer"]), re.sub(r"\.\d+(?=\.)", ".*", parameter_of(match["kind"]))


def _short_names(kinds: set[str]) -> dict[str, str]:
    """Shorten each name to the last parts that still tell it from all others."""
    short = {}
    for kind in kinds:
        parts = kind.split(".")
        endings = (".".join(parts[-length:]) for length in range(1, len(parts) + 1))
        short[kind] = next(
            (end for end in endings if not any(o != kind and f".{o}".endswith(f".{end}") for o in kinds)), kind
        )
    return short
