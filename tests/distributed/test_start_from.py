"""A run that starts from an adapter on 1 and 2 ranks, replicated and sharded: the same start, the same run."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file

from .test_same_on_any_ranks import assert_same_run

pytestmark = [pytest.mark.distributed, pytest.mark.timeout(900)]

METHODS = ("ag", "ma", "static")


def held_out(run):
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return {record["step"]: record["loss"] for record in records if record["event"] == "eval"}


@pytest.fixture(scope="module")
def single(launch_runs, tmp_path_factory):
    """The runs of one process, each from the same adapter; and the options of such runs."""
    held = {"eval_data": "demo", "max_eval_examples": 24}
    (first,) = launch_runs(1, False, [held])
    adapter = shutil.copytree(first / "adapter", tmp_path_factory.mktemp("start") / "adapter")
    further = held | {"start_from": str(adapter), "density": "none", "save_every_steps": 4, "keep_last": 9}
    options = [further | {"method": method} for method in METHODS]
    runs = launch_runs(1, False, options)
    assert all(held_out(run)[0] == pytest.approx(held_out(first)[11], rel=1e-6) for run in runs)
    return runs, options


@pytest.mark.parametrize("sharded", [False, True], ids=["replicated", "sharded"])
def test_ranks_and_placement_do_not_change_a_run_that_starts_from_an_adapter(launch_runs, single, sharded):
    runs, options = single
    for one, two in zip(runs, launch_runs(2, sharded, options), strict=True):
        assert_same_run(one, two)
        assert held_out(two)[0] == pytest.approx(held_out(one)[0], rel=1e-5)
    adapter = load_file(options[0]["start_from"] + "/adapter_model.safetensors")
    static = load_file(runs[METHODS.index("static")] / "adapter" / "adapter_model.safetensors")
    assert all(torch.equal(adapter[name], static[name]) for name in adapter if name.endswith(".indices"))


def test_two_sharded_ranks_resume_such_a_run_without_its_adapter(launch_runs, single, tmp_path):
    runs, options = single
    gone = {"start_from": str(tmp_path / "gone")}
    checkpoints = [{"resume": str(run / "checkpoints" / "step_000008")} for run in runs]
    resumed = launch_runs(2, True, [each | gone | saved for each, saved in zip(options, checkpoints, strict=True)])
    for whole, run in zip(runs, resumed, strict=True):
        a, b = (load_file(folder / "adapter" / "adapter_model.safetensors") for folder in (whole, run))
        for name in a:
            same = torch.equal if name.endswith(".indices") else lambda x, y: (x - y).abs().max() < 1e-4
            assert same(a[name], b[name]), name
