"""Candidates for growth, chosen over all ranks: the largest entries of a summed gradient that no rank holds whole.

Shapes: W ranks; N entries of a weight, cut into W parts of P = ceil(N / W) (the last ones may be shorter, or empty);
C candidates, of which S are in this rank's part.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from scale_sft.kernels.cpu.topk import largest_magnitudes
from scale_sft.spiel.indices import index_dtype, pieces

from .agreement import Ranks

PROPOSAL_ENTRIES = 1 << 26
"""Entries of a gradient that are summed over the ranks at a time: 256 MiB in float32."""
_DIGITS = (11, 11, 9)
"""Bits of a key, from the highest: each digit is counted in one collective."""
_CHUNK_ENTRIES = 1 << 22
"""Entries of a part that are looked at at a time."""
_INFINITY = 0x7F800000
"""Bit pattern of infinity in float32, the largest magnitude that is a number."""
_ZERO = 1
"""The key of zero: see `_keys`."""


def select_candidates(ranks: Ranks, gradient: Tensor, count: int) -> Tensor:
    """Choose the entries of largest magnitude of a gradient summed over the ranks.

    Each rank receives its part of the sum (reduce-scatter, piece by piece, so that no fp32 copy of the whole is made).
    Magnitudes become integer keys of the same order; the ranks find the key of the C-th largest digit by digit, from
    histograms summed over all parts. Then only the indices of what was chosen are exchanged. The choice is exact, and
    the same on every rank because all decide on the same counts. The host waits for the device once.

    Args:
        ranks: the ranks that call this together.
        gradient: [N], this rank's summand.
        count: C, 0 <= C <= N.

    Returns:
        Flat indices [C] int64, sorted; [0] if all of the sum is 0. Ties go to the smaller index; NaN ranks below any
        number.

    Raises:
        ValueError: C is out of range.
    """
    n = gradient.numel()
    if ranks.size == 1 or not 0 < count <= n:
        return largest_magnitudes(gradient, count)
    return _select(ranks, _own_part(ranks, gradient), n, count)


def range_of_rank(ranks: Ranks, n: int) -> slice:
    """Return the entries of a weight of `n` (N) whose sum this rank receives."""
    part = _part_entries(n, ranks.size)
    return slice(min(n, part * ranks.rank), min(n, part * (ranks.rank + 1)))


def sum_own_part(ranks: Ranks, gradient: Tensor) -> Tensor:
    """Sum a gradient [N] over the ranks and return this rank's part of the sum: see `range_of_rank`."""
    return gradient if ranks.size == 1 else _own_part(ranks, gradient)


def select_largest(ranks: Ranks, keys: Tensor, n: int, count: int) -> Tensor:
    """Choose the entries with the largest keys of all ranks, as `select_candidates` does with magnitudes.

    Args:
        ranks: the ranks that call this together.
        keys: float32, not negative, of this rank's part of `n` (N) entries: see `range_of_rank`.
        n: N.
        count: C, 0 <= C <= N.

    Returns:
        Flat indices [C] int64, sorted; [0] if all keys are 0.

    Raises:
        ValueError: C is out of range.
    """
    if ranks.size == 1 or not 0 < count <= n:
        return largest_magnitudes(keys, count)
    return _select(ranks, keys.clone(), n, count)


def join_parts(ranks: Ranks, keys: Tensor, n: int) -> Tensor:
    """Put the ranks' parts of `n` (N) entries together on every rank: [N]."""
    if ranks.size == 1:
        return keys
    padded = keys.new_zeros(_part_entries(n, ranks.size))
    padded[: keys.numel()] = keys
    return ranks.gather(padded)[:n]


def _select(ranks: Ranks, values: Tensor, n: int, count: int) -> Tensor:
    """Choose the C entries of largest magnitude from the ranks' parts of N values, which are overwritten."""
    part, integers = _part_entries(n, ranks.size), index_dtype(n)
    chosen, offset = _chosen(ranks, _keys(values), count, integers)
    most = min(len(values), count)
    del values  # before memory is taken for the exchange
    own = chosen.nonzero().squeeze(1)  # the host waits for their number
    if own.numel() > most:  # all is 0: see `_marks`
        return own[:0]
    places = torch.arange(own.numel(), device=own.device).add_(offset)
    own += part * ranks.rank
    found = torch.zeros(count, dtype=integers, device=own.device)
    found[places] = own.to(integers)
    ranks.sum_(found, "proposal")  # every place is filled by one rank
    return found.long()


@dataclass(frozen=True)
class ProposalCost:
    """What one call of `select_candidates` costs a rank: collectives by kind, bytes that it gives into them, memory."""

    calls: int
    reduce_scattered: int
    all_reduced: int
    all_gathered: int
    temporaries: int  # at their peak, beside the gradient

    @property
    def payload(self) -> int:
        """Bytes that a rank gives into all of the collectives."""
        return self.reduce_scattered + self.all_reduced + self.all_gathered

    def sent(self, world: int) -> float:
        """Bytes that a rank sends for them by ring algorithms."""
        ring = (world - 1) / world
        return ring * (self.reduce_scattered + 2 * self.all_reduced) + (world - 1) * self.all_gathered


def proposal_cost(n: int, count: int, world: int) -> ProposalCost:
    """Compute what choosing `count` (C) of `n` (N) entries over `world` (W) ranks costs each of them.

    Temporaries are at their peak in one of four places: while the last piece is summed, while a digit is counted, while
    the chosen entries are marked, or while they are exchanged. All of it is within 16 bytes x (P + C), plus one piece.
    """
    if world == 1:
        return ProposalCost(0, 0, 0, 0, 0)
    part, item = _part_entries(n, world), index_dtype(n).itemsize
    *summed, last = (1 << bits for bits in _DIGITS)
    chunk, most = min(part, _CHUNK_ENTRIES), min(part, count)
    counted = 64 * max(summed) + 24 * world * (last + 1)  # histograms; the last one of every rank, in several forms
    return ProposalCost(
        calls=len(list(_cuts(part, world))) + len(_DIGITS) + 1,
        reduce_scattered=4 * part * world,
        all_reduced=item * (sum(summed) + count),
        all_gathered=4 * (last + 1),
        temporaries=max(
            4 * part + 4 * world * min(part, _cut_entries(world)),
            5 * part + 8 * chunk + counted,
            part + most + 8 * most,
            (16 + item) * most + item * count,
            (item + 8) * count,
        ),
    )


def _part_entries(n: int, world: int) -> int:
    """Compute P, the entries of a rank's part of `n` (N); the last parts may have fewer."""
    return -(-n // world)


def _own_part(ranks: Ranks, gradient: Tensor) -> Tensor:
    """Sum a gradient [N] over the ranks in float32 and return this rank's part of the sum: [P], at the end shorter."""
    n, world = gradient.numel(), ranks.size
    part = _part_entries(n, world)
    whole, rest = divmod(n, part)  # parts without padding, entries of the one that has some
    total = torch.empty(part, dtype=torch.float32, device=gradient.device)
    for cut in _cuts(part, world):
        given = torch.zeros(world, cut.stop - cut.start, dtype=torch.float32, device=gradient.device)
        given[:whole] = gradient[: whole * part].view(whole, part)[:, cut]
        if rest:
            left = gradient[whole * part :][cut]
            given[whole, : left.numel()] = left
        ranks.sum_parts(total[cut], given.view(-1), "proposal")
        del given  # before the next one is made
    return total[: max(0, min(part, n - part * ranks.rank))]


def _keys(sums: Tensor) -> Tensor:
    """Turn sums [n] float32 in place into [n] int32 keys that order them by magnitude: 0 for NaN, 1 for zero."""
    keys = sums.view(torch.int32).bitwise_and_(0x7FFFFFFF)
    return keys.masked_fill_(keys > _INFINITY, -1).add_(1)


def _chosen(ranks: Ranks, keys: Tensor, count: int, integers: torch.dtype) -> tuple[Tensor, Tensor]:
    """Find which entries of this rank's part are among the C largest of all.

    Args:
        ranks: the ranks that call this together.
        keys: [n] int32, of this rank's part.
        count: C.
        integers: can count N entries.

    Returns:
        Marks, see `_marks`; and how many entries the ranks before this one have chosen, [1] int64.
    """
    threshold = torch.zeros(1, dtype=torch.int32, device=keys.device)  # the digits of its key that are known
    above = torch.zeros(1, dtype=torch.int64, device=keys.device)  # keys of this part that begin with more than that
    wanted = torch.full_like(above, count)  # of all keys that begin with that
    left = sum(_DIGITS)
    for bits in _DIGITS[:-1]:
        left -= bits
        own = _histogram(keys, threshold, bits, left)
        total = own.to(integers, copy=True)
        ranks.sum_(total, "proposal")
        digit = _digit_of(total, wanted)
        wanted -= _above(total, digit)
        above += _above(own, digit)
        threshold = (threshold << bits) + digit.int()
    own = _histogram(keys, threshold, _DIGITS[-1], 0)
    rows = torch.cat((above.to(own.dtype), own))
    ranks.traffic_bytes["proposal"] += rows.nbytes
    rows = ranks.gather(rows).view(ranks.size, -1)
    total = rows[:, 1:].sum(0)
    digit = _digit_of(total, wanted)
    wanted -= _above(total, digit)
    threshold = (threshold << _DIGITS[-1]) + digit.int()

    larger = rows[:, 0] + _above(rows[:, 1:], digit)
    level = rows[:, 1:].index_select(1, digit).squeeze(1)
    taken = (wanted - (level.cumsum(0) - level)).clamp_(min=0).minimum(level)  # ties: smaller indices, earlier ranks
    chosen, here = larger + taken, slice(ranks.rank, ranks.rank + 1)
    zero = (threshold == _ZERO) & (larger.sum() == 0)
    marks = _marks(keys, threshold, taken[here].int(), min(len(keys), count), zero)
    return marks, (chosen.cumsum(0) - chosen)[here]


def _marks(keys: Tensor, threshold: Tensor, ties: Tensor, most: int, zero: Tensor) -> Tensor:
    """Mark the entries [n] whose key is above the threshold [1], and the first `ties` [1] of those that equal it.

    Returns:
        [n + most + 1] bool: marks of the entries, of which at most `most` are set; after them, `most` + 1 times, the
        flag `zero` [1], so that the number of marks tells it too.
    """
    chosen = torch.empty(len(keys) + most + 1, dtype=torch.bool, device=keys.device)
    chosen[len(keys) :] = zero
    for chunk in pieces(keys.numel(), _CHUNK_ENTRIES):
        level = keys[chunk] == threshold
        number = level.int().cumsum_(0)
        torch.le(number, ties, out=chosen[chunk])
        chosen[chunk] &= level
        ties = ties - number[-1:]
        chosen[chunk] |= keys[chunk] > threshold
    return chosen


def _histogram(keys: Tensor, prefix: Tensor, bits: int, left: int) -> Tensor:
    """Count the keys [n] that begin with `prefix` [1] by their next `bits` bits, after which `left` bits remain.

    Returns:
        [2^bits] int32.
    """
    size, first = 1 << bits, prefix << bits
    counts = torch.zeros(size, dtype=torch.int32, device=keys.device)
    for chunk in pieces(keys.numel(), _CHUNK_ENTRIES):
        digits = (keys[chunk] >> left).sub_(first)
        if digits.is_cuda and not torch.are_deterministic_algorithms_enabled():  # which histc refuses
            # bincount would make the host wait; one bin more, because the last includes its upper end
            counts += torch.histc(digits, bins=size + 1, min=0, max=size + 1)[:-1].int()
        else:
            counts += torch.bincount(digits.clamp_(-1, size).add_(1), minlength=size + 2)[1:-1]
    return counts


def _digit_of(counts: Tensor, wanted: Tensor) -> Tensor:
    """Find the largest digit such that at least `wanted` [1] entries have it or a larger one: [1] int64.

    `counts` [B]: of entries by digit; as many as wanted or more.
    """
    at_least = counts.flip(0).cumsum(0)  # from the largest digit down
    return (at_least >= wanted).sum(0, keepdim=True) - 1


def _above(counts: Tensor, digit: Tensor) -> Tensor:
    """Add up counts [..., B] of digits larger than `digit` [1]: [...] int64, at least one-dimensional."""
    larger = torch.arange(counts.shape[-1], device=counts.device) > digit
    return (counts * larger).sum(-1, keepdim=counts.dim() == 1)


def _cut_entries(world: int) -> int:
    """Entries of each part that are summed at a time."""
    return max(1, PROPOSAL_ENTRIES // world)


def _cuts(part: int, world: int) -> list[slice]:
    """Slices of a part [P], each of which is summed at once in all parts."""
    return list(pieces(part, _cut_entries(world)))
