"""A real two-node Slurm on this machine (../shared/slurm/mini-slurm.sh): nodes n1 and n2 with their own addresses."""

import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SHARED = ROOT.parent / "shared" / "slurm"
SBATCH = ROOT / "launch" / "slurm_multinode.sbatch"


def why_not() -> str | None:
    """What keeps Slurm from being started here, or None."""
    if not (SHARED / "mini-slurm.sh").is_file():
        return "no ../shared/slurm/mini-slurm.sh beside the checkout"
    if os.geteuid() != 0:
        return "a two-node Slurm needs root (network namespaces)"
    for program in ("slurmctld", "slurmd", "sbatch", "ip", "unshare"):
        if not shutil.which(program):
            return f"{program} is not installed (Debian: slurmctld slurmd slurm-client iproute2)"
    allowed = subprocess.run(["unshare", "--net", "--uts", "--mount", "true"], capture_output=True, check=False)
    return None if allowed.returncode == 0 else f"namespaces are not allowed here: {allowed.stderr.decode().strip()}"


class Slurm:
    """Commands on the first node. Everything that waits has a time-out."""

    def __init__(self, folder: Path, home: Path):
        self.folder = folder
        self.jobs: list[str] = []
        quiet = {name: value for name, value in os.environ.items() if not name.startswith(("SLURM_", "SCALE_SFT_"))}
        self.environment = quiet | {
            "CUDA_VISIBLE_DEVICES": "",
            "HF_HUB_OFFLINE": "1",
            "HF_HOME": str(home),
            "OMP_NUM_THREADS": "1",
            "TQDM_DISABLE": "1",
            "SCALE_SFT_VENV": sys.prefix,
            "SCALE_SFT_CPU": "1",
            "SCALE_SFT_PROCS_PER_NODE": "1",
        }

    def script(self, action: str, *arguments: str, timeout: float = 60, cwd: Path = ROOT, **environment: str):
        return subprocess.run(
            [SHARED / "mini-slurm.sh", action, self.folder, *map(str, arguments)], cwd=cwd,
            env=self.environment | environment, capture_output=True, text=True, timeout=timeout, check=False,
            stdin=subprocess.DEVNULL,
        )  # fmt: skip

    def submit(self, *arguments: str | Path, cwd: Path, **environment: str) -> str:
        """The number of a submitted job; arguments are those of sbatch."""
        done = self.script("run", "sbatch", "--parsable", *arguments, cwd=cwd, **environment)
        assert done.returncode == 0, done.stderr
        self.jobs.append(done.stdout.strip())
        return self.jobs[-1]

    def wait(self, job: str, timeout: float = 300) -> str:
        """What `scontrol show job` says when the job has ended."""
        done = self.script("run", "timeout", str(timeout), SHARED / "waitjob.sh", job, timeout=timeout + 30)
        assert done.returncode != 124, f"job {job} did not end in {timeout} s"
        return done.stdout

    def state(self, job: str) -> str:
        """One line of all that Slurm knows about a job."""
        return self.script("run", "scontrol", "show", "job", job, "--oneliner").stdout

    def stop(self) -> None:
        """End what still runs, then the nodes."""
        if self.jobs:
            self.script("run", "scancel", *self.jobs)
        deadline = time.monotonic() + 30
        while self.script("run", "squeue", "--noheader").stdout.strip() and time.monotonic() < deadline:
            time.sleep(0.2)
        self.script("down")


@pytest.fixture(scope="session")
def slurm(tmp_path_factory):
    if reason := why_not():
        pytest.skip(reason)
    cluster = Slurm(tmp_path_factory.mktemp("slurm") / "c", tmp_path_factory.mktemp("hf_home"))
    try:
        up = cluster.script("up", timeout=90)
        assert up.returncode == 0, up.stderr
        yield cluster
    finally:
        cluster.stop()
