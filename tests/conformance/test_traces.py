"""Traces are reproduced: those recorded beside the project, and fresh ones of a dense reference."""

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from safetensors import safe_open
from safetensors.torch import save_file

HERE = Path(__file__).parent


def load_file(name: str):
    """A module of this folder, by its file."""
    spec = importlib.util.spec_from_file_location(name, HERE / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


reference, run_trace = load_file("reference"), load_file("run_trace")
Setting = reference.Setting


def replay(trace: Path, *options: str) -> tuple[int, str]:
    """Exit code and output of the runner, in this process."""
    result = CliRunner().invoke(run_trace.main, [str(trace), *options])
    return result.exit_code, result.output


def assert_reproduced(trace: Path, *options: str) -> None:
    code, output = replay(trace, *options)
    assert code == 0, output
    overlaps = re.findall(r"indices +([\d.]+)%", output)
    errors = re.findall(r"delta error (\S+)", output)
    assert len(overlaps) > 1 and {float(value) for value in overlaps} == {100.0}
    assert max(float(value) for value in errors) <= 1e-5
    assert ": reproduced on 1 rank(s)" in output


SETTINGS = {
    "ag": Setting(algorithm="ag", weight_decay=0.1),
    "ag, estimation fills the interval": Setting(algorithm="ag", interval=3, estimation=3, density=0.3, seed=1),
    "ag, one step of estimation": Setting(
        algorithm="ag", interval=5, estimation=1, layers=3, learning_rate=0.05, seed=2
    ),
    "ag, candidates run short": Setting(algorithm="ag", interval=2, estimation=1, density=0.9, rate=1.0, seed=3),
    "ag, everything active": Setting(algorithm="ag", density=1.0, learning_rate=1e-3, seed=4),
    "ag, tied, two kinds of layers": Setting(algorithm="ag", tied=True, targets=["q_proj", "down_proj"], seed=5),
    "ag, other betas": Setting(algorithm="ag", betas=(0.8, 0.95), eps=1e-6, hidden=64, layers=1, seed=12),
    "static": Setting(algorithm="static", weight_decay=0.05, seed=7),
    "static, reallocation at the last step": Setting(algorithm="static", total_steps=4, estimation=4, seed=8),
    "ma": Setting(algorithm="ma", weight_decay=0.1, seed=9),
    "ma, dense": Setting(algorithm="ma", interval=3, estimation=3, density=0.6, rate=0.9, learning_rate=0.05, seed=10),
    "ma, deep": Setting(algorithm="ma", layers=3, interval=5, estimation=1, density=0.02, seed=11),
}


@pytest.mark.parametrize("case", SETTINGS)
def test_a_dense_reference_is_reproduced(case: str, tmp_path: Path) -> None:
    reference.make_trace(tmp_path / "trace.safetensors", SETTINGS[case])
    assert_reproduced(tmp_path / "trace.safetensors")


@pytest.mark.parametrize("method", ["ag", "ma"])
@pytest.mark.parametrize("options", [(), ("--checkpointing",)])
def test_the_recorded_traces_are_reproduced(shared, method: str, options: tuple[str, ...]) -> None:
    assert_reproduced(shared(f"traces/{method}.safetensors"), *options)


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("trace") / "trace.safetensors"
    reference.make_trace(path, Setting(algorithm="ag", total_steps=7, layers=1))
    return path


def move_a_delta(tensors: dict, settings: dict) -> None:
    tensors["step006/deltas/model.layers.0.mlp.up_proj"][5] += 2e-5


def move_an_index(tensors: dict, settings: dict) -> None:
    indices = tensors["step002/indices/model.layers.0.self_attn.q_proj"]
    free = min(set(range(1024)) - set(indices.tolist()))
    indices[3] = free
    indices.copy_(indices.sort().values)


def lose_an_index(tensors: dict, settings: dict) -> None:
    for kind in ("indices", "deltas"):
        name = f"step006/{kind}/model.layers.0.mlp.up_proj"
        tensors[name] = tensors[name][:-1].clone()


def move_a_loss(tensors: dict, settings: dict) -> None:
    tensors["losses"][3] *= 1.001


def make_a_delta_no_number(tensors: dict, settings: dict) -> None:
    tensors["step006/deltas/model.layers.0.mlp.up_proj"][5] = torch.nan


def record_nothing(tensors: dict, settings: dict) -> None:
    for name in [name for name in tensors if name.startswith("step")]:
        del tensors[name]


def record_a_step_that_is_never_reached(tensors: dict, settings: dict) -> None:
    for name in [name for name in tensors if name.startswith("step006")]:
        tensors[name.replace("step006", "step009")] = tensors[name].clone()


def other_setting(key: str, value: str):
    def change(tensors: dict, settings: dict) -> None:
        assert settings[key] != value
        settings[key] = value

    change.__name__ = f"another_{key}"
    return change


CHANGES = [
    move_a_delta,
    move_an_index,
    lose_an_index,
    move_a_loss,
    make_a_delta_no_number,
    record_nothing,
    record_a_step_that_is_never_reached,
    other_setting("algorithm", "ma"),
    other_setting("learning_rate", "0.011"),
    other_setting("weight_decay", "0.5"),
    other_setting("update_interval", "3"),
    other_setting("gradient_estimation_steps", "1"),
    other_setting("initial_replacement_rate", "0.9"),
]


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_a_trace_that_was_changed_is_not_reproduced(good: Path, tmp_path: Path, change) -> None:
    with safe_open(good, "pt") as file:
        tensors, settings = {name: file.get_tensor(name) for name in file.keys()}, dict(file.metadata())  # noqa: SIM118
    change(tensors, settings)
    save_file(tensors, tmp_path / "changed.safetensors", metadata=settings)
    code, output = replay(tmp_path / "changed.safetensors")
    assert code == 1, output


def test_the_unchanged_trace_is_reproduced(good: Path) -> None:
    assert_reproduced(good)


@pytest.mark.slow
def test_the_runner_is_a_command_of_its_own(good: Path, tmp_path: Path) -> None:
    run = subprocess.run(
        [sys.executable, str(HERE / "run_trace.py"), str(good)], cwd=tmp_path, env=dict(os.environ),
        capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert run.returncode == 0 and "reproduced on 1 rank(s)" in run.stdout, run.stderr
