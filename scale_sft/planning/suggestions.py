"""Search for the smallest change of a run that makes it fit."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator

from scale_sft.config.options import Config
from scale_sft.errors import UserError
from scale_sft.model.loading import max_length

from .planner import Plan, Planner

MOST_GPUS = 1024


def smallest_change(planner: Planner, config: Config, *, gpus: int, gpu_memory_gb: float) -> tuple[str, Plan] | None:
    """Find the cheapest change that makes a run fit: its description and plan, or None.

    Changes that cost only time come first (micro-batches, checkpointing, sharding), then more devices, then changes of
    the run itself (4 bits, shorter examples, fewer entries).
    """
    for told, changed, count in _changes(planner, config, gpus):
        try:
            plan = planner.plan(changed, gpus=count, gpu_memory_gb=gpu_memory_gb)
        except UserError:
            continue
        if plan.fits:
            return told, plan
    return None


def _changes(planner: Planner, config: Config, gpus: int) -> Iterator[tuple[str, Config, int]]:
    with_ = lambda base, section, **values: dataclasses.replace(
        base, **{section: dataclasses.replace(getattr(base, section), **values)}
    )
    share = config.run.global_batch_size // gpus
    micro = config.run.micro_batch_size or share
    gentle = config
    while micro > 1:
        micro = max(d for d in range(1, micro) if share % d == 0)
        gentle = with_(config, "run", micro_batch_size=micro)
        yield f"--micro_batch_size {micro}", gentle, gpus
    said = f"--micro_batch_size {micro} " if gentle is not config else ""
    if not config.model.gradient_checkpointing:
        yield "--gradient_checkpointing true", with_(config, "model", gradient_checkpointing=True), gpus
        gentle, said = with_(gentle, "model", gradient_checkpointing=True), f"{said}--gradient_checkpointing true "
        yield said.strip(), gentle, gpus
    if gpus > 1 and config.model.base_placement == "replicate":
        gentle, said = with_(gentle, "model", base_placement="shard"), f"{said}--base_placement shard "
        yield said.strip(), gentle, gpus
    if config.model.quantization == "none":
        yield f"{said}--quantization nf4", with_(gentle, "model", quantization="nf4"), gpus
    for count, told, more in _on_more_devices(gentle, gpus, with_):
        yield f"{said}{told}", more, count
    length = max_length(config.data.max_length, planner.model_config)
    while length > 256:
        length //= 2
        yield f"{said}--max_length {length}", with_(gentle, "data", max_length=length), gpus
    density = config.sparse.density
    thinner = []
    while density and density > 1e-4:
        density /= 2
        thinner.append((f"{said}--density {density:g}", with_(gentle, "sparse", density=density)))
        yield *thinner[-1], gpus
    for told, changed in thinner:
        for count, where, more in _on_more_devices(changed, gpus, with_):
            yield f"{told} {where}", more, count


def _on_more_devices(config: Config, gpus: int, with_: Callable[..., Config]) -> Iterator[tuple[int, str, Config]]:
    """Shard the base over twice, four times ... as many devices, one sequence at a time."""
    while gpus < MOST_GPUS:
        gpus *= 2
        batch = max(config.run.global_batch_size, gpus)
        more = with_(config, "run", global_batch_size=batch, micro_batch_size=1)
        grown = f" --global_batch_size {batch}" if batch != config.run.global_batch_size else ""
        yield gpus, f"--base_placement shard on {gpus} GPUs{grown}", with_(more, "model", base_placement="shard")
