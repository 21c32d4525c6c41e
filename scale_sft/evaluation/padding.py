"""Prove that a model answers a prompt with padding on its left as it answers the prompt alone."""

from __future__ import annotations

import math
import weakref
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from scale_sft.errors import UserError, first_line
from scale_sft.model.empty import text_config

if TYPE_CHECKING:
    from transformers import GenerationConfig

ONE_BY_ONE = "answers: one prompt at a time, as this model answers otherwise where prompts are padded on the left"
_TOKENS, _PADDING, _STEPS = 5, 3, 3
_TOLERANCE, _TOLERANCE_16_BITS = 1e-3, 5e-2
"""Largest difference of logits, over the largest logit: padding changes the order of sums, and no more."""

_PROVED: weakref.WeakKeyDictionary[nn.Module, bool] = weakref.WeakKeyDictionary()


@torch.no_grad()
def ignores_left_padding(model: Any, settings: GenerationConfig, device: torch.device, *, synced: bool) -> bool:
    """Compare the logits of a few generated tokens with and without padding; the result is kept for the model.

    A model with a recurrent state may read padding as text.

    Args:
        model: out of training mode.
        settings: of greedy decoding; pad_token_id is used.
        device: of the inputs.
        synced: ranks generate together.

    Raises:
        UserError: the model cannot generate.
    """
    if model not in _PROVED:
        rows = text_config(model.config).vocab_size
        long = (torch.arange(_TOKENS + _PADDING, device=device) * 7 + 3).remainder(rows)
        padded = torch.cat([long.new_full((_PADDING,), settings.pad_token_id), long[:_TOKENS]])
        mask = torch.ones(2, len(long), dtype=torch.int64, device=device)
        mask[0, :_PADDING] = 0
        try:
            together = _logits(model, torch.stack([padded, long]), mask, settings, synced)[0]
            alone = _logits(model, long[None, :_TOKENS], mask[:1, _PADDING:], settings, synced)[0]
        except (RuntimeError, ValueError, TypeError, AttributeError, NotImplementedError, IndexError) as error:
            raise UserError(
                f"exact_match_examples: got a base that cannot generate text ({type(model).__name__}: "
                f"{first_line(error)}). Fix: set exact_match_examples and generation_samples to 0"
            ) from None
        whole = model.get_input_embeddings().weight.dtype is torch.float32
        _PROVED[model] = _same(together, alone, _TOLERANCE if whole else _TOLERANCE_16_BITS)
    return _PROVED[model]


def _logits(model: Any, ids: Tensor, mask: Tensor, settings: GenerationConfig, synced: bool) -> Tensor:
    """Return the logits [B, steps, V] fp32 of the generated tokens."""
    from transformers import GenerationConfig

    chosen = GenerationConfig(
        **{**settings.to_diff_dict(), "max_new_tokens": _STEPS, "min_new_tokens": _STEPS, "eos_token_id": None},
    )
    output = model.generate(
        input_ids=ids,
        attention_mask=mask,
        generation_config=chosen,
        synced_gpus=synced,
        output_logits=True,
        return_dict_in_generate=True,
    )
    return torch.stack(output.logits, dim=1).float()


def _same(together: Tensor, alone: Tensor, tolerance: float) -> bool:
    """Compare logits [steps, V] up to the first step at which rounding alone may have chosen another token."""
    for a, b in zip(together, alone, strict=True):
        difference, scale = float((a - b).abs().max()), float(b.abs().max())
        if not math.isfinite(difference) or difference > tolerance * max(scale, 1e-6):
            return False
        if int(a.argmax()) != int(b.argmax()):
            break
    return True
