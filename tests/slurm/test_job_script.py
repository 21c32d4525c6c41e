"""launch/slurm_multinode.sbatch in a real Slurm, with a stand-in for Python that notes how it is called."""

import itertools
import json
import sys
import time

import pytest

from .conftest import SBATCH

pytestmark = [pytest.mark.slurm, pytest.mark.timeout(300)]

# In place of `python -m accelerate.commands.launch`: one process per node. It ends with 1 where it has been told to
# save, as accelerate does whatever the status of the trainer.
LAUNCHER = f"""#!{sys.executable}
import json, os, pathlib, signal, sys, time

node = os.environ["SLURM_NODEID"]
starts = int(os.environ.get("SLURM_RESTART_COUNT", 0))
pathlib.Path(f"arguments-{{node}}-{{starts}}.json").write_text(json.dumps(sys.argv))

def save(number, frame):
    pathlib.Path(f"signalled-{{node}}").touch()
    pathlib.Path(os.environ["SCALE_SFT_REQUEUE_FILE"]).touch()
    sys.exit(1)

behaviour = os.environ["BEHAVIOUR"]
if behaviour == "fail":
    print("error: something is wrong on node", node)
    time.sleep(int(node))
    sys.exit(3)
if behaviour == "save on signal" and starts == 0:
    signal.signal(signal.SIGUSR1, save)
    time.sleep(60)
if behaviour == "ignore signal":
    time.sleep(4)
"""


@pytest.fixture
def submit(slurm, tmp_path):
    python = tmp_path / "venv" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.write_text(LAUNCHER)
    python.chmod(0o755)
    (tmp_path / "recipe.yaml").write_text("")

    def run(*options, behaviour="succeed", **environment):
        return slurm.submit(
            *options, SBATCH, "recipe.yaml", "--steps", "3", cwd=tmp_path, SCALE_SFT_VENV=str(tmp_path / "venv"),
            BEHAVIOUR=behaviour, **environment,
        )  # fmt: skip

    return run


def started(tmp_path, node, restarts=0):
    """Arguments of the launcher of a node, as soon as it runs."""
    path = tmp_path / f"arguments-{node}-{restarts}.json"
    deadline = time.monotonic() + 30
    while not path.exists() or not path.read_text():
        assert time.monotonic() < deadline, f"the launcher of node {node} did not start"
        time.sleep(0.1)
    return json.loads(path.read_text())


def test_slurm_accepts_the_script_as_it_is_shipped(slurm, tmp_path):
    done = slurm.script("run", "sbatch", "--test-only", SBATCH, "recipe.yaml", cwd=tmp_path)
    assert done.returncode == 0, done.stderr


def test_nodes_gpus_and_address_come_from_slurm(slurm, submit, tmp_path):
    job = submit("--gpus-per-node=4", SCALE_SFT_CPU="", SCALE_SFT_PROCS_PER_NODE="")
    log = tmp_path / f"slurm-{job}.log"
    assert "JobState=COMPLETED" in slurm.wait(job, 60), log.read_text()
    expected = {"--num_machines": "2", "--num_processes": "8", "--main_process_ip": "n1"}
    expected["--main_process_port"] = str(20000 + int(job))
    for node in ("0", "1"):
        arguments = started(tmp_path, node)
        values = dict(itertools.pairwise(arguments))
        assert {key: values[key] for key in expected} == expected
        assert values["--machine_rank"] == node
        assert values["--deepspeed_config_file"].endswith("ds_configs/zero3.json")
        assert arguments[-4:] == ["--config", "recipe.yaml", "--steps", "3"]


def test_a_preempted_job_saves_and_starts_again(slurm, submit, tmp_path):
    job = submit(behaviour="save on signal")
    for node in (0, 1):
        started(tmp_path, node)
    urgent = ("--partition=high", "--nodes=2", "--exclusive", "--output=urgent", "--wrap=true")
    slurm.wait(slurm.submit(*urgent, cwd=tmp_path), 60)
    started(tmp_path, 0, restarts=1)
    ended = slurm.wait(job, 60)
    log = (tmp_path / f"slurm-{job}.log").read_text()
    assert "JobState=COMPLETED" in ended and "Restarts=1" in ended, ended + log
    assert (tmp_path / "signalled-0").exists() and (tmp_path / "signalled-1").exists()
    assert "start 1:" in log and "telling the trainer to save" in log and "start 2:" in log and log.endswith("done\n")


def test_a_run_that_reaches_its_end_after_the_signal_is_done(slurm, submit, tmp_path):
    job = submit(behaviour="ignore signal")
    started(tmp_path, 1)
    slurm.script("run", "scancel", "--batch", "--signal=USR1", job)
    ended = slurm.wait(job, 60)
    assert "JobState=COMPLETED" in ended and "Restarts=0" in ended, ended
    assert "telling the trainer to save" in (tmp_path / f"slurm-{job}.log").read_text()


def test_a_failure_ends_the_job_and_is_shown(slurm, submit, tmp_path):
    job = submit(behaviour="fail")
    ended = slurm.wait(job, 60)
    log = (tmp_path / f"slurm-{job}.log").read_text()
    assert "JobState=FAILED" in ended and "Restarts=0" in ended, ended + log
    assert "error: something is wrong on node 0" in log


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        ((), "no recipe given"),
        (("--steps", "3"), "no recipe given"),
        (("none.yaml",), "recipe none.yaml: no such file"),
    ],
)
def test_a_missing_recipe_is_named(slurm, tmp_path, arguments, reason):
    job = slurm.submit(SBATCH, *arguments, cwd=tmp_path)
    assert "JobState=FAILED" in slurm.wait(job, 60)
    assert reason in (tmp_path / f"slurm-{job}.log").read_text()
