"""Inspect an adapter: counts, magnitudes, where its entries are, and where it comes from.

Shapes: K active entries of an [O, I] weight.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from scale_sft.reporting.weight_names import kind_of, layer_of, parameter_of
from scale_sft.spiel.selection.spread import FRACTIONS, batches, fullest, owned

from .format import Adapter

QUANTILES = (0.0, 0.25, 0.5, 0.75, 0.99, 1.0)
_SAMPLE_ENTRIES = 1 << 16
_SAMPLE_TOTAL = 1 << 23
_TOP_FRACTION = 0.01


@dataclass(frozen=True)
class WeightFacts:
    """One weight, or several together."""

    weights: int
    active: int
    numel: int
    square: float  # sum of squared deltas
    largest: float  # largest |delta|
    zeros: int
    top_rows: float  # fraction of the entries that is in the fullest 1 % of the rows (at least one row)
    top_columns: float
    spread_rows: tuple[float, ...]  # share of the entries in the fullest rows, for each of `FRACTIONS` of them
    spread_columns: tuple[float, ...]

    @property
    def density(self) -> float:
        return self.active / self.numel

    @property
    def norm(self) -> float:
        return self.square**0.5

    def as_row(self) -> dict[str, float | int]:
        return {**vars(self), "density": self.density, "norm": self.norm}


@dataclass(frozen=True)
class Inspection:
    """Everything that `scale-sft inspect` shows."""

    folder: str
    info: dict[str, Any]  # provenance: adapter_config.json without what belongs to single weights
    total: WeightFacts
    by_layer: dict[str, WeightFacts]
    by_kind: dict[str, WeightFacts]
    by_parameter: dict[str, WeightFacts]  # experts that share a parameter together, as they are many
    by_weight: dict[str, WeightFacts]
    quantiles: dict[str, float]  # of |delta|, over all weights
    sample: Tensor  # |delta| of up to 65,536 entries per weight and 8,388,608 in all, for a histogram
    moved: list[dict[str, Any]]  # the entries moved most

    def as_document(self) -> dict[str, Any]:
        tables = {name: getattr(self, name) for name in ("by_layer", "by_kind", "by_weight")}
        return {
            "adapter": self.folder,
            "provenance": self.info,
            "total": self.total.as_row(),
            "quantiles_of_magnitude": self.quantiles,
            "most_moved": self.moved,
            "spread_fractions": FRACTIONS,
            **{name: {key: facts.as_row() for key, facts in table.items()} for name, table in tables.items()},
        }


def inspect(folder: str | Path, *, top: int = 10) -> Inspection:
    """Read an adapter weight by weight and summarise it.

    Args:
        top: how many of the most moved entries to name.

    Raises:
        UserError: the adapter is damaged.
    """
    by_weight: dict[str, WeightFacts] = {}
    samples, moved = [], []
    with Adapter.open(folder) as adapter:
        info = {key: value for key, value in adapter.info.items() if key != "base_fingerprints"}
        counts = {name: adapter.active(name) for name in adapter.shapes}
        thin = math.ceil(sum(counts.values()) / _SAMPLE_TOTAL)
        for names in batches(adapter.shapes, counts):
            found = [(adapter.indices[name], adapter.deltas[name].float()) for name in names]
            by_weight |= dict(zip(names, _facts(found, adapter.shapes[names[0]]), strict=True))
            samples += [deltas[:: max(thin, deltas.numel() // _SAMPLE_ENTRIES, 1)].abs() for _, deltas in found]
            moved += _most_moved(names, found, adapter.shapes[names[0]], top)
    sample = torch.cat(samples) if samples else torch.empty(0)
    kinds = kind_of(by_weight)
    return Inspection(
        folder=str(folder),
        info=info,
        total=_together(by_weight.values()),
        by_layer=_grouped(by_weight, {name: _layer_name(name) for name in by_weight}),
        by_kind=_grouped(by_weight, kinds),
        by_parameter=_grouped(by_weight, {name: parameter_of(name) for name in by_weight}),
        by_weight=by_weight,
        quantiles={f"{q:g}": float(value) for q, value in zip(QUANTILES, _quantiles(sample), strict=True)},
        sample=sample,
        moved=sorted(moved, key=lambda entry: -abs(entry["delta"]))[:top],
    )


Found = Sequence[tuple[Tensor, Tensor]]
"""Indices and deltas [K] of each of W weights of one shape."""


def _facts(found: Found, shape: tuple[int, int]) -> list[WeightFacts]:
    """Summarise weights of one shape."""
    rows, columns = shape
    owners, joined = owned([indices for indices, _ in found])
    deltas = torch.cat([deltas for _, deltas in found])
    empty = torch.zeros(len(found), dtype=torch.float64)
    squares = empty.index_add(0, owners, deltas.double().square()).tolist()
    largest = empty.float().scatter_reduce(0, owners, deltas.abs(), "amax").tolist()
    zeros = torch.bincount(owners[deltas == 0], minlength=len(found)).tolist()
    in_rows = _shares(owners, joined // columns, (len(found), rows))
    in_columns = _shares(owners, joined % columns, (len(found), columns))
    return [
        WeightFacts(
            weights=1,
            active=indices.numel(),
            numel=rows * columns,
            square=squares[number],
            largest=largest[number],
            zeros=zeros[number],
            top_rows=in_rows[number][0],
            top_columns=in_columns[number][0],
            spread_rows=tuple(in_rows[number][1:]),
            spread_columns=tuple(in_columns[number][1:]),
        )
        for number, (indices, _) in enumerate(found)
    ]


def _shares(owners: Tensor, places: Tensor, shape: tuple[int, int]) -> list[list[float]]:
    """For each weight: the share of its entries in the fullest 1 % of its rows, rounded down, then the profile."""
    top = max(1, int(_TOP_FRACTION * shape[1])) / shape[1]
    return [list(shares) for shares in fullest(owners, places, shape, (top, *FRACTIONS)).tolist()]


def _most_moved(names: Sequence[str], found: Found, shape: tuple[int, int], top: int) -> list[dict[str, Any]]:
    """Name the `top` entries with the largest |delta| of some weights."""
    owners, indices = owned([indices for indices, _ in found])
    deltas = torch.cat([deltas for _, deltas in found])
    best = deltas.abs().topk(min(top, deltas.numel())).indices
    picked = (tensor[best].tolist() for tensor in (owners, indices, deltas))
    return [
        {"weight": names[owner], "row": index // shape[1], "column": index % shape[1], "delta": value}
        for owner, index, value in zip(*picked, strict=True)
    ]


def _quantiles(sample: Tensor) -> list[float]:
    if not sample.numel():
        return [0.0] * len(QUANTILES)
    ordered = sample.sort().values
    return [float(ordered[round(q * (ordered.numel() - 1))]) for q in QUANTILES]


def _together(facts: Iterable[WeightFacts]) -> WeightFacts:
    found = list(facts)
    active = sum(one.active for one in found)
    mean = lambda key: sum(getattr(one, key) * one.active for one in found) / max(1, active)
    each = lambda key: tuple(
        sum(getattr(one, key)[place] * one.active for one in found) / max(1, active) for place in range(len(FRACTIONS))
    )
    return WeightFacts(
        weights=len(found),
        active=active,
        numel=sum(one.numel for one in found),
        square=sum(one.square for one in found),
        largest=max((one.largest for one in found), default=0.0),
        zeros=sum(one.zeros for one in found),
        top_rows=mean("top_rows"),
        top_columns=mean("top_columns"),
        spread_rows=each("spread_rows"),
        spread_columns=each("spread_columns"),
    )


def _layer_name(name: str) -> str:
    layer = layer_of(name)
    return "outside" if layer is None else str(layer)


def _grouped(by_weight: dict[str, WeightFacts], group: dict[str, str]) -> dict[str, WeightFacts]:
    members: dict[str, list[WeightFacts]] = {}
    for name, facts in by_weight.items():
        members.setdefault(group[name], []).append(facts)
    return {key: _together(found) for key, found in members.items()}
