"""A disk that is full while a checkpoint is written: a small tmpfs."""

import os
import subprocess

import pytest

from scale_sft.reporting.metrics_file import read_metrics
from scale_sft.training.checkpoint_files import find_checkpoints, verify
from tests.forked import finish

from .children import start

pytestmark = pytest.mark.slow


@pytest.fixture
def small_disk(tmp_path):
    """A folder that is a file system of 256 KiB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    made = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(folder)], check=False, capture_output=True, text=True
    )
    if made.returncode:
        pytest.skip(f"cannot mount a tmpfs here: {made.stderr.strip()}")
    yield folder
    subprocess.run(["umount", "--lazy", str(folder)], check=True)


@pytest.mark.parametrize("on_save_failure", ["stop", "continue"])
def test_a_full_disk_never_leaves_half_a_checkpoint(on_save_failure, small_disk, tiny_model, pairs_file, tmp_path):
    run, log = small_disk / "run", tmp_path / "log"
    options = {
        "base": tiny_model("llama"), "train_data": pairs_file, "method": "ag", "density": 0.05, "steps": 8,
        "global_batch_size": 4, "update_interval_steps": 4, "estimation_steps": 2, "max_length": 32, "base_placement": "replicate",
        "save_every_steps": 2, "keep_last": 2, "log_every_steps": 1, "output_dir": run,
        "on_save_failure": on_save_failure,
    }  # fmt: skip
    status = finish(start(options, log, plant=("fill_the_disk", str(small_disk / "filler"), 4, 6)))
    text = log.read_text()
    assert "No space left on device" in text and "Earlier checkpoints are intact" in text, text[-3000:]
    steps = [found.step for found in find_checkpoints(run / "checkpoints")]
    if on_save_failure == "stop":
        assert status == 1 and steps == [2]
        os.unlink(small_disk / "filler")
        assert finish(start({**options, "save_every_steps": 3}, log)) == 0, log.read_text()[-3000:]
        steps = [found.step for found in find_checkpoints(run / "checkpoints")]
        assert steps == [8, 6]
    else:
        assert status == 0 and steps == [8, 6]
    for found in find_checkpoints(run / "checkpoints"):
        verify(found.path)
    assert not list((run / "checkpoints").glob(".*"))
    done = [record["step"] for record in read_metrics(run / "metrics.jsonl") if record["event"] == "step"]
    assert done == list(range(1, 9))
