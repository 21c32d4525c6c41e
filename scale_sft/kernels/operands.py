"""The arguments of all paths to a weight gradient's entries, and of all updates that write a weight.

Shapes: R rows, C columns of a weight; K entries; T tokens. The dense gradient is dW [R, C] = left^T right, with left
[T, R] and right [T, C]: dY and X for `nn.Linear`, X and dY for GPT-2's `Conv1D`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from scale_sft.spiel.indices import Entries

Wanted = Sequence[tuple[Entries, Tensor]]
"""[(entries, out [K] fp32 or bf16), ...]: the entries wanted, and the tensors to add their gradient to."""


def check_operands(left: Tensor, right: Tensor, wanted: Wanted) -> None:
    """Raise ValueError for factors and entries that do not match, without waiting for the device."""
    if left.dim() != 2 or right.dim() != 2 or left.shape[0] != right.shape[0] or left.dtype != right.dtype:
        raise ValueError(
            f"factors of a weight gradient: got {tuple(left.shape)} {left.dtype} and {tuple(right.shape)} "
            f"{right.dtype}, expected [T, R] and [T, C] of one dtype"
        )
    for entries, out in wanted:
        if tuple(entries.shape) != (left.shape[1], right.shape[1]):
            raise ValueError(f"entries of a weight {entries.shape}: the factors give {left.shape[1], right.shape[1]}")
        if out.shape != (entries.count,) or not out.is_contiguous():
            raise ValueError(f"gradients of {entries.count} entries: got {tuple(out.shape)}, expected them contiguous")


@dataclass(frozen=True)
class Written:
    """The weight that an update writes into: all of it, or the flat part [start, start + P) of a ZeRO-3 shard."""

    weight: Tensor  # contiguous; its P entries start at `start` of the flattened weight
    base: Tensor  # [E] in the weight's dtype: base values of the entries in the part, in order
    start: int = 0  # flat index of the part's first entry
    first: int = 0  # number of entries before the part


def check_written(written: Written | None, entries: Entries) -> None:
    """Raise ValueError for a part that cannot be one of this weight's, without waiting for the device."""
    if written is None:
        return
    if not written.weight.is_contiguous() or written.weight.dtype is not written.base.dtype:
        raise ValueError(
            f"weight to write: got {written.weight.dtype}, contiguous: {written.weight.is_contiguous()}; expected a "
            f"contiguous part in the dtype of its base values, {written.base.dtype}"
        )
    if written.first < 0 or written.first + written.base.numel() > entries.count:
        raise ValueError(
            f"base values: got {written.base.numel()} from entry {written.first} on, but there are {entries.count}"
        )
