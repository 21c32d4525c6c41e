"""A job on two nodes that is told to stop saves itself, is requeued, and ends with the bits of an undisturbed run."""

import re
import time

import pytest

from tests.faults.children import start_ranks
from tests.faults.comparing import evaluations, losses, reallocations, states
from tests.forked import finish

from .conftest import SBATCH

pytestmark = [pytest.mark.slurm, pytest.mark.timeout(600)]


def test_a_job_that_is_signalled_is_requeued_and_ends_with_the_same_bits(slurm, tiny_model, pairs_file, tmp_path):
    (tmp_path / "recipe.yaml").write_text(
        f"model: {{base: {tiny_model('llama')}, base_placement: shard}}\n"
        "sparse: {method: ag, density: 0.05, update_interval_steps: 20, estimation_steps: 5}\n"
        f"data: {{train_data: {pairs_file}, eval_data: {pairs_file}, max_length: 32}}\n"
        "run: {steps: 150, global_batch_size: 8, save_every_steps: 50, log_every_steps: 1}\n"
    )
    job = slurm.submit(SBATCH, "recipe.yaml", "--output_dir", "run", cwd=tmp_path)
    run, log = tmp_path / "run", tmp_path / f"slurm-{job}.log"
    deadline = time.monotonic() + 240
    while not (run / "metrics.jsonl").exists() or '"step": 7,' not in (run / "metrics.jsonl").read_text():
        assert time.monotonic() < deadline and "JobState=FAILED" not in slurm.state(job), log.read_text()
        time.sleep(0.2)
    asked = time.monotonic()
    assert slurm.script("run", "scancel", "--batch", "--signal=USR1", job).returncode == 0
    while "asking Slurm to start this job again" not in log.read_text():
        assert time.monotonic() < asked + 60, log.read_text()
        time.sleep(0.2)
    print(f"saved and requeued {time.monotonic() - asked:.1f} s after the signal")
    ended = slurm.wait(job)
    said = "".join(file.read_text() for file in (tmp_path / f"slurm-{job}").glob("node-*.log"))
    assert "JobState=COMPLETED" in ended and "Restarts=1" in ended, log.read_text() + said
    step = int(re.search(r"SIGUSR1: saved after step (\d+) in", said)[1])
    assert 7 <= step < 150 and f"{step} of 150 steps are done" in said

    reference, settings = (
        tmp_path / "reference",
        {"config": tmp_path / "recipe.yaml", "output_dir": tmp_path / "reference"},
    )
    settings |= {"ds_config": "ds_configs/zero3_cpu.json", "base_placement": "shard"}
    children = start_ranks(2, settings, tmp_path / "log")
    assert [finish(child) for child in children] == [0, 0], (tmp_path / "log").read_text()
    assert losses(run) == losses(reference)
    assert reallocations(run) == reallocations(reference) and evaluations(run) == evaluations(reference)
    assert states(run)["step_000150"] == states(reference)["step_000150"]
    file = "adapter/adapter_model.safetensors"
    assert (run / file).read_bytes() == (reference / file).read_bytes()
