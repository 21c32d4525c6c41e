"""From scores to keys: the K entries with the largest keys are the draw.

`top`: the key is the score. `sample`: entries are drawn one after the other without replacement, each with a
probability in proportion to score^temperature among those left. The Gumbel trick does this for all at once:
key = temperature * log(score) + noise, with independent Gumbel noise (Vieira 2014; Kool et al. 2019).
The noise of an entry is a hash of (seed, weight, round, flat index). No generator has a state, so every process, and
every part of a weight, computes the same keys.
"""

from __future__ import annotations

import hashlib
import math

import torch
from torch import Tensor

_MASK = 0xFFFFFFFF
_LEAST = 2.0**100
"""Above the magnitude of any key of a positive score; keys of entries with a score of 0 are below its negative."""
MOST_TEMPERATURE = 1e6
"""The highest finite temperature; above it a draw is `top`."""


def stream(seed: int, name: str, round_number: int, purpose: str = "draw") -> tuple[int, int]:
    """Derive the two 32-bit keys of the noise of one weight in one round."""
    digest = hashlib.sha256(f"{seed}\0{purpose}\0{name}\0{round_number}".encode()).digest()
    return int.from_bytes(digest[:4], "little"), int.from_bytes(digest[4:8], "little")


def noise(indices: Tensor, keys: tuple[int, int]) -> Tensor:
    """Compute Gumbel noise [n] float64 of entries with flat `indices` [n] int64.

    -log(-log(1 - v)) for a uniform v of 32 bits: the larger the noise, the finer its steps.
    """
    uniform = (hashed(indices, keys).double() + 0.5) / 2**32
    return uniform.neg_().log1p_().neg_().log_().neg_()


def hashed(numbers: Tensor, keys: tuple[int, int]) -> Tensor:
    """Hash numbers [n] int64, at least 0, to 32 bits: [n] int64."""
    return _hash(_hash((numbers & _MASK) ^ keys[0]) + (numbers >> 32) + keys[1])


def _hash(numbers: Tensor) -> Tensor:
    """Mix the lower 32 bits of [n] int64: `lowbias32` of Chris Wellons, a bijection of 32 bits."""
    bits = numbers & _MASK
    bits ^= bits >> 16
    bits = (bits * 0x7FEB352D) & _MASK
    bits ^= bits >> 15
    bits = (bits * 0x846CA68B) & _MASK
    bits ^= bits >> 16
    return bits


def top_keys(scores: Tensor) -> Tensor:
    """Return keys [n] fp32 of `top`: the scores [n] themselves."""
    return scores.float()


def sample_keys(scores: Tensor, indices: Tensor, temperature: float, keys: tuple[int, int]) -> Tensor:
    """Compute keys [n] fp32 of `sample`: not negative, NaN where the score is NaN or negative.

    Entries with a score of 0 come after all others, in random order. Logarithms are taken in float64 and the sum is
    rounded once, so that libraries which differ in a last bit give the same keys.

    Args:
        scores: [n] at least 0.
        indices: [n] int64 flat.
        temperature: at least 0 and finite; 0: uniform among positive scores.
        keys: see `stream`.
    """
    drawn = noise(indices, keys)
    logs = scores.double().log_()
    positive = temperature * logs.clamp_(min=-1e4) + drawn
    never = (drawn / 64 - 2) * _LEAST  # noise is in (-4, 23): these are in (-2.1, -1.6) * 2^100
    return _not_negative(torch.where(scores > 0, positive, torch.where(scores == 0, never, torch.nan)).float())


def _not_negative(keys: Tensor) -> Tensor:
    """Map keys [n] fp32 of any sign to ones that are not negative, in the same order, up to the last bit.

    The bit patterns of floats, those of negative ones turned over, are integers of the same order. Half of such an
    integer plus 2^30 is the pattern of a float above 0: the exchange between processes sorts those.
    """
    bits = keys.view(torch.int32)
    ordered = torch.where(bits < 0, bits ^ 0x7FFFFFFF, bits)
    mapped = ((ordered >> 1) + (1 << 30)).view(torch.float32)
    return torch.where(keys.isnan(), torch.nan, mapped)


def is_top(temperature: float) -> bool:
    """Return True if so high a temperature leaves nothing to chance."""
    return math.isinf(temperature) or temperature > MOST_TEMPERATURE
