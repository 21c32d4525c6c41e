"""The start-up check of the launcher, from the environment alone, and how a process ends."""

import os
import subprocess
import sys
from textwrap import dedent

import pytest

from scale_sft.distributed.exit import leave
from scale_sft.distributed.signals import SAVED_STATUS
from scale_sft.distributed.world import World, refuse_lonely_launchers
from scale_sft.errors import UserError

ACCELERATE = {"ACCELERATE_MIXED_PRECISION": "no"}


def torchrun(rank: int, size: int, local_size: int) -> dict[str, str]:
    return {"RANK": str(rank), "WORLD_SIZE": str(size), "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": str(local_size),
            "MASTER_ADDR": "n1", "MASTER_PORT": "29500", **ACCELERATE}  # fmt: skip


def deepspeed(rank: int, size: int, machines: int) -> dict[str, str]:
    return {"RANK": str(rank), "WORLD_SIZE": str(size), "LOCAL_RANK": "0", "LOCAL_SIZE": str(size // machines),
            "CROSS_SIZE": str(machines), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}  # fmt: skip


@pytest.fixture
def environment(monkeypatch):
    """Sets the launcher's variables; those of the surrounding system do not count."""
    for name in list(os.environ):
        if name.startswith(("SLURM_", "ACCELERATE_", "MASTER_")):
            monkeypatch.delenv(name)
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "LOCAL_SIZE", "CROSS_SIZE"):
        monkeypatch.delenv(name, raising=False)
    return lambda values: [monkeypatch.setenv(name, value) for name, value in values.items()]


@pytest.mark.parametrize(
    ("values", "reason"),
    [
        ({"SLURM_STEP_NUM_NODES": "2", **torchrun(1, 8, 8)}, "runs on 2 nodes, but the launcher's world spans 1"),
        ({"SLURM_STEP_NUM_NODES": "2"}, "runs on 2 nodes, but the launcher's world spans 1"),
        ({"MASTER_ADDR": "n1", "MASTER_PORT": "29500", **ACCELERATE}, "started this process alone"),
        ({"SLURM_STEP_NUM_NODES": "2", **deepspeed(3, 8, 1), **ACCELERATE}, "--deepspeed_multinode_launcher standard"),
    ],
    ids=["one torchrun per node", "one process per node", "--cpu --num_machines 2", "pdsh without a host file"],
)  # fmt: skip
def test_a_launcher_that_trains_alone_is_refused(environment, values, reason):
    environment(values)
    with pytest.raises(UserError, match=reason):
        refuse_lonely_launchers()


@pytest.mark.parametrize(
    "values",
    [
        {},
        ACCELERATE,
        torchrun(1, 4, 4),
        {"SLURM_STEP_NUM_NODES": "2", **torchrun(9, 16, 8)},
        {"SLURM_STEP_NUM_NODES": "2", **deepspeed(9, 16, 2), **ACCELERATE},
        deepspeed(3, 8, 1),
    ],
    ids=["python", "accelerate, one process", "torchrun", "two nodes", "pdsh, two nodes", "deepspeed, one node"],
)  # fmt: skip
def test_a_launcher_of_the_whole_world_is_accepted(environment, values):
    environment(values)
    refuse_lonely_launchers()


def test_deepspeeds_launcher_tells_how_many_processes_share_the_machine(environment):
    environment({"RANK": "3", "WORLD_SIZE": "8", "LOCAL_RANK": "3", "LOCAL_SIZE": "8"})
    assert World.from_environment() == World(rank=3, size=8, local_rank=3, local_size=8)


def test_rank_0_speaks_at_once_and_the_others_name_themselves_after_a_while(environment, capsys):
    for rank, expected in ((0, "error: no such file\n"), (2, "error: rank 2 on ")):
        environment(torchrun(rank, 4, 4))
        with pytest.raises(SystemExit) as end:
            leave("no such file", patience_seconds=0)
        assert end.value.code == 1
        assert capsys.readouterr().err.startswith(expected)


@pytest.mark.parametrize(("rank", "made"), [(0, True), (1, False)])
def test_the_file_that_asks_for_another_start_is_made_by_rank_0_when_it_has_saved(environment, tmp_path, rank, made):
    environment({**torchrun(rank, 2, 2), "SCALE_SFT_REQUEUE_FILE": str(tmp_path / "requeue")})
    with pytest.raises(SystemExit):
        leave("a mistake", patience_seconds=0)
    assert not (tmp_path / "requeue").exists()
    with pytest.raises(SystemExit) as end:
        leave("saved", SAVED_STATUS, patience_seconds=0)
    assert end.value.code == SAVED_STATUS
    assert (tmp_path / "requeue").exists() is made


@pytest.mark.parametrize("status", [0, 75])
def test_a_thread_of_gloo_that_still_holds_a_tensor_aborts_no_process_that_is_done(status):
    program = dedent(f"""
        import atexit, sys, time
        from torch import distributed, ones
        from scale_sft.distributed.cluster import Cluster
        from scale_sft.distributed.exit import end_process

        class Slow:
            def __del__(self):
                time.sleep(1)

        distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
        Cluster.joined, kept = True, distributed.group.WORLD
        tensor = ones(4)
        tensor.slow = Slow()  # gloo's thread, which has the last reference, is busy with it while the program ends
        work = distributed.all_reduce(tensor, async_op=True)
        del tensor, work
        distributed.destroy_process_group()
        atexit.register(lambda: print("at the end"))
        print("done")
        end_process({status})
    """)
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout) == (status, "done\nat the end\n"), done.stderr


def test_the_check_runs_before_anything_is_read(environment, tmp_path):
    from scale_sft import train
    from scale_sft.config.loading import load

    environment({"SLURM_STEP_NUM_NODES": "2"})
    wanted = load(None, {"base": str(tmp_path / "none"), "density": 0.1, "output_dir": str(tmp_path / "run")})
    with pytest.raises(UserError, match="train alone"):
        train.run_training(wanted)
    assert not (tmp_path / "run").exists()
