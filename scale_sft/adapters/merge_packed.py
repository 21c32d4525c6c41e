"""Merging an adapter that was trained on a quantised base: dequantise, add, write an unquantised model.

The base is loaded as training loads it, so its values are those that the deltas were trained on; its hash proves it.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from scale_sft.config.options import ModelConfig
from scale_sft.errors import UserError
from scale_sft.files import new_folder, write_atomically, write_json, write_text
from scale_sft.model.fingerprints import combine_fingerprints, fingerprint
from scale_sft.model.loading import base_location, load_base, load_model_config
from scale_sft.model.packed_weights import PackedWeight, PlainWeight, packed_weights
from scale_sft.model.quantization import resolve_quantization
from scale_sft.model.resident import WeightPart
from scale_sft.model.targets import find_targets
from scale_sft.model.transient import add_delta_

from .format import Adapter

SHARD_BYTES = 4 << 30


def merge_quantized(
    adapter_folder: str | Path, output: str | Path, base: str | None = None, dtype: torch.dtype = torch.bfloat16
) -> dict[str, Tensor]:
    """Write dequantised base + adapter as a plain transformers folder in `dtype`; every layer is dequantised.

    Needs memory for the quantised base and one file of 4 GiB. A run that computed in bfloat16 is reproduced bit for
    bit.

    Returns:
        The base values of the active entries, by weight name: [K] in `dtype`.

    Raises:
        UserError: wrong base, unreadable adapter, or an output folder that is not empty.
    """
    adapter, output = Adapter.load(adapter_folder), Path(output)
    config = _model_config(adapter, base)
    with new_folder(output, "merge") as work:
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        reference = unquantized_shapes(config)
        weights, model = _load_packed(config, adapter, device)
        _check_base(weights, adapter, device)
        kept: dict[str, Tensor] = {}

        def value_of(name: str) -> Tensor:
            if name not in weights:
                return model.get_parameter(name).detach()
            weight = weights[name].dequantize(weights[name].module.weight.data)
            if name in adapter.indices:
                indices = adapter.indices[name].to(device)
                kept[name] = weight.view(-1).gather(0, indices).to(dtype).cpu()
                add_delta_(weight, indices, adapter.deltas[name].to(device))
            turned = isinstance(weights[name], PackedWeight) and is_transposed(reference, name)
            return weight.t() if turned else weight

        _write_weights(work, reference, value_of, model, dtype)
        _write_small_files(work, config, dtype)
        if adapter.info.get("chat_template"):
            write_text(work / "chat_template.jinja", adapter.info["chat_template"])
    return kept


def _model_config(adapter: Adapter, base: str | None) -> ModelConfig:
    info = adapter.info
    on_disk = info["quantized_on"] == "disk"
    return ModelConfig(
        base=base or info["base"],
        revision=info.get("revision"),
        dtype=info["dtype"],
        quantization="none" if on_disk else info["quantization"],
        double_quantization=info["double_quantization"],
    )


def _load_packed(config: ModelConfig, adapter: Adapter, device: torch.device):
    """The quantised base, and its weights by name: all packed ones and the adapter's."""
    model_config = load_model_config(config)
    quantization = resolve_quantization(config, model_config)
    if quantization is None:
        raise UserError(f"merge: '{config.base}' is not quantised, but the adapter's base was, on disk; give that base")
    model = load_base(config, model_config, device, quantization)
    weights: dict[str, Any] = packed_weights(model, adapter.dtype, device)
    paths = tuple(name.removesuffix(".weight") for name in adapter.shapes)
    for target in find_targets(model, paths):
        weights.setdefault(target.name, PlainWeight(target.module, target.transposed))
        if adapter.shapes.get(target.name) != target.shape:
            raise UserError(
                f"merge: weight '{target.name}' is {target.shape} in '{config.base}', the adapter says "
                f"{adapter.shapes.get(target.name)}"
            )
    return weights, model


def _check_base(weights: Mapping[str, Any], adapter: Adapter, device: torch.device) -> None:
    prints = {
        name: weights[name].with_state(fingerprint(WeightPart.whole(weights[name].module.weight)))
        for name in adapter.shapes
    }
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
    """The model as it is without quantisation, on the meta device: names and shapes of what is written."""
    from transformers import AutoModelForCausalLM

    model_config = load_model_config(config)
    if hasattr(model_config, "quantization_config"):
        del model_config.quantization_config
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(model_config)


def is_transposed(reference: nn.Module, name: str) -> bool:
    return type(reference.get_submodule(name.removesuffix(".weight"))).__name__ == "Conv1D"


def _write_weights(work: Path, reference: nn.Module, value_of, model: nn.Module, dtype: torch.dtype) -> None:
    """Files of at most SHARD_BYTES, one after the other, each parameter once (tied ones under their first name)."""
    parameters = {name: value.numel() * dtype.itemsize for name, value in reference.named_parameters()}
    every_name = {name for name, _ in reference.named_parameters(remove_duplicate=False)}
    buffers = {name: model.get_buffer(name) for name in reference.state_dict() if name not in every_name}
    shards: list[list[str]] = [[]]
    filled = 0
    for name, size in parameters.items():
        if shards[-1] and filled + size > SHARD_BYTES:
            shards.append([])
            filled = 0
        shards[-1].append(name)
        filled += size
    index = {}
    for number, names in enumerate(shards, start=1):
        tensors = {name: value_of(name).to(dtype).cpu().contiguous() for name in names}
        if number == 1:
            tensors |= {name: value.cpu() for name, value in buffers.items()}
        file = "model.safetensors" if len(shards) == 1 else f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        write_atomically(work / file, lambda path, t=tensors: save_file(t, path, metadata={"format": "pt"}))
        index |= dict.fromkeys(tensors, file)
    if len(shards) > 1:
        content = {"metadata": {"total_size": sum(parameters.values())}, "weight_map": index}
        write_json(work / "model.safetensors.index.json", content)


def _write_small_files(work: Path, config: ModelConfig, dtype: torch.dtype) -> None:
    """Configuration without quantisation, generation settings and tokenizer of the base."""
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
