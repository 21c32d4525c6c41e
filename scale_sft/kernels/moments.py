"""The storage of AdamW's moments by option, and the 8-bit format, with the blocks of bitsandbytes."""

from __future__ import annotations

from bisect import bisect_right

import torch
from torch import Tensor
from torch.nn import functional

from scale_sft.spiel.deltas import DeltaStore
from scale_sft.spiel.moments import Moment, Moments, float32_moments, mixed_moments

BLOCK = 256


class BlockwiseMoment:
    """A moment in 1 byte per delta and one fp32 scale per 256 of them; no block crosses weights.

    The codes are the dynamic map of bitsandbytes (Dettmers et al. 2022), found here by bisection: its own CPU quantiser
    maps zero to some 1e-5 of the block's largest value, which would move entries without a gradient. The second moment
    is stored as its square root: updates divide by it, it spans half as many decades, and a nonzero value never becomes
    zero.

    Args:
        deltas: the deltas that the moment belongs to.
        second: True for the second moment, which has no negative values.
    """

    crosses_weights = False

    def __init__(self, deltas: DeltaStore, *, second: bool):
        from bitsandbytes.functional import create_dynamic_map

        self._second, self._starts, self._names = second, deltas.places.starts, deltas.names
        self._map = create_dynamic_map(signed=not second).to(deltas.device)
        self._bounds = (self._map[1:] + self._map[:-1]) / 2
        if second:
            self._bounds[0] = 0
        zero = int(self._map.abs().argmin())
        self._codes, self._scales = {}, {}
        for delta in deltas:
            blocks = -(-delta.active // BLOCK)
            self._codes[delta.name] = torch.full((delta.active,), zero, dtype=torch.uint8, device=deltas.device)
            self._scales[delta.name] = torch.zeros(blocks, device=deltas.device)

    def load(self, part: slice) -> Tensor:
        name, part = self._within(part)
        codes = self._codes[name][part]
        values = self._map.index_select(0, codes.int())
        blocks = _in_blocks(values).mul_(self._scales[name][_blocks(part)].unsqueeze(1))
        values = blocks.view(-1)[: codes.numel()]
        return values.square_() if self._second else values

    def store(self, part: slice, values: Tensor) -> None:
        name, part = self._within(part)
        blocks = _in_blocks(values.sqrt() if self._second else values)
        scales = blocks.abs().amax(1)
        ratios = blocks / scales.clamp(min=torch.finfo(torch.float32).tiny).unsqueeze(1)
        codes = torch.bucketize(ratios.view(-1)[: values.numel()], self._bounds, out_int32=True)
        self._codes[name][part] = codes.to(torch.uint8)
        self._scales[name][_blocks(part)] = scales

    def _within(self, part: slice) -> tuple[str, slice]:
        """Find the weight of a part of all entries, and where in it the part is."""
        number = bisect_right(self._starts, part.start) - 1
        start = self._starts[number]
        return self._names[number], slice(part.start - start, part.stop - start)

    def state(self, name: str) -> dict[str, Tensor]:
        return {"_codes": self._codes[name], "_scales": self._scales[name]}


def _blocks(part: slice) -> slice:
    return slice(part.start // BLOCK, -(-part.stop // BLOCK))


def _in_blocks(values: Tensor) -> Tensor:
    """Reshape [n] to [blocks, 256], padded with zeros; a copy only if the last block is not full."""
    missing = -values.numel() % BLOCK
    return (functional.pad(values, (0, missing)) if missing else values).view(-1, BLOCK)


def int8_moments(deltas: DeltaStore) -> tuple[Moment, Moment]:
    """Create both moments in 8 bits: 2 bytes per delta, and 8 per 256 of them."""
    return BlockwiseMoment(deltas, second=False), BlockwiseMoment(deltas, second=True)


_WAYS: dict[str, tuple[Moments, float]] = {
    "float32": (float32_moments, 8),
    "mixed": (mixed_moments, 6),
    "int8": (int8_moments, 2 + 8 / BLOCK),
}


def resolve_moments(wanted: str, compute_dtype: torch.dtype) -> str:
    """Resolve `auto`: float32 if gradients are computed in it, otherwise mixed, which loses none of their digits."""
    if wanted != "auto":
        return wanted
    return "float32" if compute_dtype is torch.float32 else "mixed"


def moments_of(name: str) -> Moments:
    """Look up the function that creates the moments of a resolved name."""
    return _WAYS[name][0]


def bytes_of_moments(name: str) -> float:
    """Return the bytes per delta of both moments."""
    return _WAYS[name][1]
