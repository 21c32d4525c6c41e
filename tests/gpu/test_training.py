"""Whole runs on a GPU: with the kernels as without them, and as on a CPU."""

import json

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


@pytest.mark.parametrize("kernels", ["off", "auto"])
def test_a_step_on_a_gpu_is_that_on_a_cpu(train_run, tmp_path, monkeypatch, kernels) -> None:
    options = {"dtype": "float32", "log_every_steps": 1}
    on_gpu = train_run(**options, kernels=kernels, output_dir=str(tmp_path / "gpu"))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    on_cpu = train_run(**options, output_dir=str(tmp_path / "cpu"))
    assert losses(on_gpu) == pytest.approx(losses(on_cpu), rel=1e-3)


def test_a_resumed_run_with_kernels_leaves_the_same_bits(train_run, tmp_path) -> None:
    """The choice of paths is part of the checkpoint."""
    options = {"kernels": "auto", "dtype": "bfloat16", "save_every_steps": 2, "keep_last": 9}
    whole = train_run(**options, output_dir=str(tmp_path / "whole"))
    again = train_run(**options, output_dir=str(tmp_path / "again"), resume=str(whole / "checkpoints" / "step_000002"))
    name = "adapter/adapter_model.safetensors"
    assert (again / name).read_bytes() == (whole / name).read_bytes()
