"""The frozen base: find it, load it, choose its target weights, and route their layers through taps.

Any Hugging Face causal language model whose layers are `nn.Linear`, GPT-2's `Conv1D` (transposed weight), or either of
them quantised by bitsandbytes.
"""

from __future__ import annotations

import re
from collections import Counter
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from .config import DEMO, ModelConfig
from .errors import UserError
from .quantized import Quantization, cast_the_rest, is_quantized_layer
from .spiel.linear import Materialize, Record, WeightTap, attach

PACKAGE = Path(__file__).parent


@dataclass(frozen=True)
class Target:
    """One layer whose weight gets a sparse delta."""

    name: str  # of the weight, as in the state dict: "model.layers.0.mlp.up_proj.weight"
    module: nn.Module
    shape: tuple[int, int]  # of the weight: (out, in); (in, out) for Conv1D; dequantised where it is quantised
    transposed: bool

    @property
    def numel(self) -> int:
        return self.shape[0] * self.shape[1]


def base_location(base: str) -> str:
    """The folder or hub id behind a `base` option."""
    return str(PACKAGE / "demo" / "base") if base == DEMO else base


def load_model_config(config: ModelConfig) -> Any:
    """The transformers configuration of the base, without its weights; dropout switched off.

    Differs from what transformers would do in training mode: a frozen base under sparse deltas is trained without
    dropout (the paper uses none for SFT), so that a step depends on nothing but its batch.

    Raises:
        UserError: there is no such model, or it is not a causal language model.
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
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise UserError(
            f"base: '{config.base}' is neither a model folder here nor a model that the hub gave: {reason}"
        ) from None
    for key, value in found.to_dict().items():
        if "drop" in key and isinstance(value, float):
            setattr(found, key, 0.0)
    found.use_cache = False
    return found


def load_tokenizer(config: ModelConfig) -> Any:
    """The tokenizer of the base, with a padding token (the end token where it has none of its own)."""
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(
            base_location(config.base), revision=config.revision, trust_remote_code=config.trust_remote_code
        )
    except (OSError, ValueError) as error:
        raise UserError(f"base: '{config.base}' has no tokenizer that loads: {str(error).splitlines()[0]}") from None
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def resolve_dtype(config: ModelConfig, model_config: Any) -> torch.dtype:
    """The dtype of base and computation: as asked for, or as the model is stored (float16 becomes bfloat16).

    Of a quantised base on a GPU: bfloat16 where the GPU computes in it, otherwise float32.
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
    """The pretrained model, frozen, in training mode (checkpointing needs it; there is no dropout).

    Args:
        device: where to put it; None leaves it where loading put it (shards under ZeRO-3). A quantised base needs one:
            it is quantised there, and lies there whole until it is cut into shards.
        quantization: how the base is kept, if not in its dtype.
    Raises:
        UserError: the weights do not load as a causal language model.
    """
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()

    dtype = resolve_dtype(config, model_config)
    try:
        model = AutoModelForCausalLM.from_pretrained(
            base_location(config.base),
            config=model_config,
            revision=config.revision,
            dtype=dtype,
            attn_implementation=config.attention,
            trust_remote_code=config.trust_remote_code,
            use_safetensors=True,
            **(quantization.loading(device) if quantization else {}),
        )
    except (OSError, ValueError, ImportError) as error:
        raise UserError(f"base: '{config.base}' does not load: {str(error).splitlines()[0]}") from None
    model.requires_grad_(False)
    if config.gradient_checkpointing:
        enable_checkpointing(model)
    model.train()
    if quantization:
        if quantization.on_disk:
            cast_the_rest(model, dtype)
        return model
    return model if device is None else model.to(device)


def enable_checkpointing(model: nn.Module) -> None:
    """Recompute each block in the backward pass (non-reentrant: the reentrant way loses gradients silently)."""
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable({"use_reentrant": False})  # the second name is that of earlier versions


def find_targets(model: nn.Module, wanted: tuple[str, ...] | str | None) -> list[Target]:
    """The layers to train, in the model's order.

    Args:
        wanted: None for all linear layers inside the transformer blocks; names (a module path or its end); or one
            regular expression that matches whole module paths.
    Raises:
        UserError: a name matches nothing, a layer is of an unsupported kind, or its weight is shared (tied).
    """
    layers = {path: module for path, module in model.named_modules() if _is_matrix_layer(module)}
    if wanted is None:
        inside = {path: module for path, module in layers.items() if re.search(r"\.\d+\.", path)}
        # a kind of nn.Linear that cannot carry a delta is told below, not passed over
        chosen = {
            path: module for path, module in inside.items() if _supported(module) or isinstance(module, nn.Linear)
        }
    else:
        chosen = _choose(layers, wanted)
    if not chosen:
        raise UserError(f"target_modules: this model has no linear layers in its blocks; layers: {_listing(layers)}")
    unsupported = [path for path, module in chosen.items() if not _supported(module)]
    if unsupported:
        kinds = ", ".join(sorted({type(chosen[path]).__name__ for path in unsupported}))
        raise UserError(
            f"target_modules: '{unsupported[0]}' is a {kinds} layer; only nn.Linear and Conv1D, as they are or in 4 or "
            "8 bits of bitsandbytes, can carry a delta"
        )
    owners = Counter(id(weight) for _, weight in model.named_parameters(remove_duplicate=False))
    for path, module in chosen.items():
        if owners[id(module.weight)] > 1:
            raise UserError(
                f"target_modules: the weight of '{path}' is tied to another layer (usually the embeddings), which "
                "would change with it; leave it out"
            )
    return [
        Target(
            name=f"{path}.weight",
            module=module,
            shape=_shape(module),
            transposed=_is_conv1d(module),
        )
        for path, module in chosen.items()
    ]


def attach_taps(targets: list[Target], record: Record, materialize: Materialize = nullcontext) -> None:
    """Route the targets' layers through taps that offer each weight gradient to `record`."""
    for target in targets:
        tap = WeightTap(target.module, target.name, record, transposed=target.transposed, materialize=materialize)
        attach(tap)


def _shape(module: nn.Module) -> tuple[int, int]:
    """Of the weight: whole where it is sharded, dequantised where it is packed."""
    if is_quantized_layer(module):
        return (module.out_features, module.in_features)
    return tuple(getattr(module.weight, "ds_shape", module.weight.shape))


def _is_conv1d(module: nn.Module) -> bool:
    return type(module).__name__ == "Conv1D"


def _is_matrix_layer(module: nn.Module) -> bool:
    weight = getattr(module, "weight", None)
    if not isinstance(weight, nn.Parameter) or isinstance(module, nn.Embedding):
        return False
    return len(getattr(weight, "ds_shape", weight.shape)) == 2


def _supported(module: nn.Module) -> bool:
    return type(module) is nn.Linear or _is_conv1d(module) or is_quantized_layer(module)


def _choose(layers: dict[str, nn.Module], wanted: tuple[str, ...] | str) -> dict[str, nn.Module]:
    names = (wanted,) if isinstance(wanted, str) else wanted
    chosen: set[str] = set()
    for name in names:
        matches = {path for path in layers if path == name or path.endswith("." + name)}
        if not matches and isinstance(wanted, str):
            try:
                matches = {path for path in layers if re.fullmatch(wanted, path)}
            except re.error as error:
                raise UserError(f"target_modules: '{wanted}' is no regular expression: {error}") from None
        if not matches:
            raise UserError(f"target_modules: '{name}' matches no layer; this model has {_listing(layers)}")
        chosen |= matches
    return {path: module for path, module in layers.items() if path in chosen}


def _listing(layers: dict[str, nn.Module]) -> str:
    """The kinds of layers there are: 'q_proj (8x), ...'."""
    counts = Counter(path.rsplit(".", 1)[-1] for path in layers)
    return ", ".join(f"{leaf} ({count}x)" for leaf, count in counts.items()) or "none"
