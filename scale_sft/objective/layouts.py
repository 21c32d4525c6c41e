"""Choose how pairs are laid out in rows: both sides behind one prompt, if this model's attention can express it."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from scale_sft.data.preference_batches import Block, Layout, block_mask
from scale_sft.model.empty import text_config

PROMPT, SIDE = 5, 6
"""Tokens of the probe."""
_WINDOWS = ("sliding_window", "attention_chunk_size", "window_size")
"""Settings that limit how far attention reaches; a mask of our own would lift the limit."""


def layout_of(
    model: nn.Module, *, row_tokens: int | None, attention: str, pairs: bool, device: torch.device
) -> tuple[Layout, str | None]:
    """Choose the layout of rows, and say why prompts are not shared, if they are not; the same on all ranks.

    Args:
        model: loaded; a sharded one is probed on all ranks together.
        row_tokens: length of packed rows; None: no packing.
        attention: option of that name.
        pairs: whether examples are pairs, which have a prompt to share.
        device: of the model's inputs.
    """
    flat = attention.startswith("flash")
    if not (row_tokens and pairs):
        return Layout(row_tokens=row_tokens, flat=flat), None
    reason = "flash attention takes no mask" if flat else _too_near(model, row_tokens)
    additive = next(model.parameters()).dtype if attention == "eager" else None
    if reason is None and not shares(model, additive, device):
        reason = f"the attention of {type(model).__name__} does not follow a mask of blocks"
    if reason:
        note = f"packing: each side of a pair has a prompt of its own: {reason}"
        return Layout(row_tokens=row_tokens, flat=flat), note
    return Layout(row_tokens=row_tokens, shared=True, additive_mask=additive), None


def _too_near(model: Any, row_tokens: int) -> str | None:
    config = text_config(model.config)
    for name in _WINDOWS:
        reach = getattr(config, name, None)
        if isinstance(reach, int) and reach < row_tokens and getattr(config, "use_sliding_window", True):
            return f"its attention reaches {reach} tokens ({name}), rows have {row_tokens}"
    return None


@torch.no_grad()
def shares(model: Any, additive: torch.dtype | None, device: torch.device) -> bool:
    """Prove that a side behind a shared prompt has the logits that it has alone; a forward pass of a few tokens."""
    vocabulary = text_config(model.config).vocab_size
    prompt, *sides = (
        np.arange(start, start + length) % vocabulary for start, length in ((1, PROMPT), (11, SIDE), (29, SIDE))
    )
    whole = [np.concatenate([prompt, side]) for side in sides]
    labels = np.full(PROMPT + SIDE, -100)
    block = Block.of([(ids, labels) for ids in whole], PROMPT)
    alone = torch.from_numpy(np.stack(whole)).to(device)
    row = {
        name: torch.from_numpy(values)[None].to(device)
        for name, values in (("input_ids", block.ids), ("position_ids", block.positions))
    }
    parts = torch.from_numpy(block.parts)[None].to(device)
    try:
        mask = block_mask(torch.ones_like(parts), parts, additive=additive)
        found: Tensor = model(**row, attention_mask=mask, use_cache=False).logits[0].float()
        expected: Tensor = model(input_ids=alone, use_cache=False).logits[:, PROMPT:].flatten(0, 1).float()
    except (RuntimeError, TypeError, ValueError, IndexError, AttributeError, NotImplementedError, KeyError):
        return False
    tolerance = 1e-3 if next(model.parameters()).dtype is torch.float32 else 5e-2
    return bool((found[PROMPT:] - expected).abs().max() <= tolerance * max(float(expected.abs().max()), 1e-6))
