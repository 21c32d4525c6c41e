"""Fuse an optimizer step on all deltas with their write: each weight's state is read and written once.

The result is that of `SparseFineTuning.update` followed by the carrier's `write`, up to the last bit of products that
torch fuses with sums (see `gpu.updates`). Transient deltas are not in the weights: their state is updated in one pass,
and nothing is written.
"""

from __future__ import annotations

import torch
from torch import Tensor

from scale_sft.kernels.backends import triton_used
from scale_sft.kernels.cpu import compile as native
from scale_sft.kernels.operands import Written
from scale_sft.spiel.algorithm import SparseFineTuning
from scale_sft.spiel.moments import DenseMoment
from scale_sft.spiel.optimizers import SM3, AdamW

from .resident import ResidentDeltas
from .transient import TransientDeltas


def wanted(kernels: str, device: torch.device) -> bool:
    """Return True if deltas should be updated and written in one pass, where that is possible."""
    return native.asked_for(device, kernels) or triton_used(device, kernels)


def why_not(tuning: SparseFineTuning, carrier: ResidentDeltas | TransientDeltas) -> str | None:
    """Explain why their step cannot be fused, or return None if it can."""
    if tuning.settings.scale_rates:
        return "updates are scaled by the entries in row and column"
    if tuning.store.device.type == "cpu" and (reason := native.why_not()):
        return reason
    parts = carrier.parts.values() if isinstance(carrier, ResidentDeltas) else ()
    if any(part.entries().device != tuning.store.device for part in parts):
        return "the weights are elsewhere than their deltas"
    optimizer = tuning.optimizer
    moments = (optimizer.exp_avg, optimizer.exp_avg_sq) if isinstance(optimizer, AdamW) else ()
    if tuning.store.device.type == "cpu" and any(part.entries().dtype is torch.float16 for part in parts):
        return "the weights are float16, which the kernels for CPUs do not know"
    if not all(isinstance(moment, DenseMoment) for moment in moments):
        return "the moments are kept in codes"
    return None


def update_and_write(tuning: SparseFineTuning, carrier: ResidentDeltas | TransientDeltas, learning_rate: float) -> None:
    """Move all deltas, add one term to the candidates' estimates, and write the effective values into the weights.

    Gradients are those of the recorder, summed over ranks and clipped. This does not wait for the device.
    """
    tuning.recorder.end_step()
    carrier.settle()
    resident = carrier if isinstance(carrier, ResidentDeltas) else None
    if tuning.store.device.type == "cpu":
        from scale_sft.kernels.cpu.updates import adamw_write, sm3_write
    else:
        from scale_sft.kernels.gpu.updates import adamw_write, sm3_write
    optimizer, store = tuning.optimizer, tuning.store
    decay = 1 - learning_rate * optimizer.weight_decay
    table = optimizer.count_gradient(learning_rate) if isinstance(optimizer, AdamW) else None
    old_columns: dict[str, dict[str, Tensor]] = {}
    if isinstance(optimizer, SM3) and store.device.type != "cpu":  # one copy of all instead of one in each call
        copies = optimizer.columns.clone().split([delta.shape[1] for delta in store])
        old_columns = {name: {"old_col": copy} for name, copy in zip(store.names, copies, strict=True)}
    for delta, gradients in zip(store, _of_each(tuning), strict=True):
        state, deltas, entries = optimizer.state_of(delta.name), delta.deltas, delta.entries
        written = Written(*resident.held(delta.name)) if resident else None
        if table is None or not isinstance(optimizer, AdamW):
            sm3_write(
                deltas,
                gradients,
                state["row"],
                state["col"],
                learning_rate=learning_rate,
                decay=decay,
                eps=optimizer.eps,
                entries=entries,
                written=written,
                **old_columns.get(delta.name, {}),
            )
            continue
        adamw_write(
            deltas,
            gradients,
            state["exp_avg"],
            state["exp_avg_sq"],
            delta.cohort,
            table[0],
            table[1],
            decay=decay,
            betas=optimizer.betas,
            eps=optimizer.eps,
            entries=entries,
            written=written,
        )
    if resident:
        resident.written()


def _of_each(tuning: SparseFineTuning) -> tuple[Tensor, ...]:
    return tuning.recorder.gradients.split([delta.active for delta in tuning.store])
