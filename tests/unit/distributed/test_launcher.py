"""The quiet launcher: one line for what went wrong, the trainer's own status, signals passed on."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from scale_sft.distributed import launcher
from scale_sft.errors import UserError
from tests.forked import begin, finish

ROOT = Path(__file__).resolve().parents[3]

# Stands in for the trainer: ends as its first argument says.
PROGRAM = """
import os, signal, sys, time
rank = int(os.environ.get("RANK", 0))
if sys.argv[1] == "save":
    signal.signal(signal.SIGTERM, lambda *_: (open(f"saved-{rank}", "w"), time.sleep(2), sys.exit(75)))
    open(f"ready-{rank}", "w")
    time.sleep(60)
print("error: what the trainer says", file=sys.stderr, flush=True)
time.sleep(3 * rank)
if sys.argv[1] == "die":
    os.kill(os.getpid(), signal.SIGKILL)
sys.exit(int(sys.argv[1]))
"""


@pytest.fixture
def start(tmp_path):
    """(accelerate configuration, argument of the program, ...) -> the launcher, as a file, at work in a new folder."""
    (tmp_path / "program.py").write_text(PROGRAM)

    def run(config: str, *arguments: str) -> subprocess.Popen:
        return subprocess.Popen(
            [sys.executable, ROOT / "scale_sft" / "distributed" / "launcher.py", "--config_file",
             ROOT / "launch" / config, "program.py", *arguments],
            cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )  # fmt: skip

    return run


def launch_in(folder: Path, *arguments: str) -> None:
    """Be the launcher, in a forked process: it says on `output` and `errors` of the folder what it says."""
    for number, name in ((1, "output"), (2, "errors")):
        os.dup2(os.open(folder / name, os.O_WRONLY | os.O_CREAT), number)
    os.chdir(folder)
    sys.exit(launcher.launch(arguments))


@pytest.mark.slow
@pytest.mark.parametrize("config", ["single_gpu.yaml", "cpu_2proc.yaml"])
@pytest.mark.parametrize(
    ("argument", "status", "more"),
    [("0", 0, None), ("1", 1, None), ("75", 75, None), ("die", 137, "was ended by SIGKILL (often: out of memory)")],
)
def test_the_status_is_the_trainers_and_nothing_is_added_to_its_words(tmp_path, config, argument, status, more) -> None:
    (tmp_path / "program.py").write_text(PROGRAM)
    words = ["--config_file", str(ROOT / "launch" / config), "program.py", argument]
    process = begin(launch_in, tmp_path, *words, log=tmp_path / "log")
    assert finish(process, 100) == status, (tmp_path / "errors").read_text()
    errors = (tmp_path / "errors").read_text().replace("error: what the trainer says", "")
    added = [line for line in errors.splitlines() if line]
    assert (tmp_path / "output").read_text() == "" and len(added) == (1 if more else 0), errors
    assert not more or more in added[0]


@pytest.mark.slow
@pytest.mark.parametrize("config", ["single_gpu.yaml", "cpu_2proc.yaml"])
def test_a_signal_reaches_every_rank_and_the_status_says_that_it_has_saved(start, tmp_path, config) -> None:
    process = start(config, "save")
    ranks = 2 if "2proc" in config else 1
    deadline = time.monotonic() + 60
    while len(list(tmp_path.glob("ready-*"))) < ranks and time.monotonic() < deadline:
        time.sleep(0.2)
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 75, errors
    assert len(list(tmp_path.glob("saved-*"))) == ranks
    assert errors == ""


def test_more_processes_than_gpus_are_refused(monkeypatch) -> None:
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    with pytest.raises(UserError, match=r"nproc: got 3, but this machine has 2 GPUs. Fix: --nproc 2"):
        launcher.launch_here([], processes=3)


@pytest.mark.parametrize(("gpus", "config", "ds_config"), [(0, "cpu_2proc", "zero3_cpu"), (4, "multi_gpu", "zero3")])
def test_the_machine_chooses_the_launch_file(monkeypatch, gpus, config, ds_config) -> None:
    asked: list[str] = []
    monkeypatch.setattr("torch.cuda.device_count", lambda: gpus)
    monkeypatch.setattr(launcher, "launch", lambda arguments: asked.extend(arguments) or 0)
    monkeypatch.setattr(launcher.os, "environ", {})
    assert launcher.launch_here(["--config=demo"], processes=3) == 0
    assert asked[1].endswith(f"launch/{config}.yaml")
    assert asked[2:] == ["--num_processes", "3", "-m", "scale_sft.train", "--config=demo"]
    assert launcher.os.environ["ACCELERATE_DEEPSPEED_CONFIG_FILE"].endswith(f"ds_configs/{ds_config}.json")
