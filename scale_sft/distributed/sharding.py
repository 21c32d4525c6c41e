"""DeepSpeed ZeRO-3: its configuration, and the plug-in made from it."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import torch

from scale_sft.errors import UserError
from scale_sft.files import LAUNCH_FILES

DEFAULT_DS_CONFIG = Path(__file__).with_name("zero3.json")
"""The same settings as ds_configs/zero3.json, where a wheel has them too."""


def _forget_launchers_deepspeed() -> str | None:
    """Take DeepSpeed's settings out of the environment; returns the launcher's ds configuration file, if any.

    Whether DeepSpeed runs is decided by `base_placement`, not by the accelerate configuration.
    """
    path = os.environ.get("ACCELERATE_DEEPSPEED_CONFIG_FILE")
    for name in [name for name in os.environ if name.startswith("ACCELERATE_DEEPSPEED_")] + [
        "ACCELERATE_USE_DEEPSPEED",
        "ACCELERATE_CONFIG_DS_FIELDS",
    ]:
        os.environ.pop(name, None)
    return path if path and path.lower() != "none" else None


def _deepspeed_plugin(ds_config: str | None, dtype: torch.dtype) -> Any:
    """Accelerate's DeepSpeed plug-in for an all-frozen base from a ds configuration file."""
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
        UserError: it is missing, no JSON, not stage 3, or keeps a second copy of the shards (hpZ, NVMe).
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
