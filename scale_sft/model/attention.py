"""Choose the implementation of attention for a run."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

EAGER_TOKENS = 256
"""Up to this length eager is faster than sdpa on a CPU in bfloat16: 128 tokens 375 to 506 ms, 256 tokens 436 to 478 ms,
512 tokens 504 to 404 ms (a step of two layers of width 512 on one core)."""


@dataclass(frozen=True)
class Attention:
    """A choice of attention, and what was chosen."""

    asked: str  # what to ask transformers for; auto: sdpa in every part of the model that has it, eager elsewhere
    name: str  # what the model computes with
    note: str | None = None  # for the user: why, where `auto` chose something else than sdpa


def choose_attention(asked: str, model: Any, dtype: torch.dtype, tokens: int, device_type: str) -> Attention:
    """Choose what option attention: auto means for a model: sdpa where it has it, otherwise eager.

    On a CPU in bfloat16, eager is chosen for examples of up to EAGER_TOKENS.

    Args:
        asked: the option.
        model: built with auto, for example by `empty_model`.
        dtype: of the computation.
        tokens: length of the longest example.
        device_type: cpu or cuda.
    """
    if asked != "auto":
        return Attention(asked, asked)
    name = getattr(model.config, "_attn_implementation", None) or "eager"
    if name != "sdpa":
        return Attention("auto", name, f"attention: {name}, as this model has no sdpa")
    if device_type == "cpu" and dtype is torch.bfloat16 and tokens <= EAGER_TOKENS:
        why = f"faster than sdpa on a CPU in bfloat16 up to {EAGER_TOKENS} tokens"
        return Attention("eager", "eager", f"attention: eager, {why}")
    return Attention("auto", name)
