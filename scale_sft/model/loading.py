"""The frozen base: find it, and load its configuration, its tokenizer and its weights.

Any model of Hugging Face that generates text: causal language models, and the text part of vision-language models.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn

from scale_sft.config.options import DEMO, ModelConfig
from scale_sft.errors import UserError, first_line
from scale_sft.files import ASSETS

from .dropout import switch_off_randomness
from .empty import empty_model, model_class, text_config
from .packed_weights import cast_the_rest
from .quantization import Quantization, compute_in
from .reach import PAST_ITS_FORWARD, reach_of


def base_location(base: str) -> str:
    """Resolve a `base` option to a folder or hub id."""
    return str(ASSETS / "demo" / "base") if base == DEMO else base


def load_model_config(config: ModelConfig) -> Any:
    """Load the transformers configuration of the base, without its weights, and switch dropout and jitter off.

    Raises:
        UserError: the model does not exist, or generates no text.
    """
    from transformers import AutoConfig

    location = base_location(config.base)
    if Path(location).is_dir() and not (Path(location) / "config.json").exists():
        raise UserError(f"base: folder '{location}' holds no config.json; expected a transformers model folder")
    try:
        found = AutoConfig.from_pretrained(
            location, revision=config.revision, trust_remote_code=config.trust_remote_code
        )
    except (OSError, ValueError) as error:
        reason = first_line(error)
        raise UserError(
            f"base: '{config.base}' is neither a model folder here nor a model that the hub gave: {reason}"
        ) from None
    model_class(found)
    switch_off_randomness(found)
    found.use_cache = False
    return found


def load_tokenizer(config: ModelConfig) -> Any:
    """Load the base's tokenizer, with the end token as padding token if it has none of its own."""
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(
            base_location(config.base), revision=config.revision, trust_remote_code=config.trust_remote_code
        )
    except (OSError, ValueError) as error:
        raise UserError(f"base: '{config.base}' has no tokenizer that loads: {first_line(error)}") from None
    if tokenizer.pad_token_id is None and tokenizer.eos_token_id is None:
        raise UserError(
            f"base: the tokenizer of '{config.base}' has neither an end nor a padding token, expected one of "
            "them. Fix: set eos_token in its tokenizer_config.json"
        )
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def resolve_dtype(config: ModelConfig, model_config: Any) -> torch.dtype:
    """Choose the dtype of base and computation: as requested, or as the model is stored (float16 becomes bfloat16).

    For a quantised base on a GPU: bfloat16 if the GPU supports it, otherwise float32.
    """
    if config.dtype != "auto":
        return getattr(torch, config.dtype)
    quantized = config.quantization != "none" or getattr(model_config, "quantization_config", None) is not None
    if quantized and torch.cuda.is_available():
        has_bf16 = torch.cuda.is_bf16_supported(including_emulation=False)
        return torch.bfloat16 if has_bf16 else torch.float32
    stored = getattr(model_config, "dtype", None) or torch.float32
    stored = getattr(torch, stored) if isinstance(stored, str) else stored
    return torch.bfloat16 if stored is torch.float16 else stored


def load_base(
    config: ModelConfig, model_config: Any, device: torch.device | None, quantization: Quantization | None = None
) -> nn.Module:
    """Load the pretrained model, frozen, in training mode (which checkpointing requires; dropout is off).

    Args:
        device: the device to put it on; None leaves it where loading put it (shards under ZeRO-3). Required for a
            quantised base, which is quantised there and stays whole until it is cut into shards.
        quantization: the base's quantised format, if any.

    Raises:
        UserError: the weights do not load as a model that generates text.
    """
    silence_progress_bars()
    dtype, arguments = resolve_dtype(config, model_config), {}
    if quantization:
        kept = None if quantization.on_disk else kept_whole(model_config, trust_remote_code=config.trust_remote_code)
        arguments = quantization.loading(device or torch.device("cpu"), dtype, kept)
    try:
        model = model_class(model_config).from_pretrained(
            base_location(config.base),
            config=model_config,
            revision=config.revision,
            dtype=dtype,
            attn_implementation=None if config.attention == "auto" else config.attention,
            trust_remote_code=config.trust_remote_code,
            use_safetensors=True,
            **arguments,
        )
    except (OSError, ValueError, ImportError) as error:
        raise UserError(f"base: '{config.base}' does not load: {first_line(error)}") from None
    except (RuntimeError, TypeError, LookupError, AttributeError) as error:
        if device is not None:
            raise
        raise UserError(  # some models' own initialisation does not expect shards
            f"base_placement: got shard, expected replicate, as transformers cannot load '{model_config.model_type}' "
            f"in ZeRO-3 shards ({type(error).__name__}: {first_line(error)}). Fix: --base_placement replicate"
        ) from None
    model.requires_grad_(False)
    if config.gradient_checkpointing:
        enable_checkpointing(model)
    model.train()
    if quantization:
        if quantization.on_disk:
            cast_the_rest(model, dtype)
        compute_in(model, dtype)
        return model
    return model if device is None else model.to(device)


def kept_whole(model_config: Any, *, trust_remote_code: bool = False) -> list[str] | None:
    """List layers that stay whole when a base is quantised; None: those that transformers keeps anyway.

    Weights that are used past their module's forward stay whole, as nothing would dequantise them there; and those
    whose dtype or data other code reads, to cast their input or to clamp them: it would find packed bytes.
    """
    from transformers.quantizers.base import get_keys_to_not_convert

    model = empty_model(model_config, trust_remote_code=trust_remote_code)
    reach, anyway = reach_of(model), get_keys_to_not_convert(model)
    past = [path for path, why in reach.faults.items() if why == PAST_ITS_FORWARD]
    kept = [path for path in dict.fromkeys((*past, *reach.read)) if path not in anyway]
    return [*anyway, *kept] if kept else None


def silence_progress_bars() -> None:
    """Stop transformers from drawing progress bars ("Loading weights") in the middle of other output."""
    from transformers.utils import logging

    logging.disable_progress_bar()


def enable_checkpointing(model: Any) -> None:
    """Recompute each block in the backward pass (non-reentrant: the reentrant way loses gradients silently).

    Raises:
        UserError: the model cannot.
    """
    if not getattr(model, "supports_gradient_checkpointing", True):
        raise UserError(
            f"gradient_checkpointing: got true, expected false, as {type(model).__name__} cannot recompute its blocks. "
            "Fix: leave it out, and lower micro_batch_size to save memory"
        )
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable({"use_reentrant": False})  # the second name is for earlier versions


DEFAULT_MAX_LENGTH = 2048


def max_length(wanted: int | None, model_config: Any) -> int:
    """Resolve the longest example in tokens: as requested, or 2,048 (section 4.3) if the base has as many positions."""
    positions = getattr(text_config(model_config), "max_position_embeddings", None)
    if wanted and positions and wanted > positions:
        raise UserError(f"max_length: got {wanted}, but the base has positions for {positions} tokens only")
    return wanted or min(DEFAULT_MAX_LENGTH, positions or DEFAULT_MAX_LENGTH)
