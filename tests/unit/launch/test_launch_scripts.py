"""The launch folder: scripts that parse and say in one line what is wrong, configurations that load."""

import json
import os
import shutil
import subprocess
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[3]
SCRIPTS = [*sorted((ROOT / "launch").glob("*.sh")), *sorted((ROOT / "launch").glob("*.sbatch")), ROOT / ".ci" / "run"]
ACCELERATE_CONFIGS = sorted((ROOT / "launch").glob("*.yaml"))
DS_CONFIGS = sorted((ROOT / "ds_configs").glob("*.json"))
SYSTEM_TOOLS = ("bash", "awk", "basename", "cat", "cksum", "cp", "cut", "df", "dirname", "env", "grep", "mkdir", "rm",
                "sed", "sleep", "tail", "touch")  # fmt: skip

# Stands in for a Python 3.10+: makes "virtual environments" with a copy of itself and notes what it is asked to do.
FAKE_PYTHON = """#!/usr/bin/env bash
case "$*" in
    -c*version_info*) exit 0 ;;
    -c*ensurepip*) exit "${FAKE_VENV_MODULE:-0}" ;;
    *venv*--clear*) for venv; do :; done; rm -rf "$venv"; mkdir -p "$venv/bin"; cp "$0" "$venv/bin/python" ;;
    *pip*--version*) exit 0 ;;
    *pip*install*) echo "$*" >> "$CALLS"; echo "some noise"; echo "$FAKE_PIP_ERROR"; [ -z "$FAKE_PIP_ERROR" ] ;;
    *launcher.py*) echo "$*"; while [ "$1" != --output_dir ]; do shift; done; mkdir -p "$2/merged"; exit "${FAKE_STATUS:-0}" ;;
    *) exit 9 ;;
esac
"""


@pytest.fixture
def project(tmp_path):
    """A copy of the project without its package, in a folder whose name has a space."""
    project = tmp_path / "a project"
    shutil.copytree(ROOT / "launch", project / "launch")
    for name in ("pyproject.toml", "constraints.txt"):
        shutil.copy(ROOT / name, project)
    return project


@pytest.fixture
def quickstart(project, tmp_path):
    """Runs the copy's quickstart from another folder, with the system's tools and a fake python3 as the only programs."""
    path = tmp_path / "path"
    path.mkdir()
    for tool in SYSTEM_TOOLS:
        if found := shutil.which(tool):
            (path / tool).symlink_to(found)
    python = path / "python3"
    python.write_text(FAKE_PYTHON)
    python.chmod(0o755)
    environment = {"PATH": str(path), "CALLS": str(tmp_path / "calls"), "FAKE_PIP_ERROR": "", "HOME": str(tmp_path)}

    def run(*arguments, without_python=False, **more):
        if without_python:
            python.unlink()
        return subprocess.run(
            [str(project / "launch" / "quickstart.sh"), *arguments],
            env={**environment, **more}, cwd="/", stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=60,
            check=False,
        )  # fmt: skip

    run.installations = lambda: Path(environment["CALLS"]).read_text().count("pip install")
    return run


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.name)
def test_script_parses(script):
    subprocess.run(["bash", "-n", str(script)], check=True)


@pytest.mark.skipif(not shutil.which("shellcheck"), reason="shellcheck is not installed")
@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.name)
def test_script_passes_shellcheck(script):
    done = subprocess.run(
        ["shellcheck", "-x", "-S", "warning", "-s", "bash", script], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize(
    ("circumstances", "reason"),
    [
        ({"without_python": True}, "no Python 3.10 or newer"),
        ({"PYTHON": "/no/such/python"}, "PYTHON=/no/such/python is not a Python 3.10 or newer"),
        ({"FAKE_VENV_MODULE": "1"}, "python3 cannot make virtual environments"),
        ({"SCALE_SFT_REQUIRED_GB": "999999"}, "not enough disk space"),
    ],
    ids=["no python", "wrong PYTHON", "no venv module", "no disk space"],
)
def test_quickstart_says_in_one_line_why_it_cannot_start(quickstart, project, circumstances, reason):
    done = quickstart(**circumstances)
    assert done.returncode != 0
    assert (done.stdout + done.stderr).count("\n") == 1
    assert reason in done.stderr
    assert not (project / ".venv").exists()


def test_quickstart_shows_the_last_error_of_pip_and_where_its_log_is(quickstart, project):
    done = quickstart(FAKE_PIP_ERROR="ERROR: No matching distribution found for torch")
    assert done.returncode != 0
    [line] = done.stderr.splitlines()
    assert "No matching distribution found for torch" in line
    assert str(project / "install.log") in line


def test_quickstart_installs_once_and_gives_every_run_its_own_folder(quickstart, project):
    first = quickstart("--steps", "3")
    assert first.returncode == 0, first.stderr
    [started] = [line for line in first.stdout.splitlines() if "launcher.py" in line]
    assert started.endswith("--steps 3")
    second = quickstart()
    assert second.returncode == 0, second.stderr
    assert sorted(folder.name for folder in (project / "runs").iterdir()) == ["demo", "demo-2"]
    assert quickstart.installations() == 1


def test_quickstart_ends_with_commands_that_name_what_the_run_has_left(quickstart, project):
    told = quickstart().stdout
    assert f"source '{project}/.venv/bin/activate'" in told
    assert f"scale-sft inspect '{project}/runs/demo/adapter'" in told
    assert "mine/merged" in quickstart("--output_dir", "mine").stdout
    assert "scale-sft train --config demo" in told


@pytest.mark.parametrize("status", ["1", "75", "143"])
def test_quickstart_ends_with_the_status_of_the_trainer_and_proposes_nothing_then(quickstart, status):
    failed = quickstart(FAKE_STATUS=status)
    assert failed.returncode == int(status)
    assert "What next" not in failed.stdout


def test_quickstart_installs_again_when_the_pins_change(quickstart, project):
    quickstart()
    with (project / "constraints.txt").open("a") as constraints:
        constraints.write("# another pin\n")
    quickstart()
    assert quickstart.installations() == 2


def test_quickstart_repairs_an_installation_that_was_cut_off(quickstart, project):
    assert quickstart(FAKE_PIP_ERROR="ERROR: cut off").returncode != 0
    (project / ".venv" / "leftover").touch()
    assert quickstart().returncode == 0
    assert not (project / ".venv" / "leftover").exists()


def test_quickstart_replaces_a_venv_without_a_working_python(quickstart, project):
    (project / ".venv").mkdir()
    assert quickstart().returncode == 0


def test_quickstart_rebuilds_the_venv_of_a_moved_project(quickstart, project):
    quickstart()
    stamp = project / ".venv" / ".installed"
    stamp.write_text(stamp.read_text().replace(str(project), "/where/it/was"))
    (project / ".venv" / "leftover").touch()
    assert quickstart().returncode == 0
    assert not (project / ".venv" / "leftover").exists()


@pytest.mark.parametrize("config", ACCELERATE_CONFIGS, ids=lambda config: config.name)
def test_accelerate_loads_its_configuration(config):
    from accelerate.commands.config.config_args import load_config_from_file

    loaded = load_config_from_file(str(config))
    if "2proc" in config.name:
        assert loaded.num_processes == 2
        assert set(loaded.gpu_ids.split(",")) == {"-1"}, "a CPU configuration must hide the GPUs"
    if "zero3" in config.name:
        assert loaded.distributed_type == "DEEPSPEED"
        assert loaded.use_cpu is False, "use_cpu switches DeepSpeed off without a word"
        assert loaded.deepspeed_config["zero3_init_flag"] is True
        assert (ROOT / loaded.deepspeed_config["deepspeed_config_file"]).is_file()
    if loaded.num_machines > 1:
        assert loaded.deepspeed_config["deepspeed_multinode_launcher"] == "standard"
        assert loaded.rdzv_backend == "static"


@pytest.mark.parametrize("config", DS_CONFIGS, ids=lambda config: config.name)
def test_deepspeed_configuration_shards_the_weights_and_every_field_is_explained(config):
    settings = json.loads(config.read_text())
    assert settings["zero_optimization"]["stage"] == 3
    readme = (ROOT / "ds_configs" / "README.md").read_text()
    assert config.name in readme

    def leaves(node):
        for key, value in node.items():
            yield from leaves(value) if isinstance(value, dict) else [key]

    assert [key for key in leaves(settings) if key not in readme] == []


def test_every_yaml_of_the_launch_folder_is_a_mapping():
    assert all(isinstance(yaml.safe_load(config.read_text()), dict) for config in ACCELERATE_CONFIGS)


def test_scripts_are_executable():
    runnable = [script for script in SCRIPTS if script.suffix != ".sbatch" and script.name != "lib.sh"]
    assert [script.name for script in runnable if not os.access(script, os.X_OK)] == []
