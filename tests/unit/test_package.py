"""The package as it is installed: what is written in two places is equal, and the wheel works outside of the clone."""

import json
import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

from scale_sft.distributed.sharding import DEFAULT_DS_CONFIG, read_ds_config
from scale_sft.errors import UserError
from scale_sft.version import __version__

ROOT = Path(__file__).resolve().parents[2]
SHORT = ("--steps", "4", "--eval_data", "none", "--exact_match_examples", "0", "--save_merged", "false")
SOURCES = ("scale_sft", "launch", "ds_configs", "pyproject.toml", "setup.py", "MANIFEST.in", "README.md", "LICENSE")


def test_the_default_zero3_of_the_package_is_that_of_ds_configs() -> None:
    assert json.loads(DEFAULT_DS_CONFIG.read_text()) == json.loads((ROOT / "ds_configs" / "zero3.json").read_text())


def test_a_shipped_deepspeed_configuration_is_found_from_any_folder(tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert read_ds_config("ds_configs/zero3_cpu.json")["zero_optimization"]["stage3_max_live_parameters"] == 0
    with pytest.raises(UserError, match="no such file: mine.json; shipped ones: ds_configs/zero3.json"):
        read_ds_config("mine.json")


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """(program, argument, ...) -> a program of a new environment in which the wheel is installed, in an empty folder.

    The environment borrows the libraries of this one, but not its editable installation of the package.
    """
    folder = tmp_path_factory.mktemp("wheel")
    (folder / "source").mkdir()
    for name in SOURCES:  # a copy: building leaves files behind
        copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copyfile
        copy(ROOT / name, folder / "source" / name)
    quiet = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "RANK", "WORLD_SIZE")}
    environment = quiet | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "-q"]

    def call(*command: str | Path, check: bool = True, cwd: Path = folder) -> subprocess.CompletedProcess:
        done = subprocess.run(
            [str(part) for part in command], cwd=cwd, env=environment, capture_output=True, text=True, timeout=300,
            check=False,
        )  # fmt: skip
        assert not check or done.returncode == 0, done.stdout + done.stderr
        return done

    offline = ("--no-index", "--no-deps")
    call(*pip, "wheel", "--no-build-isolation", *offline, "-w", folder, folder / "source")
    call(sys.executable, "-m", "venv", "--without-pip", folder / "venv")
    python = folder / "venv" / "bin" / "python"
    [wheel] = folder.glob("*.whl")
    call(*pip, "--python", python, "install", *offline, wheel)
    [site_packages] = (folder / "venv").glob("lib/python*/site-packages")
    borrowed = dict.fromkeys(sysconfig.get_path(kind) for kind in ("purelib", "platlib"))
    (site_packages / "borrowed.pth").write_text("".join(f"{path}\n" for path in borrowed))
    work = folder / "work"
    work.mkdir()

    def run(program: str, *arguments: str, check: bool = True) -> subprocess.CompletedProcess:
        return call(folder / "venv" / "bin" / program, *arguments, check=check, cwd=work)

    run.folder, run.site_packages = work, site_packages
    return run


@pytest.mark.slow
def test_the_wheel_trains_shards_and_plans_outside_of_the_clone_with_the_launch_files_it_carries(installed) -> None:
    where = installed(
        "python", "-c", "import scale_sft, scale_sft.files as f; print(scale_sft.__file__, f.LAUNCH_FILES)"
    )
    assert where.stdout.count(str(installed.site_packages)) == 2

    installed("scale-sft", "launch-files", "cp", ".")
    copied = {str(file.relative_to(installed.folder)) for name in ("launch", "ds_configs")
              for file in (installed.folder / name).iterdir()}  # fmt: skip
    shipped = [*ROOT.glob("launch/*.yaml"), *ROOT.glob("launch/*.sbatch"), *ROOT.glob("ds_configs/*")]
    assert copied == {str(file.relative_to(ROOT)) for file in shipped}

    done = installed(
        "python", "-m", "accelerate.commands.launch", "--config_file", "launch/single_gpu.yaml", "-m", "scale_sft.train",
        "--config", "demo", *SHORT, "--output_dir", "one",
    )  # fmt: skip
    assert "done: 4 steps" in done.stdout
    sharded = installed(
        "scale-sft", "train", "--config", "demo", *SHORT, "--output_dir", "two", "--nproc", "2", "--base_placement", "shard"
    )  # fmt: skip
    assert "rank 1 of 2" in sharded.stdout and "base shard" in sharded.stdout
    read = lambda name: (installed.folder / name / "adapter" / "adapter_model.safetensors").stat().st_size
    assert read("one") == read("two")

    planned = installed(
        "scale-sft", "plan", "--shape", "70b", "--density", "0.01", "--global_batch_size", "64", "--micro_batch_size", "1",
        "--gradient_checkpointing", "true", "--gpus", "64", "--gpu-memory", "80",
    )  # fmt: skip
    assert "fits:" in planned.stdout


@pytest.mark.slow
def test_an_error_of_a_run_in_two_processes_is_one_line_with_the_trainers_status(installed) -> None:
    failed = installed(
        "scale-sft", "train", "--config", "demo", "--nproc", "2", "--base", "/no/model", "--output_dir", "three", check=False
    )  # fmt: skip
    assert failed.returncode == 1 and failed.stdout == ""
    [line] = [line for line in failed.stderr.splitlines() if line.strip()]
    assert line.startswith("error: base: '/no/model'")


@pytest.mark.slow
def test_the_metadata_are_complete(installed) -> None:
    code = "from importlib.metadata import metadata; print(metadata('scale_sft').as_string())"
    told = installed("python", "-c", code).stdout
    for line in (f"Version: {__version__}", "License-Expression: Apache-2.0", "License-File: LICENSE",
                 "Author: scale_sft developers", "Keywords: ", "Classifier: Typing :: Typed"):  # fmt: skip
        assert f"\n{line}" in told
    assert "\nHome-page:" not in told and "\nProject-URL:" not in told
    assert (installed.site_packages / "scale_sft" / "py.typed").is_file()
    [license_text] = installed.site_packages.glob("scale_sft-*.dist-info/licenses/LICENSE")
    assert license_text.read_text() == (ROOT / "LICENSE").read_text()
