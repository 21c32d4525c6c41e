"""The traces of the algorithm, each rank half of every batch, the base in shards."""

import subprocess

import pytest

from .conftest import ROOT, STRICT, command, environment

pytestmark = [pytest.mark.distributed, pytest.mark.timeout(600)]
TRACES = ROOT.parent / "shared" / "traces"


@pytest.mark.skipif(not TRACES.is_dir(), reason="the recorded traces lie beside the checkout, in ../shared/traces")
@pytest.mark.parametrize("method", ["ag", "ma"])
def test_two_ranks_under_zero3_reproduce_the_trace(method, hf_home):
    script = ["tests/conformance/run_trace.py", str(TRACES / f"{method}.safetensors"), "--shard", "--ds_config", STRICT]
    done = subprocess.run(
        command(2, True, *script), cwd=ROOT, env=environment(hf_home), capture_output=True, text=True, timeout=400
    )
    print(done.stdout)
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]
    assert "reproduced on 2 rank(s)" in done.stdout and "NOT" not in done.stdout
