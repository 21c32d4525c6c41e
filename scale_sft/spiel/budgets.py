"""Split a budget of active entries over the weights."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping


def budget(
    shapes: Mapping[str, tuple[int, int]],
    *,
    density: float | None = None,
    tunable_weights: int | None = None,
    rank_equivalent: int | None = None,
) -> dict[str, int]:
    """Compute the active entries K of each weight from exactly one of three budgets (sections 3.2, footnote 2; 4.3).

    `density`: K = floor(density * N). `tunable_weights`: a total, spread uniformly. `rank_equivalent`:
    K = r * (O + I), the trainable parameters of LoRA of rank r. K is at least 1 and at most N.
    """
    wanted: dict[str, int] = {}
    if [density, tunable_weights, rank_equivalent].count(None) != 2:
        raise ValueError("a budget needs exactly one of density, tunable_weights, rank_equivalent")
    size: Callable[[int, int], int] = lambda o, i: o * i
    if rank_equivalent is not None:
        wanted = {name: rank_equivalent * (o + i) for name, (o, i) in shapes.items()}
    elif density is not None:
        wanted = {name: int(density * size(*shape)) for name, shape in shapes.items()}
    elif tunable_weights is not None:
        wanted = _spread(tunable_weights, {name: size(*shape) for name, shape in shapes.items()})
    return {name: max(1, min(wanted[name], size(*shapes[name]))) for name in shapes}


def as_lora_spends(counts: Mapping[str, int], shapes: Mapping[str, tuple[int, int]]) -> dict[str, int]:
    """Divide the sum of `counts` over the weights in proportion to O + I, as LoRA of one rank would; at most N each.

    What does not fit into a weight goes to the others in the same proportion.
    """
    shares: dict[str, int] = {}
    total, rest = sum(counts.values()), dict(shapes)
    while rest:
        wanted = _spread(total, {name: o + i for name, (o, i) in rest.items()})
        full = {name: o * i for name, (o, i) in rest.items() if wanted[name] >= o * i}
        if not full:
            shares |= {name: max(1, k) for name, k in wanted.items()}
            break
        shares |= full
        total -= sum(full.values())
        rest = {name: shape for name, shape in rest.items() if name not in full}
    return {name: shares[name] for name in shapes}


def equivalent_rank(active: int, shapes: Iterable[tuple[int, int]]) -> float:
    """Compute the rank at which LoRA of weights of these shapes has as many parameters as there are active entries."""
    return active / sum(o + i for o, i in shapes)


def _spread(total: int, sizes: Mapping[str, int]) -> dict[str, int]:
    """Split `total` in proportion to `sizes`; entries left over by rounding go to the largest remainders, in order."""
    everything = sum(sizes.values())
    shares = {name: total * size // everything for name, size in sizes.items()}
    by_remainder = sorted(sizes, key=lambda name: -(total * sizes[name] % everything))
    for name in by_remainder[: total - sum(shares.values())]:
        shares[name] += 1
    return shares
