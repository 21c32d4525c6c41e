"""A run that is killed at any moment goes on as if nothing had happened, bit for bit."""

import random
import signal

import pytest

from tests.forked import finish

from .children import Kill, start
from .comparing import assert_same_run, batches, losses, states

STEPS, EVERY = 21, 3
PLACES_IN_STEP = ("forward", "update", "recorded")
PLACES_IN_SAVE = {  # by step; once a checkpoint has its name ("renamed", "removing"), it is not written again
    3: ("tensors", "state"), 6: ("manifest", "rename"), 9: ("renamed",),
    12: ("tensors", "state", "manifest", "rename", "removing"), 15: ("renamed",), 18: ("state", "removing"),
    21: ("tensors", "rename", "removing"),
}  # fmt: skip

METHODS = {
    "ag": {},
    "ma": {"method": "ma", "learning_rate": 0.05},
    "change": {"drop_criterion": "change", "candidate_ratio": 0.5, "max_grad_norm": 1.0},
}


@pytest.fixture(scope="module")
def options(tiny_model, pairs_file):
    """21 steps; reallocation at steps 4, 11 and 18, so checkpoints 3, 9 and 15 lie in estimation phases."""
    return {
        "base": tiny_model("llama"), "train_data": pairs_file, "eval_data": pairs_file, "method": "ag", "density": 0.05,
        "steps": STEPS, "global_batch_size": 4, "micro_batch_size": 2, "update_interval_steps": 7,
        "estimation_steps": 4, "learning_rate": 0.02, "weight_decay": 0.1, "max_length": 32, "base_placement": "replicate",
        "save_every_steps": EVERY, "keep_last": 99, "log_every_steps": 1, "eval_every_steps": 10,
    }  # fmt: skip


@pytest.fixture(scope="module")
def uninterrupted(options, tmp_path_factory):
    """method -> the folder of a run that nothing has disturbed."""
    runs = {}

    def get(method):
        if method not in runs:
            folder = tmp_path_factory.mktemp("uninterrupted")
            log = folder / "log"
            status = finish(start({**options, **METHODS[method], "output_dir": folder / "run"}, log))
            assert status == 0, log.read_text()
            runs[method] = folder / "run"
            assert len(losses(runs[method])) == STEPS and len(states(runs[method])) == STEPS // EVERY
        return runs[method]

    return get


def killed_again_and_again(options, folder, kills):
    """The folder of one run, killed at each of `kills` and started anew each time, then left to finish."""
    run, log = folder / "run", folder / "log"
    for kill in kills:
        status = finish(start({**options, "output_dir": run}, log, kill=kill))
        assert status == -signal.SIGKILL, f"{kill}: {status}\n{log.read_text()}"
    status = finish(start({**options, "output_dir": run}, log))
    assert status == 0, log.read_text()
    assert not list((run / "checkpoints").glob(".*")), "something was left behind under a temporary name"
    return run


@pytest.mark.slow
def test_killed_in_every_single_step_it_ends_bit_identical(options, uninterrupted, tmp_path):
    kills = [Kill(step, PLACES_IN_STEP[step % 3]) for step in range(1, STEPS + 1)]
    assert_same_run(killed_again_and_again(options, tmp_path, kills), uninterrupted("ag"))


@pytest.mark.slow
def test_killed_in_every_part_of_every_save_it_ends_bit_identical(options, uninterrupted, tmp_path):
    keeping_two = {**options, "keep_last": 2}
    kills = [Kill(step, place) for step, places in PLACES_IN_SAVE.items() for place in places]
    run = killed_again_and_again(keeping_two, tmp_path, kills)
    assert sorted(states(run)) == ["step_000018", "step_000021"]
    assert_same_run(run, uninterrupted("ag"))


@pytest.mark.slow
@pytest.mark.parametrize("method", ["ma", "change"])
def test_other_methods_are_as_exact(method, options, uninterrupted, tmp_path):
    kills = [Kill(step, PLACES_IN_STEP[step % 3]) for step in (2, 5, 9, 11, 16, 21)]
    run = killed_again_and_again({**options, **METHODS[method]}, tmp_path, kills)
    assert_same_run(run, uninterrupted(method))


@pytest.mark.slow
def test_killed_after_the_last_step_it_only_finishes(options, uninterrupted, tmp_path):
    run = killed_again_and_again(options, tmp_path, [Kill(STEPS, "renamed")])
    assert max(batches(run)) == STEPS
    assert_same_run(run, uninterrupted("ag"))


@pytest.mark.slow
def test_a_run_on_preferences_is_as_exact(options, preferences_file, tmp_path):
    """Its reference is measured again after the kill, with the deltas of a checkpoint in the model."""
    given = {
        **options, "objective": "dpo", "train_data": preferences_file, "eval_data": preferences_file, "packing": True,
        "steps": 9, "update_interval_steps": 5, "estimation_steps": 2, "eval_every_steps": 5, "max_length": 64,
    }  # fmt: skip
    whole, log = tmp_path / "whole", tmp_path / "log"
    assert finish(start({**given, "output_dir": whole, "cache_dir": tmp_path / "cache"}, log)) == 0, log.read_text()
    kill = Kill(random.randint(EVERY + 1, given["steps"]), random.choice(PLACES_IN_STEP))
    print(kill)  # shown if the test fails
    interrupted = {**given, "output_dir": tmp_path / "run", "cache_dir": tmp_path / "other"}
    assert finish(start(interrupted, log, kill=kill)) == -signal.SIGKILL, log.read_text()
    tables = list((tmp_path / "other").glob("reference-*"))
    assert tables
    for file in tables:
        file.unlink()
    assert_same_run(killed_again_and_again(interrupted, tmp_path, []), whole)
