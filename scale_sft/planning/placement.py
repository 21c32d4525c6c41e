"""Decide whether the base is replicated or sharded."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from scale_sft.config.options import Config
from scale_sft.distributed.world import World
from scale_sft.model.quantization import Quantization

from .footprint import ACTIVATION_RESERVE_FRACTION, GIB, Footprint, footprint


@dataclass(frozen=True)
class Placement:
    """The placement of the base, and the reason for it."""

    sharded: bool
    reason: str
    base_bytes: int | None = None  # of a whole quantised base: the bytes that loading it takes on every rank

    @property
    def name(self) -> str:
        return "shard" if self.sharded else "replicate"


def choose_placement(
    config: Config, model_config: Any, dtype: torch.dtype, world: World, quantization: Quantization | None = None
) -> Placement:
    """Replicate the base if it and its training state fit a device, otherwise shard it.

    A quantised base that fits is replicated too: a step then moves only the gradients of the deltas, and gathering even
    4 bits per weight moves far more. Every rank loads the whole of a base that transformers quantises before DeepSpeed
    cuts it into shards; the reason mentions this.
    """
    asked = config.model.base_placement
    if asked != "auto" and quantization is None:
        return Placement(asked == "shard", "as asked for by base_placement")
    needs = footprint(config, model_config, dtype, quantization)
    if quantization:
        return _place_quantized(asked, needs, world)
    need = needs.total
    room = int(world.device_memory_bytes() * (1 - ACTIVATION_RESERVE_FRACTION))
    figures = f"base and training state need {need / GIB:.2f} GiB, a device has {room / GIB:.2f} GiB for them"
    if need <= room:
        return Placement(False, f"auto: {figures}")
    if world.size == 1:
        return Placement(False, f"auto: {figures}, but one process cannot shard; it may not fit")
    return Placement(True, f"auto: {figures}")


def _place_quantized(asked: str, needs: Footprint, world: World) -> Placement:
    whole = f"each rank loads the whole quantised base, {needs.base / GIB:.2f} GiB, before it is cut into shards"
    if asked != "auto":
        sharded = asked == "shard"
        return Placement(sharded, "as asked for by base_placement" + (f"; {whole}" if sharded else ""), needs.base)
    room = int(world.device_memory_bytes() * (1 - ACTIVATION_RESERVE_FRACTION))
    figures = (
        f"the quantised base ({needs.base / GIB:.2f} GiB) and its training state need {needs.total / GIB:.2f} GiB, a "
        f"device has {room / GIB:.2f} GiB for them"
    )
    if needs.total <= room:
        return Placement(False, f"auto: {figures}; replicated, it moves no weights in a step", needs.base)
    if world.size == 1:
        return Placement(False, f"auto: {figures}, but one process cannot shard; it may not fit", needs.base)
    return Placement(True, f"auto: {figures}; {whole}", needs.base)
