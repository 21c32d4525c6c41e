"""The base without its weights: its class, and its layers and shapes on the meta device."""

from __future__ import annotations

import copy
from typing import Any

import torch

from scale_sft.errors import UserError, first_line


def model_class(model_config: Any) -> Any:
    """Return the class of transformers that loads a base: for causal language models, or for images and text.

    A vision-language model is loaded whole, even if its language model could be loaded alone: the names in an adapter
    are then those of the model that is served.

    Raises:
        UserError: the base generates no text.
    """
    from transformers import (
        MODEL_FOR_CAUSAL_LM_MAPPING,
        MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
        AutoModelForCausalLM,
        AutoModelForImageTextToText,
    )

    own_code = getattr(model_config, "auto_map", None) or {}
    kind = type(model_config)
    if kind in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING and model_config.get_text_config() is not model_config:
        return AutoModelForImageTextToText
    if kind in MODEL_FOR_CAUSAL_LM_MAPPING or "AutoModelForCausalLM" in own_code:
        return AutoModelForCausalLM
    if kind in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING or "AutoModelForImageTextToText" in own_code:
        return AutoModelForImageTextToText
    found = getattr(model_config, "model_type", kind.__name__)
    raise UserError(
        f"base: got a model of type '{found}', expected one that generates text (a causal language model, or a "
        "vision-language model). Fix: choose another base"
    )


def empty_model(model_config: Any, *, attention: str | None = None, trust_remote_code: bool = False) -> Any:
    """Build the base on the meta device: its layers and shapes, without weights.

    Args:
        model_config: of transformers; stays as it is.
        attention: its implementation; None or auto: sdpa in every part that has it, eager elsewhere.
        trust_remote_code: run code that comes with the base.

    Raises:
        UserError: the base generates no text, lacks the attention, or needs a package that is missing.
    """
    kind = model_class(model_config)
    chosen = None if attention in (None, "auto") else attention
    config = copy.deepcopy(model_config)
    try:
        with torch.device("meta"):
            return kind.from_config(config, attn_implementation=chosen, trust_remote_code=trust_remote_code)
    except ImportError as error:
        if chosen is not None:
            raise UserError(
                f"attention: got {chosen}, expected one that is available here: {first_line(error)} "
                "Fix: --attention auto"
            ) from None
        raise UserError(f"base: this model needs a package that is missing: {first_line(error)}") from None
    except ValueError as error:
        if chosen is None:
            raise UserError(f"base: this model cannot be built from its config.json: {first_line(error)}") from None
        raise UserError(
            f"attention: got {chosen}, expected auto or another that {config.model_type} has: {first_line(error)} "
            "Fix: --attention auto"
        ) from None


def text_config(model_config: Any) -> Any:
    """Return the part of a configuration that describes the language model: all of it, except in wrappers."""
    return model_config.get_text_config() if hasattr(model_config, "get_text_config") else model_config
