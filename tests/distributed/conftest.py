"""Starting runs on several ranks (gloo, CPU), with a time-out on everything."""

import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.forked import begin_ranks, finish_together

from . import worker

ROOT = Path(__file__).resolve().parents[2]
STRICT = "ds_configs/zero3_cpu.json"
"""Releases every weight at once: nothing may rely on a weight that happens to be still gathered."""

COMMON = {
    "base": "demo",
    "dtype": "float32",
    "method": "ag",
    "max_train_examples": 200,
    "density": 0.03,
    "learning_rate": 1e-2,
    "steps": 11,
    "global_batch_size": 8,
    "update_interval_steps": 4,
    "estimation_steps": 2,
    "log_every_steps": 1,
}


def environment(home: Path) -> dict[str, str]:
    """No GPU, no network, one thread per rank, caches in a temporary folder."""
    return os.environ | {
        "CUDA_VISIBLE_DEVICES": "",
        "HF_HUB_OFFLINE": "1",
        "HF_HOME": str(home),
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": str(ROOT),
        "TQDM_DISABLE": "1",
    }


def command(ranks: int, sharded: bool, *script: str) -> list[str]:
    """`accelerate launch` of a script on CPU ranks of this machine, by the shipped configurations."""
    name = "cpu_zero3_2proc.yaml" if sharded else "cpu_2proc.yaml"
    launcher = [sys.executable, "-m", "accelerate.commands.launch"]
    if ranks == 1 and not sharded:
        return [*launcher, "--num_processes", "1", "--cpu", *script]
    return [*launcher, "--config_file", f"launch/{name}", "--num_processes", str(ranks), *script]


@pytest.fixture(scope="session")
def hf_home(tmp_path_factory):
    return tmp_path_factory.mktemp("hf_home")


@pytest.fixture(scope="session")
def on_ranks(tmp_path_factory):
    """on_ranks(ranks, sharded, target, *arguments) -> statuses of the forked ranks, and what they printed."""

    def run(ranks: int, sharded: bool, target: Callable[..., None], *arguments: Any) -> tuple[list[int], str]:
        log = tmp_path_factory.mktemp("log") / "log"
        statuses = finish_together(begin_ranks(ranks, target, *arguments, log=log, sharded=sharded))
        return statuses, log.read_text()

    return run


@pytest.fixture
def one_and_two_ranks(on_ranks, tmp_path):
    """one_and_two_ranks(target, *arguments) -> what each of two ranks left in the folder, its last argument.

    Both have the same deltas, and those of one rank.
    """

    def run(target: Callable[..., None], *arguments: Any) -> tuple[dict, dict]:
        for ranks in (1, 2):
            statuses, text = on_ranks(ranks, False, target, *arguments, str(tmp_path))
            assert statuses == [0] * ranks, text
        alone, first, second = (torch.load(tmp_path / f"{name}.pt") for name in ("0of1", "0of2", "1of2"))
        for name, deltas in first["deltas"].items():
            assert torch.equal(deltas, second["deltas"][name])
            assert torch.equal(first["indices"][name], second["indices"][name])
            assert torch.equal(first["indices"][name], alone["indices"][name])
            torch.testing.assert_close(deltas, alone["deltas"][name], rtol=0, atol=1e-4)
        return first, second

    return run


@pytest.fixture(scope="session")
def launch_runs(tmp_path_factory, on_ranks):
    """launch_runs(ranks, sharded, [options, ...], report=False) -> the run folders, in order; `report`: of the first."""

    def run(ranks: int, sharded: bool, runs: list[dict], report: bool = False) -> list[Path]:
        folder = tmp_path_factory.mktemp(f"ranks{ranks}")
        placement = {"base_placement": "shard", "ds_config": STRICT} if sharded else {"base_placement": "replicate"}
        outputs = [folder / f"run{number}" for number in range(len(runs))]
        plan = [
            COMMON | placement | options | {"output_dir": str(output)}
            for options, output in zip(runs, outputs, strict=True)
        ]
        statuses, text = on_ranks(ranks, sharded, worker.run_all, plan, report)
        assert statuses == [0] * ranks, text[-9000:]
        return outputs

    return run
