"""Evaluation gives the same figures on any number of ranks, for any batch size, sharded or not."""

import json

import pytest
from safetensors.torch import load_file

from . import worker
from .conftest import STRICT

pytestmark = [pytest.mark.distributed, pytest.mark.timeout(900)]

PACKED = {"packing": True, "max_length": 128, "steps": 6}


@pytest.fixture(scope="module")
def packed_run(launch_runs):
    return launch_runs(1, False, [PACKED])[0]


@pytest.fixture(scope="module")
def evaluate(packed_run, on_ranks, tmp_path_factory):
    """(ranks, sharded, batch size) -> results of `scale-sft eval` of the packed run's adapter."""

    def run(ranks: int, sharded: bool, size: int) -> dict:
        output = tmp_path_factory.mktemp("eval") / "result.json"
        arguments = ["eval", packed_run / "adapter", "--eval_data", "demo", "--output", output]
        arguments += ["--max_eval_examples", 40, "--eval_batch_size", size, "--max_length", 128]
        arguments += ["--exact_match_examples", 9, "--max_new_tokens", 6, "--generation_samples", 9]
        arguments += ["--base_placement", "shard", "--ds_config", STRICT] if sharded else []
        statuses, text = on_ranks(ranks, sharded, worker.run_command, [str(argument) for argument in arguments])
        assert statuses == [0] * ranks, text[-9000:]
        return json.loads(output.read_text())["held_out"]

    return run


def test_figures_and_answers_do_not_depend_on_ranks_batch_size_or_placement(evaluate):
    one = evaluate(1, False, 1)
    for ranks, sharded, size in ((2, False, 3), (4, False, 8), (2, True, 3)):
        other = evaluate(ranks, sharded, size)
        assert other["loss"] == pytest.approx(one["loss"], abs=1e-6)
        for name in ("target_tokens", "exact_match", "samples"):
            assert other[name] == one[name], (ranks, sharded, size)


@pytest.mark.parametrize("sharded", [False, True], ids=["replicated", "sharded"])
def test_a_packed_run_is_the_same_on_two_ranks(launch_runs, packed_run, sharded):
    mine, theirs = (
        load_file(run / "adapter" / "adapter_model.safetensors")
        for run in (packed_run, launch_runs(2, sharded, [PACKED])[0])
    )
    for name, tensor in mine.items():
        if name.endswith(".indices"):
            assert tensor.equal(theirs[name])
        else:
            assert (tensor - theirs[name]).abs().max() < 1e-4
