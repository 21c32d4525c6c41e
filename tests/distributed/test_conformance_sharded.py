"""The traces of the algorithm, each rank half of every batch, the base in shards."""

import subprocess

import pytest

from . import worker
from .conftest import ROOT, STRICT, command, environment

pytestmark = pytest.mark.distributed


def arguments(trace):
    return [str(trace), "--shard", "--ds_config", STRICT]


def assert_reproduced(text):
    assert "reproduced on 2 rank(s)" in text and "NOT" not in text


def test_two_ranks_under_zero3_reproduce_the_trace_by_the_documented_command(shared, hf_home):
    script = ["tests/conformance/run_trace.py", *arguments(shared("traces/ag.safetensors"))]
    done = subprocess.run(
        command(2, True, *script), cwd=ROOT, env=environment(hf_home), capture_output=True, text=True, timeout=400,
        check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]
    assert_reproduced(done.stdout)


def test_two_ranks_under_zero3_reproduce_the_trace_of_momentum_approximation(shared, on_ranks):
    statuses, text = on_ranks(2, True, worker.replay_trace, arguments(shared("traces/ma.safetensors")))
    assert statuses == [0, 0], text[-6000:]
    assert_reproduced(text)
