"""How options cut weights into what is trained whole: single entries, or columns, rows or blocks.

Shapes: O rows, I columns of a weight as it is stored.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from math import ceil, floor, log10

from scale_sft.config.options import SparseConfig
from scale_sft.errors import UserError
from scale_sft.spiel.tiles import Tiling

Shapes = Mapping[str, tuple[int, int]]


def tilings_of(sparse: SparseConfig, shapes: Shapes, transposed: Collection[str] = ()) -> dict[str, Tiling]:
    """Cut each weight into tiles by option granularity; nothing where single entries are trained.

    A column holds the weights of one input, a row those of one output, however a layer stores them.

    Args:
        sparse: the options.
        shapes: (O, I) of each target weight by name.
        transposed: the names of weights that are stored as [in, out].

    Raises:
        UserError: a weight does not divide into blocks of this size.
    """
    kind, edge = sparse.trains_whole, sparse.block_size
    if kind == "entry":
        return {}
    found = {}
    for name, (rows, columns) in shapes.items():
        stored_column = (kind == "column") != (name in transposed)
        height, width = (edge, edge) if kind == "block" else (rows, 1) if stored_column else (1, columns)
        try:
            found[name] = Tiling((rows, columns), height, width)
        except ValueError as error:
            raise UserError(f"block_size: got {edge} for '{name}': {error}. Fix: choose a divisor of both") from None
    return found


def in_whole_tiles(sparse: SparseConfig, counts: Mapping[str, int], tilings: Mapping[str, Tiling]) -> dict[str, int]:
    """Round budgets [entries by name] down to whole tiles; what is left over goes to the next weight.

    Together they are less than one tile below the budget, unless weights are full.

    Raises:
        UserError: a weight's budget is less than one tile.
    """
    found, left = {}, 0
    for name, tiling in tilings.items():
        if counts[name] < tiling.size:
            rows, columns = tiling.shape
            what = sparse.trains_whole
            raise UserError(
                f"budget: got {counts[name]:,} entries for '{name}' of {rows:,} x {columns:,}, expected at least "
                f"{tiling.size:,}: a whole {what}. Fix: a density of at least {_rounded_up(1 / tiling.count)}, "
                "exclude_modules for this layer, or train single entries (--method random)"
            )
        tiles = min(tiling.count, (counts[name] + left) // tiling.size)
        left += counts[name] - tiles * tiling.size
        found[name] = tiles * tiling.size
    return found


def _rounded_up(fraction: float) -> str:
    """Write a fraction with two digits, not below it."""
    unit = 10.0 ** (floor(log10(fraction)) - 1)
    return f"{ceil(fraction / unit - 1e-9) * unit:.2g}"
