"""Merge an adapter that was trained on a quantised base: dequantise, add, write an unquantised model.

The base is loaded as training loads it, so its values are those that the deltas were trained on; its hash proves it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from scale_sft.config.options import ModelConfig
from scale_sft.errors import UserError
from scale_sft.files import require_free_bytes, write_atomically, write_json
from scale_sft.model.empty import empty_model
from scale_sft.model.experts import parse_slice
from scale_sft.model.fingerprints import combine_fingerprints, fingerprints_of
from scale_sft.model.held import Held, parts_held
from scale_sft.model.loading import base_location, load_base, load_model_config
from scale_sft.model.packed_weights import PackedWeight, PlainWeight, packed_weights
from scale_sft.model.quantization import resolve_quantization
from scale_sft.model.targets import find_targets
from scale_sft.model.transient import add_delta_

from .base_files import INDEX_FILE, BaseFiles, locate_base
from .format import Adapter, absolute_base

SHARD_BYTES = 4 << 30


def merge_quantized(
    adapter: Adapter, work: Path, base: str | None = None, dtype: torch.dtype = torch.bfloat16
) -> dict[str, Tensor]:
    """Write dequantised base + adapter as a plain transformers folder into `work`; every layer is dequantised.

    Dequantised weights are written in `dtype`; all other tensors keep the bytes that the base's files have. Needs
    memory for the quantised base and one file of 4 GiB. A run that computed in bfloat16 is reproduced bit for bit.

    Returns:
        The base values of the active entries, by weight name: [K] in `dtype`.

    Raises:
        UserError: wrong base, or an unreadable adapter.
    """
    config = _model_config(adapter, base)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    reference = unquantized_shapes(config)
    weights, model = _load_packed(config, adapter, device)
    _check_base(weights, adapter, device)
    kept: dict[str, Tensor] = {}
    slices: dict[str, list[str]] = {}  # of experts, by the parameter that holds them
    for name in adapter.shapes:
        if weights[name].fused is not None:
            slices.setdefault(weights[name].fused.name, []).append(name)
    with BaseFiles(locate_base(adapter, base)) as files:

        def put_in(name: str, weight: Tensor) -> None:
            indices = adapter.indices[name].to(device)
            kept[name] = weight.view(-1).gather(0, indices.long()).to(dtype).cpu()
            add_delta_(weight, indices, adapter.deltas[name].to(device))

        def with_experts(parameter: str) -> Tensor:
            fused = model.get_parameter(parameter).detach().clone()
            for name in slices[parameter]:
                put_in(name, fused[weights[name].number])
            return fused.to(dtype)

        def value_of(name: str) -> Tensor:
            if name in slices:
                return with_experts(name)
            if name not in weights:
                return _as_stored(files, name, model)
            weight = weights[name].dequantize(weights[name].weight.data)
            if name in adapter.shapes:
                put_in(name, weight)
            turned = isinstance(weights[name], PackedWeight) and is_transposed(reference, name)
            return (weight.t() if turned else weight).to(dtype)

        _write_weights(work, reference, value_of)
    _write_small_files(work, config, dtype)
    return kept


def _as_stored(files: BaseFiles, name: str, model: nn.Module) -> Tensor:
    """Read a parameter or buffer from the base's files; as it was loaded where they hold it in another form."""
    path, _, leaf = name.rpartition(".")
    loaded = getattr(model.get_submodule(path), leaf).detach()
    stored = files.find(name)
    if stored is not None:
        found = files.tensor(stored)
        if found.shape == loaded.shape and found.is_floating_point() == loaded.is_floating_point():
            return found
    return loaded


def _model_config(adapter: Adapter, base: str | None) -> ModelConfig:
    info = adapter.info
    on_disk = info["quantized_on"] == "disk"
    return ModelConfig(
        base=absolute_base(base or info["base"]),
        revision=info.get("revision"),
        dtype=info["dtype"],
        quantization="none" if on_disk else info["quantization"],
        double_quantization=info["double_quantization"],
    )


def _load_packed(config: ModelConfig, adapter: Adapter, device: torch.device):
    """Load the quantised base; returns its weights by name (all packed ones and the adapter's) and the model."""
    model_config = load_model_config(config)
    quantization = resolve_quantization(config, model_config)
    if quantization is None:
        raise UserError(f"merge: '{config.base}' is not quantised, but the adapter's base was, on disk; give that base")
    model = load_base(config, model_config, device, quantization)
    weights: dict[str, Any] = packed_weights(model, adapter.dtype, device)
    paths = dict.fromkeys((parse_slice(name) or (name.removesuffix(".weight"),))[0] for name in adapter.shapes)
    for target in find_targets(model, tuple(paths)):
        if target.fused is not None and target.name not in adapter.shapes:
            continue  # another expert of the same parameter
        plain = PlainWeight(target.module, target.transposed, fused=target.fused, number=target.number)
        weights.setdefault(target.name, plain)
        if adapter.shapes.get(target.name) != target.shape:
            raise UserError(
                f"merge: weight '{target.name}' is {target.shape} in '{config.base}', the adapter says "
                f"{adapter.shapes.get(target.name)}"
            )
    return weights, model


def _check_base(weights: Mapping[str, Any], adapter: Adapter, device: torch.device) -> None:
    held = {
        name: Held(weights[name].weight, weights[name].number if weights[name].fused else None)
        for name in adapter.shapes
    }
    own = fingerprints_of(parts_held(held))
    prints = {name: weights[name].with_state(own[name]) for name in adapter.shapes}
    found, expected = combine_fingerprints(prints, adapter.shapes), adapter.info["base_hash"]
    if found == expected:
        return
    where = adapter.info["quantized_on"]
    hint = ""
    if where not in ("disk", device.type):
        hint = f"; it was quantised on {where} and here on {device.type}, which can round differently: merge on {where}"
    raise UserError(
        f"merge: this base is not the one that the adapter was trained on: the hash of its packed target weights is "
        f"{found[:16]}..., expected {expected[:16]}...{hint}"
    )


def unquantized_shapes(config: ModelConfig) -> nn.Module:
    """Build the model without quantisation on the meta device: names and shapes of what is written."""
    model_config = load_model_config(config)
    if hasattr(model_config, "quantization_config"):
        del model_config.quantization_config
    model: nn.Module = empty_model(model_config)
    return model


def is_transposed(reference: nn.Module, name: str) -> bool:
    """True for a weight of GPT-2's Conv1D, which is [I, O]."""
    return type(reference.get_submodule(name.removesuffix(".weight"))).__name__ == "Conv1D"


def _write_weights(work: Path, reference: nn.Module, value_of: Callable[[str], Tensor]) -> None:
    """Write files of at most about SHARD_BYTES, each tensor once (tied ones under their first name)."""
    tied = {name for name, _ in reference.named_parameters(remove_duplicate=False)}
    tied -= {name for name, _ in reference.named_parameters()}
    sizes = {name: value.numel() * 2 for name, value in reference.state_dict().items() if name not in tied}
    require_free_bytes(work, sum(sizes.values()), "merge")
    shards: list[list[str]] = [[]]
    filled = 0
    for name, size in sizes.items():
        if shards[-1] and filled + size > SHARD_BYTES:
            shards.append([])
            filled = 0
        shards[-1].append(name)
        filled += size
    index: dict[str, str] = {}
    total_size = 0
    for number, names in enumerate(shards, start=1):
        tensors = {name: value_of(name).cpu().contiguous() for name in names}
        file = "model.safetensors" if len(shards) == 1 else f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        write_atomically(work / file, partial(save_file, tensors, metadata={"format": "pt"}))
        index |= dict.fromkeys(tensors, file)
        total_size += sum(tensor.nbytes for tensor in tensors.values())
    if len(shards) > 1:
        write_json(work / INDEX_FILE, {"metadata": {"total_size": total_size}, "weight_map": index})


def _write_small_files(work: Path, config: ModelConfig, dtype: torch.dtype) -> None:
    """Write configuration without quantisation, generation settings and tokenizer of the base."""
    from transformers import AutoConfig, AutoTokenizer, GenerationConfig

    location = base_location(config.base)
    model_config = AutoConfig.from_pretrained(location, revision=config.revision)
    if hasattr(model_config, "quantization_config"):
        del model_config.quantization_config
    model_config.dtype = dtype
    model_config.save_pretrained(work)
    with suppress(OSError):  # many models have none
        GenerationConfig.from_pretrained(location, revision=config.revision).save_pretrained(work)
    AutoTokenizer.from_pretrained(location, revision=config.revision).save_pretrained(work)
