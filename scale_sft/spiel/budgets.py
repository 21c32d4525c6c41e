"""Split a budget of active entries over the weights."""

from __future__ import annotations

from collections.abc import Callable, Mapping


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


def _spread(total: int, sizes: Mapping[str, int]) -> dict[str, int]:
    """Split `total` in proportion to `sizes`; entries left over by rounding go to the largest remainders, in order."""
    everything = sum(sizes.values())
    shares = {name: total * size // everything for name, size in sizes.items()}
    by_remainder = sorted(sizes, key=lambda name: -(total * sizes[name] % everything))
    for name in by_remainder[: total - sum(shares.values())]:
        shares[name] += 1
    return shares
