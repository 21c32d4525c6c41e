"""Whole runs with option compile: the bits of a run without it where the operations are the same, and its own again."""

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

from scale_sft.model import compiled_blocks
from scale_sft.reporting.metrics_file import read_metrics
from tests.faults.comparing import losses

WEIGHTS = "adapter/adapter_model.safetensors"


@pytest.fixture(autouse=True)
def fresh() -> None:
    torch._dynamo.reset()


@pytest.mark.parametrize(
    ("backend", "options"),
    [
        ("aot_eager", {"gradient_checkpointing": True, "micro_batch_size": 1}),
        ("eager", {"method": "ma", "dtype": "bfloat16", "packing": True, "kernels": "off"}),
        pytest.param("eager", {"quantization": "nf4", "micro_batch_size": 1}, marks=pytest.mark.quantized),
    ],
    ids=["checkpointing", "ma-bf16-packed", "nf4"],
)
def test_losses_candidates_and_deltas_are_those_of_blocks_as_they_are(
    backend, options, train_run, tmp_path, monkeypatch
):
    """With backends that run the model's own operations."""
    graphs = CompileCounterWithBackend(backend)
    monkeypatch.setattr(compiled_blocks, "BACKEND", graphs)
    options = options | {"log_every_steps": 1}
    plain = train_run(**options, output_dir=str(tmp_path / "plain"))
    compiled = train_run(**options, output_dir=str(tmp_path / "compiled"), compile="blocks")
    assert graphs.frame_count == 1, "no batch has a mask, or all have"
    assert losses(plain) == losses(compiled)
    assert (plain / WEIGHTS).read_bytes() == (compiled / WEIGHTS).read_bytes()


@pytest.mark.slow
def test_inductor_trains_as_well_and_its_runs_resume_bit_for_bit(train_run, tmp_path):
    """A resumed run meets other lengths first: one graph serves them all. Single sequences have no mask: one graph."""
    options = {"micro_batch_size": 1, "log_every_steps": 1, "save_every_steps": 3, "keep_last": 9}
    plain = train_run(**options, output_dir=str(tmp_path / "plain"))
    whole = train_run(**options, output_dir=str(tmp_path / "whole"), compile="blocks")
    for mine, theirs in zip(losses(whole), losses(plain), strict=True):
        assert mine == pytest.approx(theirs, rel=1e-4)
    torch._dynamo.reset()
    checkpoint = whole / "checkpoints" / "step_000003"
    resumed = train_run(**options, output_dir=str(tmp_path / "again"), compile="blocks", resume=str(checkpoint))
    assert [record["step"] for record in read_metrics(resumed / "metrics.jsonl") if record["event"] == "step"] == [
        4,
        5,
        6,
    ]
    assert losses(resumed) == losses(whole)[3:]
    assert (resumed / WEIGHTS).read_bytes() == (whole / WEIGHTS).read_bytes()
