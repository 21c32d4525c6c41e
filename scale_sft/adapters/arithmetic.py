"""Adapters of one base as vectors: sums, negation, trimming, and how much they overlap.

Shapes: K active entries of a weight. An entry that an adapter does not have counts as 0. All sums are taken in fp64 and
rounded once, so a weighted sum is exact in fp32.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from scale_sft.data.turn_ends import INFO_KEY
from scale_sft.errors import UserError
from scale_sft.model.fingerprints import combine_fingerprints
from scale_sft.spiel.indices import index_dtype
from scale_sft.spiel.topk import in_sorted, top_k_sorted

from .format import Adapter

Combine = Callable[[list[tuple[Tensor, Tensor]]], tuple[Tensor, Tensor]]
"""[(indices [K], deltas [K])] of one weight in every adapter -> its indices and deltas in the result."""


def add(adapters: Sequence[Adapter], weights: Sequence[float] | None = None) -> Adapter:
    """Add adapters, weighted, on the union of their entries.

    Args:
        weights: one factor per adapter; default: all 1.

    Raises:
        UserError: the adapters are of different bases, or the number of weights is not that of the adapters.
    """
    factors = list(weights) if weights else [1.0] * len(adapters)
    if len(factors) != len(adapters):
        raise UserError(f"add: got {len(factors)} weights for {len(adapters)} adapters; expected one for each")

    def combine(found: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
        every = torch.cat([indices.long() for indices, _ in found])
        union, place = every.unique(return_inverse=True)
        total = torch.zeros(union.shape, dtype=torch.float64)
        start = 0
        for (indices, deltas), factor in zip(found, factors, strict=True):
            total.index_add_(0, place[start : start + indices.numel()], deltas.double() * factor)
            start += indices.numel()
        return union, total.float()

    return _combine("add", adapters, combine, weights=factors)


def scale(adapter: Adapter, factor: float) -> Adapter:
    """Multiply all deltas by `factor`; -1 steers away from the task, 0.5 halves its effect on the weights."""
    return _combine(
        "scale", [adapter], lambda found: (found[0][0], (found[0][1].double() * factor).float()), factor=factor
    )


def intersect(adapters: Sequence[Adapter]) -> Adapter:
    """Keep the first adapter's deltas at the entries that all the others have too."""

    def combine(found: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
        (indices, deltas), *others = found
        kept = torch.ones(indices.shape, dtype=torch.bool)
        for other, _ in others:
            kept &= in_sorted(indices, other.to(indices.dtype))
        return indices[kept], deltas[kept]

    return _combine("intersect", adapters, combine)


def difference(adapters: Sequence[Adapter]) -> Adapter:
    """Keep the first adapter's deltas at the entries that none of the others has."""

    def combine(found: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
        (indices, deltas), *others = found
        kept = torch.ones(indices.shape, dtype=torch.bool)
        for other, _ in others:
            kept &= ~in_sorted(indices, other.to(indices.dtype))
        return indices[kept], deltas[kept]

    return _combine("difference", adapters, combine)


def prune(adapter: Adapter, density: float) -> Adapter:
    """Keep floor(density * N) entries of each weight [N], those of largest |delta|; ties to the smaller index.

    Raises:
        UserError: density outside [0, 1].
    """
    if not 0 <= density <= 1:
        raise UserError(f"prune: got density {density}, expected a fraction in [0, 1] of each target weight")
    indices, deltas = {}, {}
    for name, (rows, columns) in adapter.shapes.items():
        count = min(int(density * rows * columns), adapter.indices[name].numel())
        kept = top_k_sorted(adapter.deltas[name].abs(), count)
        indices[name], deltas[name] = adapter.indices[name][kept], adapter.deltas[name][kept]
    return Adapter(indices, deltas, dict(adapter.shapes), _info("prune", [adapter], density=density))


def _combine(operation: str, adapters: Sequence[Adapter], combine: Combine, **settings: Any) -> Adapter:
    """Apply `combine` to every weight that any of the adapters has."""
    require_one_base(adapters)
    shapes = {name: shape for adapter in adapters for name, shape in adapter.shapes.items()}
    info = _info(operation, adapters, **settings)
    empty = (torch.empty(0, dtype=torch.int32), torch.empty(0))
    indices, deltas = {}, {}
    for name, (rows, columns) in shapes.items():
        found = [(a.indices[name], a.deltas[name]) if name in a.shapes else empty for a in adapters]
        places, values = combine(found)
        indices[name], deltas[name] = places.to(index_dtype(rows * columns)), values.float()
    return Adapter(indices, deltas, shapes, info)


def _info(operation: str, adapters: Sequence[Adapter], **settings: Any) -> dict[str, Any]:
    """Collect the provenance of a result; the hash of its base covers the weights of all operands."""
    first = adapters[0].info
    known = ("base", "revision", "dtype", "base_hash", "rounding_rule")
    info = {key: first[key] for key in known if key in first}
    if all("base_fingerprints" in adapter.info for adapter in adapters):
        prints = {name: value for adapter in adapters for name, value in adapter.info["base_fingerprints"].items()}
        shapes = {name: shape for adapter in adapters for name, shape in adapter.shapes.items()}
        info["base_fingerprints"] = prints
        info["base_hash"] = combine_fingerprints(
            {n: (int(v[:16], 16), int(v[16:], 16)) for n, v in prints.items()}, shapes
        )
    odd = {name: dtype for adapter in adapters for name, dtype in adapter.info.get("dtypes", {}).items()}
    if odd:
        info["dtypes"] = odd
    for key in ("chat_template", INFO_KEY):  # what a merged model needs to talk, where all operands agree on it
        values = [adapter.info.get(key) for adapter in adapters]
        if values[0] is not None and all(value == values[0] for value in values):
            info[key] = values[0]
    info["method"] = operation
    operands = [
        adapter.info.get("made_from") or {"method": adapter.info.get("method"), "base_hash": adapter.info["base_hash"]}
        for adapter in adapters
    ]
    return info | {"made_from": {"operation": operation, **settings, "operands": operands}}


def require_one_base(adapters: Sequence[Adapter]) -> None:
    """Raise UserError if adapters were not trained on the same base, as far as their hashes tell.

    Weights that two adapters share must have the same fingerprint; adapters that share none must name the same base.
    """
    for first, other in itertools.combinations(adapters, 2):
        a, b = first.info, other.info
        names = f"'{a['base']}' and '{b['base']}'"
        if a["dtype"] != b["dtype"]:
            raise UserError(f"adapters of different bases: dtype {a['dtype']} and {b['dtype']} ({names})")
        shared = first.shapes.keys() & other.shapes.keys()
        for name in sorted(shared):
            if first.shapes[name] != other.shapes[name]:
                raise UserError(
                    f"adapters of different bases: '{name}' is {first.shapes[name]} and {other.shapes[name]} ({names})"
                )
        if "base_fingerprints" in a and "base_fingerprints" in b:
            for name in sorted(shared):
                if a["base_fingerprints"][name] != b["base_fingerprints"][name]:
                    raise UserError(f"adapters of different bases: '{name}' differs between {names}")
            if not shared and (a["base"], a.get("revision")) != (b["base"], b.get("revision")):
                raise UserError(f"adapters of different bases: {names} (they share no weight that could be compared)")
        elif a["base_hash"] != b["base_hash"]:
            raise UserError(f"adapters of different bases: the hashes of the target weights differ ({names})")


@dataclass(frozen=True)
class Overlap:
    """The entries that two adapters have in common in one weight, or in several together."""

    first: int  # entries
    second: int
    shared: int
    same_sign: int  # of the shared ones
    by_chance: float  # shared entries that two random choices of as many would have

    def plus(self, other: Overlap) -> Overlap:
        mine, theirs = vars(self), vars(other)
        return Overlap(**{key: mine[key] + theirs[key] for key in mine})

    def as_row(self) -> dict[str, float | int | None]:
        return {
            **vars(self),
            "shared_fraction": self.shared / min(self.first, self.second) if min(self.first, self.second) else None,
            "sign_agreement": self.same_sign / self.shared if self.shared else None,
        }


def overlap(first: Adapter, second: Adapter) -> dict[str, Overlap]:
    """Compute the overlap of two adapters by weight name, over the weights of either."""
    require_one_base([first, second])
    rows = {}
    for name, (o, i) in ({**first.shapes, **second.shapes}).items():
        counts = [adapter.indices[name].numel() if name in adapter.shapes else 0 for adapter in (first, second)]
        shared = same = 0
        if all(counts):
            mine, theirs = first.indices[name].long(), second.indices[name].long()
            a, b = first.deltas[name][in_sorted(mine, theirs)], second.deltas[name][in_sorted(theirs, mine)]
            shared, same = a.numel(), int((torch.sign(a) == torch.sign(b)).sum())
        rows[name] = Overlap(counts[0], counts[1], shared, same, counts[0] * counts[1] / (o * i))
    return rows
