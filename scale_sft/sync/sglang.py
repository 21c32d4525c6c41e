"""SGLang: a loader for --custom-weight-loader, and how to send to it.

Start the engine with the loader's import path:

    engine = sglang.Engine(model_path=base, custom_weight_loader=["scale_sft.sync.sglang.load"])
    sync.sglang.send(engine, sync.changed(sparse))

or a server with `--custom-weight-loader scale_sft.sync.sglang.load`. scale_sft is installed where the engine runs. Each
of its processes applies the patches to its part of the weights. With one process, versions and digests are proven as
everywhere; with tensor parallelism, versions only. Written against SGLang 0.5.23; nothing of it is imported.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from .patches import Patches, SyncError
from .receive import apply

LOADER = "scale_sft.sync.sglang.load"
NAME = "scale_sft.patches"


def named_tensors(patches: Patches) -> list[tuple[str, Tensor]]:
    """Pack patches as what `update_weights_from_tensor` takes: one tensor of bytes [n] uint8."""
    return [(NAME, torch.frombuffer(bytearray(patches.to_bytes()), dtype=torch.uint8))]


def load(model: nn.Module, named: Iterable[tuple[str, Tensor]]) -> None:
    """Apply packed patches to a model of SGLang, which calls this with `load_format` set to the path of this function.

    Raises:
        SyncError: a tensor is something else, or see `sync.apply`.
    """
    for name, tensor in named:
        if name != NAME:
            raise SyncError(f"sync: got a tensor '{name[:80]}', expected '{NAME}' made by sync.sglang.named_tensors")
        apply(model, tensor.cpu().numpy().tobytes())


def send(engine: Any, patches: Patches) -> None:
    """Write patches into the weights of an `sglang.Engine`.

    Raises:
        SyncError: the engine refused them.
    """
    session = hasattr(engine, "begin_weight_update")  # newer versions take weights within a session only
    if session:
        _require(engine.begin_weight_update())
    try:
        _require(engine.update_weights_from_tensor(named_tensors(patches), load_format=LOADER))
    finally:
        if session:
            _require(engine.end_weight_update())


def _require(answer: Any) -> None:
    """Raise SyncError for an answer (success, message) without success."""
    success, message = answer if isinstance(answer, tuple) else (getattr(answer, "success", True), answer)
    if success is False:
        raise SyncError(
            f"sync: got '{getattr(message, 'message', message)}' from SGLang, expected success. Fix: restart the "
            "engine, then send sync.full(model)"
        )
