"""A base in 4 or 8 bits (section 3.4): its format, and the arguments to load it.

bitsandbytes stores a weight as packed bytes and a small state of scales. The packed bytes are a parameter, which ZeRO-3
may cut into shards; the state stays whole on every rank. Indices, budgets and counts refer to the dequantised weight.
Shapes: O out, I in of the dequantised weight; P packed entries.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from importlib import metadata
from logging import ERROR, getLogger
from typing import Any

import torch
from torch import nn

from scale_sft.config.options import ModelConfig
from scale_sft.errors import UserError

from .packed_weights import BLOCK_ENTRIES, FOUR_BIT_LAYERS, SCALES_PER_BLOCK

OLDEST_BITSANDBYTES = (0, 48)


@dataclass(frozen=True)
class Quantization:
    """The storage format of a base's linear layers."""

    kind: str  # nf4, fp4 or int8
    double: bool  # the scales are quantised too (4 bits only)
    storage: torch.dtype  # of the packed parameter
    on_disk: bool  # the base is stored like this; otherwise it is quantised while it is loaded

    def __str__(self) -> str:
        twice = ", double quantised" if self.double and self.kind != "int8" else ""
        return self.kind + twice + (" on disk" if self.on_disk else "")

    def description(self, device: torch.device) -> dict[str, Any]:
        """Describe it for adapter_config.json; the bytes depend on the kind of device where a base was quantised."""
        return {
            "quantization": self.kind,
            "double_quantization": self.double,
            "quantized_on": "disk" if self.on_disk else device.type,
        }

    @property
    def bytes_per_entry(self) -> float:
        """Bytes of one entry of a weight, scales included (one scale per row in 8 bits is negligible)."""
        if self.kind == "int8":
            return 1.0
        scale = 1 + 4 / SCALES_PER_BLOCK if self.double else 4
        return 0.5 + scale / BLOCK_ENTRIES

    @property
    def state_bytes_per_entry(self) -> float:
        """The part of `bytes_per_entry` that every rank keeps, even of a sharded base."""
        return 0.0 if self.kind == "int8" else self.bytes_per_entry - 0.5

    def loading(self, device: torch.device, dtype: torch.dtype, kept: list[str] | None = None) -> dict[str, Any]:
        """Return arguments for `from_pretrained`; weights are quantised on `device`, one after the other.

        Args:
            device: where.
            dtype: of the computation, also in layers that bitsandbytes itself runs.
            kept: paths of layers that stay whole; None: the output layer, and what the model names.
        """
        where = {"device_map": {"": str(device)}}
        if self.on_disk:
            return where
        from transformers import BitsAndBytesConfig

        if self.kind == "int8":
            return {**where, "quantization_config": BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=kept)}
        settings = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_compute_dtype=dtype,
            bnb_4bit_quant_type=self.kind,
            bnb_4bit_use_double_quant=self.double,
            bnb_4bit_quant_storage=self.storage,
            llm_int8_skip_modules=kept,
        )
        return {**where, "quantization_config": settings}


def compute_in(model: nn.Module, dtype: torch.dtype) -> None:
    """Make the 4-bit layers that bitsandbytes itself runs compute in `dtype`, in place.

    A base that names no dtype gets float32 from transformers, which makes a step on a GPU several times as long.
    """
    for module in model.modules():
        if type(module).__name__ in FOUR_BIT_LAYERS:
            layer: Any = module
            layer.compute_dtype, layer.compute_type_is_set = dtype, True


def resolve_quantization(config: ModelConfig, model_config: Any) -> Quantization | None:
    """Choose the base's format from the options and its stored format; None: not quantised.

    Raises:
        UserError: bitsandbytes is missing or too old, or the base is stored in a format that cannot be dequantised here
            or that is not the requested one.
    """
    stored = getattr(model_config, "quantization_config", None)
    if stored is None:
        if config.quantization == "none":
            return None
        require_bitsandbytes()
        return Quantization(config.quantization, config.double_quantization, torch.uint8, on_disk=False)
    stored = stored if isinstance(stored, Mapping) else stored.to_dict()
    method = stored.get("quant_method", "bitsandbytes")
    method = str(getattr(method, "value", method))
    eight = bool(stored.get("load_in_8bit"))
    if not method.startswith("bitsandbytes") or stored.get("llm_int8_has_fp16_weight"):
        raise UserError(
            f"base: '{config.base}' is stored quantised by '{method}', whose layers cannot be dequantised here; "
            "expected bitsandbytes in 4 or 8 bits. Take the unquantised base, with quantization nf4 if memory is short"
        )
    kind = "int8" if eight else stored.get("bnb_4bit_quant_type", "fp4")
    if config.quantization not in ("none", kind):
        raise UserError(
            f"quantization: got {config.quantization}, but '{config.base}' is stored in {kind} already; leave the "
            "option out, or take the unquantised base"
        )
    require_bitsandbytes()
    storage = stored.get("bnb_4bit_quant_storage", "uint8")
    storage = getattr(torch, storage) if isinstance(storage, str) else storage
    return Quantization(
        kind, bool(stored.get("bnb_4bit_use_double_quant")), torch.int8 if eight else storage, on_disk=True
    )


def require_bitsandbytes() -> None:
    """Raise UserError if bitsandbytes is missing or older than this module requires."""
    wanted = ".".join(map(str, OLDEST_BITSANDBYTES))
    remedy = f"pip install 'bitsandbytes>={wanted}', or leave quantization at none"
    try:
        version = metadata.version("bitsandbytes")
    except metadata.PackageNotFoundError:
        raise UserError(f"quantization: needs bitsandbytes >= {wanted}, which is not installed: {remedy}") from None
    getLogger("bitsandbytes.backends.cpu.ops").setLevel(ERROR)  # it recommends a kernel that is not used here
    found = tuple(int(part) for part in version.split(".")[:2])
    if found < OLDEST_BITSANDBYTES:
        raise UserError(f"quantization: needs bitsandbytes >= {wanted}, found {version}: {remedy}")


def refuse_corrupting_storage(quantization: Quantization, dtype: torch.dtype) -> None:
    """Refuse to shard packed bytes that DeepSpeed's engine, which casts floating-point parameters, would corrupt.

    DeepSpeed 0.19.8 spares weights that are cut before the engine sees them, but nothing guarantees that.

    Raises:
        UserError: the packed bytes are stored as floating-point numbers of another dtype than the computation's.
    """
    storage = quantization.storage
    if not storage.is_floating_point or storage is dtype:
        return
    raise UserError(
        f"base_placement: shard could destroy this base: its 4-bit weights are stored as {_name(storage)} "
        f"(bnb_4bit_quant_storage), which DeepSpeed may cast to {_name(dtype)}, the dtype of the run. Use "
        f"base_placement replicate, or quantise the original base with bnb_4bit_quant_storage uint8"
    )


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def staging_device(device: torch.device, base_bytes: int) -> torch.device:
    """Choose where a quantised base is whole before it is sharded: on the GPU if it fits there, else in main memory.

    The choice depends on the GPU's total memory, not on what is free: every rank must quantise in the same place.

    Args:
        base_bytes: of the whole quantised base.
    """
    if device.type != "cuda":
        return device
    total = torch.cuda.get_device_properties(device).total_memory
    return device if 1.4 * base_bytes < total else torch.device("cpu")
