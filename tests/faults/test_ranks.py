"""Several ranks: the same bits after a kill, other numbers of ranks, signals, and ranks that stop making progress."""

import os
import re
import signal
import subprocess
import time

import pytest
import torch
from safetensors.torch import load_file

from scale_sft.distributed.heartbeat import STALLED_STATUS
from scale_sft.distributed.signals import SAVED_STATUS
from tests.distributed.conftest import ROOT, STRICT, command, environment
from tests.forked import end, finish

from .children import Kill, start, start_ranks
from .comparing import assert_same_run, batches, losses

pytestmark = [pytest.mark.distributed, pytest.mark.timeout(600)]

SHARDED = {"base_placement": "shard", "ds_config": STRICT}
REPLICATED = {"base_placement": "replicate"}


@pytest.fixture(scope="module")
def options(tiny_model, pairs_file):
    """12 steps; reallocation at steps 3, 7 and 11; checkpoint 6 lies in an estimation phase."""
    return {
        "base": tiny_model("llama"), "train_data": pairs_file, "method": "ag", "density": 0.05, "steps": 12,
        "global_batch_size": 8, "update_interval_steps": 4, "estimation_steps": 3, "learning_rate": 0.02, "max_length": 32,
        "save_every_steps": 3, "keep_last": 99, "log_every_steps": 1, "proposal_batch_size": 8,
    }  # fmt: skip


@pytest.fixture(scope="module")
def uninterrupted(options, tmp_path_factory):
    """(ranks, placement options) -> the folder of a run that nothing has disturbed."""
    runs = {}

    def get(ranks, placement):
        key = ranks, placement["base_placement"]
        if key not in runs:
            folder = tmp_path_factory.mktemp("uninterrupted")
            statuses = ended(start_ranks(ranks, {**options, **placement, "output_dir": folder / "run"}, folder / "log"))
            assert statuses == [0] * ranks, (folder / "log").read_text()[-6000:]
            runs[key] = folder / "run"
        return runs[key]

    return get


def ended(children):
    try:
        return [finish(child) for child in children]
    finally:
        end(children)


def test_zero3_ranks_that_are_killed_end_bit_identical_and_name_the_dead(options, uninterrupted, tmp_path):
    run, log = tmp_path / "run", tmp_path / "log"
    settings = {**options, **SHARDED, "output_dir": run}
    for kill, at in ((Kill(5, "forward"), 1), (Kill(6, "tensors"), 0), (Kill(10, "update"), 0)):
        statuses = ended(start_ranks(2, settings, log, kill=kill, at=at))
        assert statuses[at] == -signal.SIGKILL and statuses[1 - at] == STALLED_STATUS, log.read_text()[-6000:]
        text = log.read_text()
        assert f"no sign of life from rank {at} (host" in text or "is gone" in text, text[-3000:]
    assert ended(start_ranks(2, settings, log)) == [0, 0], log.read_text()[-6000:]
    assert_same_run(run, uninterrupted(2, SHARDED))


@pytest.mark.parametrize(
    ("ranks", "placement"), [(1, REPLICATED), (4, REPLICATED), (4, SHARDED)], ids=["1", "4", "4sharded"]
)
def test_a_checkpoint_of_two_sharded_ranks_goes_on_with_others(ranks, placement, options, uninterrupted, tmp_path):
    before = uninterrupted(2, SHARDED)
    settings = {**options, **placement, "output_dir": tmp_path / "run", "resume": before / "checkpoints/step_000006"}
    log = tmp_path / "log"
    if ranks == 1:
        assert finish(start(settings, log)) == 0, log.read_text()[-6000:]
    else:
        assert ended(start_ranks(ranks, settings, log)) == [0] * ranks, log.read_text()[-6000:]
    assert f"saved on 2 ranks; resuming on {ranks}" in log.read_text()
    after = {step: batch for step, batch in batches(before).items() if step > 6}
    assert batches(tmp_path / "run") == after
    for mine, theirs in zip(losses(tmp_path / "run"), losses(before)[6:], strict=True):
        assert mine[0] == theirs[0] and mine[1] == pytest.approx(theirs[1], rel=1e-4)
    deltas, expected = (load_file(run / "adapter/adapter_model.safetensors") for run in (tmp_path / "run", before))
    for name in expected:
        torch.testing.assert_close(deltas[name], expected[name], rtol=1e-2, atol=1e-4)


@pytest.mark.parametrize("placement", [REPLICATED, SHARDED], ids=["replicated", "sharded"])
def test_a_rank_that_hangs_is_named_within_the_time_out(placement, options, tmp_path):
    settings = {**options, **placement, "output_dir": tmp_path / "run", "collective_timeout_seconds": 4}
    children = start_ranks(2, settings, tmp_path / "log", plant=("hang", 4), at=1)
    try:
        assert finish(children[0]) == STALLED_STATUS
    finally:
        assert STALLED_STATUS in ended(children)
    error = next(line for line in (tmp_path / "log").read_text().splitlines() if line.startswith("error:"))
    assert re.search(r"no progress for \d+ s, waiting for rank 1 \(host .*children.py:\d+ in hanging", error)
    assert "rank 0" not in error


def test_a_rank_that_is_stopped_is_named_within_the_time_out(options, tmp_path):
    settings = {**options, **REPLICATED, "output_dir": tmp_path / "run", "collective_timeout_seconds": 4, "steps": 9999}
    children = start_ranks(2, settings, tmp_path / "log")
    try:
        wait_for_step(tmp_path / "run", 3)
        os.kill(children[1].pid, signal.SIGSTOP)
        began = time.monotonic()
        assert finish(children[0], 60) == STALLED_STATUS
        print(f"ended after {time.monotonic() - began:.1f} s")
        assert "no sign of life from rank 1 (host" in (tmp_path / "log").read_text()
    finally:
        end(children)


def wait_for_step(run, step, seconds=120):
    deadline = time.monotonic() + seconds
    file = run / "metrics.jsonl"
    while not file.exists() or f'"event": "step", "step": {step},' not in file.read_text():
        assert time.monotonic() < deadline, f"no step {step} within {seconds} s"
        time.sleep(0.05)


def test_a_signal_to_one_rank_stops_all_after_the_same_step(options, uninterrupted, tmp_path):
    run, log = tmp_path / "run", tmp_path / "log"
    settings = {**options, **REPLICATED, "output_dir": run}
    statuses = ended(start_ranks(2, settings, log, plant=("signal_itself", 5, int(signal.SIGUSR1)), at=1))
    assert statuses == [SAVED_STATUS] * 2, log.read_text()[-6000:]
    assert "saved after step 5" in log.read_text()
    assert ended(start_ranks(2, settings, log)) == [0, 0]
    assert_same_run_but_more_checkpoints(run, uninterrupted(2, REPLICATED), extra=["step_000005"])


def assert_same_run_but_more_checkpoints(run, reference, extra):
    import shutil

    for name in extra:
        shutil.rmtree(run / "checkpoints" / name)
    assert_same_run(run, reference)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1], ids=["SIGTERM", "SIGUSR1"])
def test_a_signal_under_accelerate_launch_saves_within_30_seconds_and_the_run_goes_on(
    number, options, uninterrupted, tmp_path
):
    from tests.distributed.test_agreement_and_faults import ranks_of

    run, wanted = tmp_path / "run", tmp_path / "requeue"
    settings = {**options, **REPLICATED, "output_dir": run}
    arguments = [f"--{name}={value}" for name, value in settings.items()]
    variables = environment(tmp_path / "hf") | {"SCALE_SFT_REQUEUE_FILE": str(wanted)}
    with (tmp_path / "log").open("w") as log:
        launcher = subprocess.Popen(
            command(2, False, "scale_sft/train.py", *arguments), cwd=ROOT, env=variables, stdout=log, stderr=log
        )
        try:
            wait_for_step(run, 2, 240)
            began = time.monotonic()
            if number == signal.SIGTERM:
                os.kill(launcher.pid, number)  # the launcher hands it on to the ranks
            else:
                for process in ranks_of(launcher).values():
                    os.kill(process, number)
            status = launcher.wait(60)
        finally:
            launcher.kill()
            launcher.wait()
    text = (tmp_path / "log").read_text()
    assert status != 0 and wanted.exists(), text[-4000:]
    step = int(re.search(r"saved after step (\d+)", text)[1])
    saved = run / "checkpoints" / f"step_{step:06d}"
    assert saved.stat().st_mtime - (time.time() - (time.monotonic() - began)) < 30
    if number == signal.SIGUSR1:  # on SIGTERM the launcher reports the signal instead
        assert f"exitcode  : {SAVED_STATUS}" in text
    log = tmp_path / "log2"
    assert ended(start_ranks(2, settings, log)) == [0, 0], log.read_text()[-4000:]
    (run / "batches.jsonl").write_text(
        (uninterrupted(2, REPLICATED) / "batches.jsonl").read_text()
    )  # not recorded above
    assert_same_run_but_more_checkpoints(run, uninterrupted(2, REPLICATED), [saved.name] if step % 3 else [])
