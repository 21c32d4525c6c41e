"""Two nodes train the adapter that one process trains; launchers that would train alone on each are refused."""

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from safetensors.torch import load_file

from .conftest import ROOT, SBATCH

pytestmark = [pytest.mark.slurm, pytest.mark.timeout(600)]

RECIPE = """
model: {base: demo, dtype: float32}
sparse: {method: ag, density: 0.005, update_interval_steps: 3, estimation_steps: 2}
optimizer: {learning_rate: 0.01}
data: {train_data: demo, max_train_examples: 64}
run: {steps: 10, global_batch_size: 8, log_every_steps: 1}
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder of submission that is not the project's, with a recipe."""
    folder = tmp_path_factory.mktemp("submission")
    (folder / "recipe.yaml").write_text(RECIPE)
    return folder


@pytest.fixture(scope="module")
def single(slurm, folder):
    """The adapter of one process."""
    done = subprocess.run(
        [sys.executable, ROOT / "scale_sft" / "train.py", "--config", "recipe.yaml", "--output_dir", "single"],
        cwd=folder, env=slurm.environment, capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return load_file(folder / "single" / "adapter" / "adapter_model.safetensors")


@pytest.mark.parametrize("placement", ["shard", "replicate"])
def test_two_nodes_train_the_adapter_of_one_process(slurm, folder, single, placement):
    job = slurm.submit(
        SBATCH, "recipe.yaml", "--base_placement", placement, "--output_dir", f"runs/{placement}", cwd=folder
    )
    ended = slurm.wait(job)
    log = (folder / f"slurm-{job}.log").read_text()
    node_log = (folder / f"slurm-{job}" / "node-0-n1.log").read_text()
    assert "JobState=COMPLETED" in ended, log + node_log
    for rank, host in enumerate(("n1", "n2")):
        assert re.search(rf"^rank {rank} of 2  host {host}  device cpu\S*  base {placement}$", node_log, re.MULTILINE)
    assert (folder / f"slurm-{job}" / "node-1-n2.log").is_file()
    found = load_file(folder / "runs" / placement / "adapter" / "adapter_model.safetensors")
    assert found.keys() == single.keys()
    for name, values in single.items():
        if name.endswith(".indices"):
            assert found[name].equal(values), f"{name} differs"
        else:
            assert (found[name] - values).abs().max() < 1e-5, f"{name} differs"


LAUNCHERS = {
    "a world for each node": "--multi_gpu --num_machines 1 --num_processes 2 --main_process_port 29501",
    "pdsh, the default of accelerate": "--use_deepspeed --num_machines 2 --num_processes 4 --main_process_ip n1"
    " --main_process_port 29502 --machine_rank $SLURM_NODEID",
}


@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_a_launcher_that_trains_alone_on_each_node_is_refused(slurm, folder, tmp_path, launcher):
    script = tmp_path / "job.sbatch"
    script.write_text(
        f"""#!/bin/bash
#SBATCH --nodes=2 --ntasks-per-node=1 --output=log
srun --label bash -c 'timeout 120 {sys.executable} -m accelerate.commands.launch {LAUNCHERS[launcher]} \\
    {ROOT}/scale_sft/train.py --config {folder}/recipe.yaml --output_dir run-$SLURM_NODEID'
"""
    )
    # DeepSpeed's launcher calls `deepspeed` by name
    slurm.wait(slurm.submit(script, cwd=tmp_path, PATH=f"{sys.prefix}/bin:{slurm.environment['PATH']}"))
    log = (tmp_path / "log").read_text()
    assert "each node would train alone" in log or "each machine would train alone" in log, log
    assert "step 1" not in log
    assert not list(tmp_path.glob("run-*"))


def rank_process(job: str, rank: int) -> int | None:
    """Process id of a rank of a job; all nodes share this machine's process table."""
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            settings = (entry / "environ").read_text().split("\0")
        except OSError:
            continue
        if f"SLURM_JOB_ID={job}" in settings and f"RANK={rank}" in settings:
            return int(entry.name)
    return None


def test_a_rank_that_dies_ends_the_job_within_a_minute_and_is_named(slurm, folder):
    job = slurm.submit(SBATCH, "recipe.yaml", "--steps", "100000", "--output_dir", "runs/killed", cwd=folder)
    metrics = folder / "runs" / "killed" / "metrics.jsonl"
    deadline = time.monotonic() + 240
    while not metrics.exists() or '"step": 3' not in metrics.read_text():
        assert time.monotonic() < deadline and "JobState=FAILED" not in slurm.state(job)
        time.sleep(0.5)
    os.kill(rank_process(job, 1), signal.SIGKILL)
    assert "JobState=FAILED" in slurm.wait(job, 60)
    log = (folder / f"slurm-{job}.log").read_text()
    assert "error: rank 1 on n2 was ended by SIGKILL" in log, log
