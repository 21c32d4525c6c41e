"""Ways of launching that accelerate accepts and that would not train as asked: refused with the reason."""

import subprocess
import sys

import pytest

from .conftest import ROOT, environment

pytestmark = [pytest.mark.distributed, pytest.mark.timeout(300)]

WAYS = {
    "--cpu starts one process of two": ("--cpu --num_machines 1 --num_processes 2", {}, "started this process alone"),
    "ACCELERATE_USE_CPU switches DeepSpeed off": (
        "--use_deepspeed --num_machines 1 --num_processes 2 --main_process_port 0",
        {"ACCELERATE_USE_CPU": "true"},
        "accelerate runs MULTI_CPU, not DeepSpeed; ACCELERATE_USE_CPU is set",
    ),
}


@pytest.mark.parametrize("way", WAYS)
def test_it_is_refused_with_the_reason(tmp_path, hf_home, way):
    options, more, reason = WAYS[way]
    done = subprocess.run(
        [
            *[sys.executable, "-m", "accelerate.commands.launch", *options.split(), "scale_sft/train.py"],
            *["--base_placement", "shard", "--density", "0.01", "--output_dir", str(tmp_path / "run")],
        ],
        cwd=ROOT, env=environment(hf_home) | more, capture_output=True, text=True, timeout=240, check=False,
    )  # fmt: skip
    assert done.returncode != 0
    [error] = [line for line in done.stderr.splitlines() if line.startswith("error:")]
    assert reason in error
    assert not (tmp_path / "run").exists()
