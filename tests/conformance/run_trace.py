"""Replay a trace of the algorithm through the project's own store, recorder, optimizer and reallocation.

    python tests/conformance/run_trace.py TRACE.safetensors
    accelerate launch --config_file launch/cpu_zero3_2proc.yaml tests/conformance/run_trace.py TRACE.safetensors --shard

A trace records, for a tiny Llama: weights, batches, initial indices, and indices and deltas after some steps. Its
metadata names every hyper-parameter. Prints, for each recorded step, the index overlap and the largest delta error;
exits with 1 on a mismatch.
"""

from __future__ import annotations

import json
import math
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import click
import torch
from safetensors import safe_open
from torch import Tensor

from scale_sft.config.options import ModelConfig
from scale_sft.data.micro_batches import micro_batches
from scale_sft.distributed.cluster import Cluster
from scale_sft.distributed.exit import end_process
from scale_sft.errors import UserError
from scale_sft.kernels.backends import exchanges_of
from scale_sft.model.loading import load_base, load_model_config
from scale_sft.model.loss import token_loss_sum
from scale_sft.model.resident import ResidentDeltas
from scale_sft.model.targets import attach_taps, find_targets
from scale_sft.spiel.algorithm import SparseFineTuning
from scale_sft.spiel.deltas import DeltaStore
from scale_sft.spiel.schedules import ReallocationSchedule
from scale_sft.spiel.settings import Backends, MethodSettings


@dataclass(frozen=True)
class Trace:
    """The tensors of a trace file by their names, and its metadata, read as JSON where it is JSON."""

    tensors: dict[str, Tensor]
    settings: dict[str, Any]

    @classmethod
    def read(cls, path: Path) -> Trace:
        with safe_open(path, "pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            settings = {key: _parsed(value) for key, value in file.metadata().items()}
        return cls(tensors, settings)

    def group(self, prefix: str) -> dict[str, Tensor]:
        return {key.removeprefix(prefix): value for key, value in self.tensors.items() if key.startswith(prefix)}

    def recorded_steps(self) -> list[int]:
        return sorted({int(key[4:].split("/")[0]) for key in self.tensors if key.startswith("step")})


def _parsed(value: str) -> Any:
    try:
        return json.loads(value)
    except json.JSONDecodeError:
        return value


def write_base(trace: Trace, folder: str) -> None:
    """The trace's model as a transformers folder, so that it is loaded as any base is."""
    from transformers import LlamaConfig, LlamaForCausalLM

    model = LlamaForCausalLM(LlamaConfig(**trace.settings["model_config"]))
    missing, unexpected = model.load_state_dict(trace.group("weights/"), strict=False)
    if unexpected or any("lm_head" not in name for name in missing):
        raise UserError(f"trace: weights do not fit the model: missing {missing}, unexpected {unexpected}")
    model.save_pretrained(folder)


def build(trace: Trace, cluster: Cluster, folder: str, checkpointing: bool):
    """The model with its taps, the method, and what carries the deltas."""
    settings, optimizer = trace.settings, trace.settings["optimizer"]
    config = ModelConfig(base=folder, dtype="float32", gradient_checkpointing=checkpointing)
    model = load_base(config, load_model_config(config), cluster.load_device)
    targets = find_targets(model, tuple(settings["target_modules"]))
    indices = {f"{name}.weight": value for name, value in trace.group("initial_indices/").items()}
    shapes = {target.name: target.shape for target in targets}
    assert sorted(shapes) == sorted(indices), "the trace's targets are not the model's"
    schedule = ReallocationSchedule(
        total_steps=settings["total_steps"],
        update_interval_steps=settings["update_interval"],
        estimation_steps=settings["gradient_estimation_steps"],
        initial_replacement_fraction=settings["initial_replacement_rate"],
        only_first=settings["algorithm"] == "static",
        estimates=settings["algorithm"] != "ma",
    )
    method = MethodSettings(
        method=settings["algorithm"],
        betas=tuple(optimizer.get("betas", (0.9, 0.999))),
        eps=optimizer["eps"],
        weight_decay=settings["weight_decay"],
    )
    backends = Backends(select=cluster.select_candidates, exchanges=exchanges_of(cluster.device, "cpu"))
    tuning = SparseFineTuning(DeltaStore(shapes, indices, device=cluster.device), method, schedule, backends)
    attach_taps(targets, tuning.recorder.record_product, cluster.materialize)
    model = cluster.prepare(model)
    parts = {target.name: cluster.part_of(target.module.weight) for target in targets}
    return model, tuning, ResidentDeltas(tuning.store, parts, cluster.settle)


def step_loss(model, cluster: Cluster, rows: Tensor) -> float:
    """Backward passes of one global batch (rows [B, L] are input ids and labels); its mean token loss."""
    targets = rows.shape[0] * (rows.shape[1] - 1)
    total = 0.0
    for members in micro_batches(range(rows.shape[0]), cluster.rank, cluster.size, None):
        ids = torch.stack([rows[n or 0] for n in members]).to(cluster.device)
        absent = torch.tensor([n is None for n in members], device=cluster.device)
        labels = torch.where(absent[:, None], -100, ids)
        loss = token_loss_sum(model, {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels})
        (loss / targets).backward()
        total += loss.item() / targets
    return cluster.sum_floats(total)[0]


def compare(trace: Trace, tuning: SparseFineTuning, step: int) -> tuple[float, float]:
    """(fraction of the trace's indices that are active here too, largest difference of the deltas on those)."""
    shared = wanted = 0
    error = 0.0
    for delta in tuning.store:
        module = delta.name.removesuffix(".weight")
        indices = trace.tensors[f"step{step:03d}/indices/{module}"].long()
        deltas = torch.zeros(delta.numel).index_put_(
            (indices,), trace.tensors[f"step{step:03d}/deltas/{module}"].float()
        )
        mine = delta.indices.cpu().long()
        common = torch.isin(mine, indices)
        shared, wanted = shared + int(common.sum()), wanted + max(indices.numel(), mine.numel())
        if common.any():
            difference = float((delta.deltas.cpu()[common] - deltas[mine[common]]).abs().max())
            error = math.inf if math.isnan(difference) else max(error, difference)
    return shared / wanted, error


@click.command()
@click.argument("trace_file", metavar="TRACE", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.option("--tolerance", default=1e-5, show_default=True, help="Largest delta error that passes.")
@click.option("--shard", is_flag=True, help="Shard the base with ZeRO-3.")
@click.option("--ds_config", help="DeepSpeed configuration for --shard.")
@click.option("--checkpointing", is_flag=True, help="With gradient checkpointing.")
def main(trace_file: Path, tolerance: float, shard: bool, ds_config: str | None, checkpointing: bool) -> None:
    """Replay TRACE and compare indices and deltas at every recorded step."""
    trace = Trace.read(trace_file)
    recorded, last = trace.recorded_steps(), trace.settings["total_steps"]
    good = bool(recorded) and recorded[-1] <= last  # otherwise there is nothing to compare, or not all of it
    with tempfile.TemporaryDirectory() as folder:
        write_base(trace, folder)  # before DeepSpeed is there: it would shard this model too
        cluster = Cluster.start(sharded=shard, dtype=torch.float32, ds_config=ds_config)
        model, tuning, resident = build(trace, cluster, folder, checkpointing)
    say = print if cluster.is_main else lambda *_: None
    for step in range(1, last + 1):
        tuning.begin_step(step)
        loss = step_loss(model, cluster, trace.tensors["batches"][step - 1])
        cluster.sum_(tuning.recorder.flat)
        tuning.update(trace.settings["learning_rate"])
        if tuning.schedule.reallocates_at(step):
            resident.settle()
            tuning.reallocate(step, resident)
            cluster.check_identical(tuning.digests, "the deltas")
        resident.write()
        expected = float(trace.tensors["losses"][step - 1])
        good &= math.isclose(loss, expected, rel_tol=1e-4)
        if step in recorded:
            overlap, error = compare(trace, tuning, step)
            good &= overlap == 1.0 and error <= tolerance
            say(
                f"step {step:3d}  loss {loss:.6f} (trace {expected:.6f})  indices {overlap:8.3%}  delta error {error:.1e}"
            )
    say(f"{trace_file.name}: {'reproduced' if good else 'NOT reproduced'} on {cluster.size} rank(s)")
    cluster.close()
    end_process(0 if good else 1)


if __name__ == "__main__":
    main()
