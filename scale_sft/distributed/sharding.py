"""The storage of the frozen base: whole on every rank, or in DeepSpeed ZeRO-3 shards, with one interface.

Shapes: W ranks; a weight of N entries is cut into W flat parts.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from scale_sft.errors import UserError
from scale_sft.files import LAUNCH_FILES
from scale_sft.model.resident import WeightPart

Fingerprints: TypeAlias = dict[str, tuple[int, int]]

DEFAULT_DS_CONFIG = Path(__file__).with_name("zero3.json")
"""The same settings as ds_configs/zero3.json, where a wheel has them too."""


class Replicated:
    """The base is whole on every rank: nothing is gathered, cut, or waited for."""

    sharded = False

    def __init__(self, device: torch.device):
        self.load_device: torch.device | None = device
        """Where a freshly loaded model goes."""

    @contextmanager
    def loading_whole(self) -> Iterator[None]:
        """Do nothing: transformers loads whole models anyway."""
        yield

    def prepare(self, model: nn.Module) -> nn.Module:
        """Return the model, as it is."""
        return model

    @contextmanager
    def materialize(self, weight: Any) -> Iterator[Tensor]:
        """Give the whole weight for the length of the block."""
        yield weight.detach()

    def part_of(self, weight: Any) -> WeightPart:
        """Describe the part of a weight that this rank holds: all of it."""
        return WeightPart.whole(weight)

    def settle(self) -> None:
        """Do nothing: a weight may be written at any time."""

    def written(self) -> None:
        """Do nothing: nobody gathers what was written."""

    def whole(self, fingerprints: Fingerprints, gather: Callable[[Any], list[Any]]) -> Fingerprints:
        """Return the fingerprints of this rank's parts, which are those of the whole weights."""
        return fingerprints


class ZeroShards:
    """The base is cut into ZeRO-3 shards by DeepSpeed: rank r holds entries [r * size, (r + 1) * size) of each weight.

    Args:
        accelerator: Accelerate's, with a DeepSpeed plug-in.
        rank: of this process.
        device: where buffers and gathered weights go.
    """

    sharded = True
    load_device: torch.device | None = None
    """Loading puts a model into its shards already."""

    def __init__(self, accelerator: Any, rank: int, device: torch.device):
        self._accelerator, self._rank, self._device = accelerator, rank, device
        self._engine: Any = None

    @contextmanager
    def loading_whole(self) -> Iterator[None]:
        """Let transformers load a model whole on every rank inside the block.

        A quantised base cannot be loaded into shards, and transformers would refuse to say where it goes.
        """
        from transformers.integrations import deepspeed as integration

        integration.unset_hf_deepspeed_config()
        try:
            yield
        finally:
            integration.set_hf_deepspeed_config(self._accelerator.state.deepspeed_plugin.dschf)

    def prepare(self, model: nn.Module) -> nn.Module:
        """Hand the frozen model to DeepSpeed; returns what forward passes go through."""
        if not all(hasattr(weight, "ds_id") for weight in model.parameters()):
            self._cut(model)
        self._engine = self._accelerator.prepare(model)
        return self._engine.module

    def _cut(self, model: nn.Module) -> None:
        """Cut a model that was loaded whole, weight by weight.

        The engine would first move all of it to the device, which may be too small for it.
        """
        import deepspeed

        config = self._accelerator.state.deepspeed_plugin.dschf.config
        deepspeed.zero.Init(module=model, config_dict_or_path=config)
        for module in model.modules():
            for name, buffer in module.named_buffers(recurse=False):
                setattr(module, name, buffer.to(self._device))

    @contextmanager
    def materialize(self, weight: Any) -> Iterator[Tensor]:
        """Give the whole weight inside a backward pass: ZeRO-3 may have partitioned it since the forward pass."""
        absent = weight.ds_status.name == "NOT_AVAILABLE"
        if absent:
            weight.all_gather()
        try:
            yield weight.detach()
        finally:
            if absent:
                weight.partition()

    def part_of(self, weight: Any) -> WeightPart:
        """Describe the part of a weight that this rank holds; the last rank's shard ends with padding."""
        size = weight.ds_tensor.ds_numel
        start = min(self._rank * size, weight.ds_numel)
        stop = min(start + size, weight.ds_numel)
        return WeightPart(lambda: weight.ds_tensor.data.view(-1)[: stop - start], start, stop)

    def settle(self) -> None:
        """Bring every weight back to its shards: a write into the shard of a gathered weight is lost."""
        if self._engine is not None:
            self._engine.optimizer.partition_all_parameters()

    def written(self) -> None:
        """Wait until writes into shards have arrived.

        DeepSpeed gathers on a CUDA stream of its own, which does not wait for this one.
        """
        if self._engine is not None and self._device.type == "cuda":
            torch.cuda.current_stream(self._device).synchronize()

    def whole(self, fingerprints: Fingerprints, gather: Callable[[Any], list[Any]]) -> Fingerprints:
        """Add up the fingerprints of all ranks' parts, modulo 2^64: those of the whole weights."""
        mask = (1 << 64) - 1
        everyone: list[Mapping[str, tuple[int, int]]] = gather(fingerprints)
        total = lambda name, n: sum(prints[name][n] for prints in everyone) & mask
        return {name: (total(name, 0), total(name, 1)) for name in fingerprints}


Sharding: TypeAlias = Replicated | ZeroShards


# --- DeepSpeed's configuration ------------------------------------------------------------------------------------


def forget_launchers_deepspeed() -> str | None:
    """Take DeepSpeed's settings out of the environment; return the launcher's ds configuration file, if any.

    Whether DeepSpeed runs is decided by `base_placement`, not by the accelerate configuration.
    """
    path = os.environ.get("ACCELERATE_DEEPSPEED_CONFIG_FILE")
    for name in [name for name in os.environ if name.startswith("ACCELERATE_DEEPSPEED_")] + [
        "ACCELERATE_USE_DEEPSPEED",
        "ACCELERATE_CONFIG_DS_FIELDS",
    ]:
        os.environ.pop(name, None)
    return path if path and path.lower() != "none" else None


def deepspeed_plugin(ds_config: str | None, dtype: torch.dtype) -> Any:
    """Make Accelerate's DeepSpeed plug-in for an all-frozen base from a ds configuration file.

    Raises:
        UserError: DeepSpeed is not installed, or see `read_ds_config`.
    """
    try:
        import deepspeed
    except ImportError:
        raise UserError("base_placement: shard needs deepspeed >= 0.19.3: pip install 'deepspeed>=0.19.3'") from None
    from accelerate import DeepSpeedPlugin

    settings = read_ds_config(ds_config)
    settings["bf16"] = {"enabled": dtype is torch.bfloat16}
    settings["train_micro_batch_size_per_gpu"] = 1  # the loop owns its batches; DeepSpeed only wants a number
    settings["gradient_accumulation_steps"] = 1
    settings.pop("train_batch_size", None)
    if not torch.cuda.is_available():
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # it would want a compiler
    return DeepSpeedPlugin(hf_ds_config=settings, zero3_init_flag=True)


def read_ds_config(path: str | None) -> dict[str, Any]:
    """Read a DeepSpeed configuration: the given file, also by the path of a shipped one, or the default ZeRO-3.

    Raises:
        UserError: it is missing, not JSON, not stage 3, or keeps a second copy of the shards (hpZ, NVMe).
    """
    wanted = Path(path).expanduser() if path else DEFAULT_DS_CONFIG
    found = next((place for place in (wanted, LAUNCH_FILES / wanted) if place.is_file()), None)
    if found is None:
        shipped = ", ".join(f"ds_configs/{file.name}" for file in sorted((LAUNCH_FILES / "ds_configs").glob("*.json")))
        raise UserError(f"ds_config: no such file: {wanted}; shipped ones: {shipped}")
    try:
        settings = json.loads(found.read_text(encoding="utf-8"))
        zero = settings["zero_optimization"]
        stage = zero["stage"]
    except (json.JSONDecodeError, KeyError, TypeError) as error:
        raise UserError(f"ds_config: {found}: expected JSON with zero_optimization.stage: {error!r}") from None
    if stage != 3:
        raise UserError(f"ds_config: {found}: zero_optimization.stage is {stage}; a frozen base is sharded by stage 3")
    if zero.get("zero_hpz_partition_size", 1) > 1:
        raise UserError(f"ds_config: {found}: zero_hpz_partition_size keeps a second copy that deltas would not reach")
    if zero.get("offload_param", {}).get("device") == "nvme":
        raise UserError(f"ds_config: {found}: offload_param to nvme is not supported; use cpu")
    return settings
