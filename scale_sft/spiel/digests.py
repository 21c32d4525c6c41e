"""Digests of tensors, taken where they are: 128 bits per weight that tell ranks whether they hold the same state.

The bytes of a weight's tensors, one tensor after the other, are padded with zeros to whole blocks of BLOCK_WORDS words
of 8 bytes. A block with words w_i is reduced to two sums modulo 2^64,

    s = sum m_i,    t = sum c_i m_i    with m_i = fold(b_i fold(w_i xor a_i)),    fold(x) = x xor (x >> 32),

where a_i, b_i and c_i are fixed pseudo-random numbers of the position, b_i and c_i odd. The sums of all blocks of all
weights go to the host together, in one transfer. There BLAKE2b reduces those of a weight, its name, and the kinds,
dtypes and shapes of its tensors to 128 bits. Integer sums do not depend on their order: every device gives the same.

When do different states have the same digest? Each m_i is a bijection of w_i, so a difference within one aligned word,
such as a flipped bit or another entry, always changes s. Differences in several words must cancel in both sums of
every block that they touch. The folds make the change of m_i depend on the whole word and b_i on its position, so s
behaves like a hash of 64 bits, or somewhat fewer where only high bits of words differ (signs of deltas); c_i makes t a
second condition that does not follow from the first. Random faults thus pass with a probability below 2^-80. This
protects from faulty memory, kernels and links and from ranks that decide differently. It does not protect from
someone who looks for a collision: the sums are no cryptographic hash.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

BLOCK_WORDS = 1 << 12
"""Part of the definition: another value gives other digests."""
BLOCK_BYTES = 8 * BLOCK_WORDS
CPU_BLOCKS, DEVICE_BLOCKS = 1 << 5, 1 << 9
"""How many blocks are summed at once: 1 MiB, which stays in a cache; 16 MiB, for few launches."""


def digest_states(states: Iterable[tuple[str, Mapping[str, Tensor]]]) -> dict[str, str]:
    """Digest the tensors of each weight, all on one device: 32 hex digits by name.

    Args:
        states: (name, tensors by kind) of each weight, of any dtypes and shapes. They are taken one weight at a time,
            so tensors that are made when asked for never exist all at once.
    """
    headers: dict[str, bytes] = {}
    blocks: list[int] = []
    sums: _BlockSums | None = None
    for name, tensors in states:
        layout = [(kind, str(tensor.dtype), tuple(tensor.shape)) for kind, tensor in tensors.items()]
        headers[name] = repr((name, layout)).encode()
        blocks.append(-(-sum(tensor.nbytes for tensor in tensors.values()) // BLOCK_BYTES))
        for tensor in tensors.values():
            sums = sums or _BlockSums(tensor.device)
            sums.add(tensor.detach().contiguous().view(-1).view(torch.uint8))
        if sums:
            sums.fill_block()
    found = (sums.take() if sums else torch.empty(0, 2, dtype=torch.int64)).split(blocks)
    reduced = {}
    for (name, header), pairs in zip(headers.items(), found, strict=True):
        hasher = hashlib.blake2b(header, digest_size=16)
        hasher.update(pairs.contiguous().view(-1).view(torch.uint8).numpy().tobytes())
        reduced[name] = hasher.hexdigest()
    return reduced


def _fold_(words: Tensor) -> Tensor:
    """Compute words ^= words >> 32 of unsigned `words` [..., n] int64, contiguous, in place: a bijection."""
    halves = words.view(torch.int32)
    halves[..., ::2].bitwise_xor_(halves[..., 1::2])
    return words


def _pseudo_random(count: int, device: torch.device) -> Tensor:
    """Make `count` fixed numbers: int64, the same on every device."""
    numbers = torch.arange(1, count + 1, device=device)
    for _ in range(3):
        _fold_(numbers.mul_(-0x61C8864680B583EB))
    return numbers


class _BlockSums:
    """The two sums of each block of a stream of bytes."""

    def __init__(self, device: torch.device):
        self._capacity = BLOCK_BYTES * (CPU_BLOCKS if device.type == "cpu" else DEVICE_BLOCKS)
        self._bytes = torch.empty(self._capacity, dtype=torch.uint8, device=device)
        self._padding = torch.zeros(BLOCK_BYTES, dtype=torch.uint8, device=device)
        constants = _pseudo_random(3 * BLOCK_WORDS, device).view(3, BLOCK_WORDS)
        self._a, self._b, self._c = constants[0], constants[1] | 1, constants[2] | 1
        self._waiting: list[Tensor] = []
        self._held = 0
        self._sums: list[Tensor] = []

    def add(self, data: Tensor) -> None:
        """Append bytes: [n] uint8."""
        start = 0
        while start < data.numel():
            part = data[start : start + self._capacity - self._held]
            self._waiting.append(part)
            self._held += part.numel()
            start += part.numel()
            if self._held == self._capacity:
                self._sum()

    def fill_block(self) -> None:
        """Pad the last block with zeros."""
        self.add(self._padding[: -self._held % BLOCK_BYTES])

    def take(self) -> Tensor:
        """Give the sums of all blocks: [blocks, 2] int64 on the CPU."""
        if self._held:
            self._sum()
        return torch.cat(self._sums).cpu() if self._sums else torch.empty(0, 2, dtype=torch.int64)

    def _sum(self) -> None:
        torch.cat(self._waiting, out=self._bytes[: self._held])
        words = self._bytes[: self._held].view(torch.int64).view(-1, BLOCK_WORDS)
        mixed = _fold_(_fold_(words.bitwise_xor_(self._a)).mul_(self._b))
        s = mixed.sum(1)
        self._sums.append(torch.stack((s, mixed.mul_(self._c).sum(1)), 1))
        self._waiting, self._held = [], 0
