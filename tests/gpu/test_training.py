"""Whole runs on a GPU: with the kernels as without them, and as on a CPU."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from kernel_tools import INTERPRETED

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(INTERPRETED or not torch.cuda.is_available(), reason="needs a GPU, and no interpreter"),
]


def losses(run) -> list[float]:
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [record["loss"] for record in records if record["event"] == "step"]


@pytest.mark.parametrize("method", ["ag", "ma", "static"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_kernels_train_as_the_plain_steps_do(train_run, tmp_path, method, checkpointing) -> None:
    options = {"method": method, "gradient_checkpointing": checkpointing, "log_every_steps": 1, "dtype": "float32"}
    plain, fused = (
        train_run(**options, kernels=kernels, output_dir=str(tmp_path / kernels)) for kernels in ("off", "auto")
    )
    assert losses(fused) == pytest.approx(losses(plain), rel=1e-4)


def run_on_a_cpu(options: dict) -> Path:
    """A run in a process of its own, which sees no GPU: accelerate chooses the device of a process once."""
    code = (
        "import json, sys; from scale_sft.config.loading import load; from scale_sft.train import run_training;"
        "run_training(load(None, json.loads(sys.argv[1])))"
    )
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "-c", code, json.dumps(options)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    return Path(options["output_dir"])


@pytest.mark.parametrize("kernels", ["off", "auto"])
def test_a_step_on_a_gpu_is_that_on_a_cpu(train_run, run_options, tmp_path, kernels) -> None:
    options = {"dtype": "float32", "log_every_steps": 1}
    on_gpu = train_run(**options, kernels=kernels, output_dir=str(tmp_path / "gpu"))
    on_cpu = run_on_a_cpu({**run_options, **options, "output_dir": str(tmp_path / "cpu")})
    assert losses(on_gpu) == pytest.approx(losses(on_cpu), rel=1e-3)


def test_a_resumed_run_with_kernels_leaves_the_same_bits(train_run, tmp_path) -> None:
    options = {"kernels": "auto", "dtype": "bfloat16", "save_every_steps": 2, "keep_last": 9}
    whole = train_run(**options, output_dir=str(tmp_path / "whole"))
    again = train_run(**options, output_dir=str(tmp_path / "again"), resume=str(whole / "checkpoints" / "step_000002"))
    name = "adapter/adapter_model.safetensors"
    assert (again / name).read_bytes() == (whole / name).read_bytes()
