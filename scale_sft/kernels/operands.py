"""What all paths to the entries of a weight gradient take.

Shapes: R rows, C columns of a weight; K entries; T tokens. The dense gradient is dW [R, C] = left^T right, with left
[T, R] and right [T, C]: dY and X for `nn.Linear`, X and dY for GPT-2's `Conv1D`.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from ..spiel.entries import Entries

Wanted = Sequence[tuple[Entries, Tensor]]
"""[(entries, out [K] fp32 or bf16), ...]: where the gradient is wanted, and what it is added to."""


def check_operands(left: Tensor, right: Tensor, wanted: Wanted) -> None:
    """Raises ValueError for factors and entries that do not belong together. Nothing waits for the device."""
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
