"""Drop and grow of one weight on a CPU, in C: the same names and results as the functions of `spiel.drop_grow`.

Those functions handle everything else: other devices, and weights of more than 2^31 entries.
Shapes: K active entries, C candidates, k up for replacement; O rows, I columns.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from scale_sft.spiel import drop_grow as reallocate
from scale_sft.spiel.drop_grow import Exchange

from .compile import library


def exchange_by_gradient(indices: Tensor, scores: Tensor, candidates: Tensor, mean: Tensor, k: int) -> Exchange:
    """Drop and grow by gradient (SFT-AG): see `spiel.drop_grow.exchange_by_gradient`."""
    active, count = indices.numel(), candidates.numel()
    if not _in_c(indices, k, candidates, floats=(mean,)):
        return reallocate.exchange_by_gradient(indices, scores, candidates, mean, k)
    scores = scores.float().contiguous()
    kept, order, keys = _rooms(active, max(active, count))
    grown, grown_candidates = torch.empty(k, dtype=torch.int32), torch.empty(k, dtype=torch.int64)
    places = torch.empty(count, dtype=torch.int32)
    growing = library().exchange_by_gradient(
        *(indices.data_ptr(), scores.data_ptr(), active, candidates.data_ptr(), mean.data_ptr(), count, k),
        *(kept.data_ptr(), grown.data_ptr(), grown_candidates.data_ptr(), order.data_ptr()),
        *(keys.data_ptr(), places.data_ptr()),
    )
    return Exchange(kept=kept, grown=grown[:growing], order=order, grown_candidates=grown_candidates[:growing])


def exchange_by_accumulators(indices: Tensor, scores: Tensor, row: Tensor, col: Tensor, k: int) -> Exchange:
    """Drop and grow by accumulators (SFT-MA): see `spiel.drop_grow.exchange_by_accumulators`."""
    if not _in_c(indices, k, floats=(row, col)):
        return reallocate.exchange_by_accumulators(indices, scores, row, col, k)
    active, height, width = indices.numel(), row.numel(), col.numel()
    k = min(k, height * width - active)
    scores = scores.float().contiguous()
    rows, (columns, column_order) = row.sort(descending=True).values, col.sort(descending=True)
    kept, order, keys = _rooms(active, active)
    grown, marks = torch.empty(k, dtype=torch.int32), torch.empty(2 * -(-width // 64), dtype=torch.int64)
    library().exchange_by_accumulators(
        *(indices.data_ptr(), scores.data_ptr(), active),
        *(row.data_ptr(), rows.data_ptr(), height),
        *(col.data_ptr(), columns.data_ptr(), column_order.data_ptr(), width, k),
        *(kept.data_ptr(), grown.data_ptr(), order.data_ptr()),
        *(keys.data_ptr(), marks.data_ptr()),
    )
    return Exchange(kept=kept, grown=grown, order=order)


def _in_c(indices: Tensor, k: int, *others: Tensor, floats: Sequence[Tensor]) -> bool:
    """Return True if the C code can read these tensors: int32 or fp32, on a CPU, contiguous."""
    dtypes = [(tensor, torch.int32) for tensor in (indices, *others)] + [(tensor, torch.float32) for tensor in floats]
    known = all(t.device.type == "cpu" and t.dtype is dtype and t.is_contiguous() for t, dtype in dtypes)
    return known and 0 <= k <= indices.numel()


def _rooms(active: int, keys: int) -> tuple[Tensor, Tensor, Tensor]:
    """Allocate kept and order, which are results, and a buffer for keys."""
    kept, order = torch.empty(active, dtype=torch.bool), torch.empty(active, dtype=torch.int64)
    return kept, order, torch.empty(keys, dtype=torch.int32)
