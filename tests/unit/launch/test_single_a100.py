"""launch/single_a100.sh: what it says without a GPU, and what it starts."""

import os
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]


@pytest.fixture
def script(tmp_path):
    """Runs the script with a Python that only prints its arguments, where no GPU is visible."""
    fake = tmp_path / "venv" / "bin" / "python"
    fake.parent.mkdir(parents=True)
    fake.write_text('#!/bin/sh\nprintf "%s\\n" "$@"\n')
    fake.chmod(0o755)
    tools = tmp_path / "tools"
    tools.mkdir()
    (tools / "nvidia-smi").write_text("#!/bin/sh\nexit 1\n")
    (tools / "nvidia-smi").chmod(0o755)

    base = {**os.environ, "PATH": f"{tools}:{os.environ['PATH']}", "SCALE_SFT_VENV": str(tmp_path / "venv")}

    def run(*arguments, **environment):
        return subprocess.run(
            [str(ROOT / "launch" / "single_a100.sh"), *arguments], cwd=tmp_path, capture_output=True, text=True,
            timeout=60, check=False, env={**base, **environment},
        )  # fmt: skip

    return run


def test_without_a_gpu_it_says_so_in_one_line(script):
    done = script()
    assert done.returncode == 1 and done.stdout == ""
    [line] = done.stderr.splitlines()
    assert line.startswith("single_a100: no GPU here") and "SCALE_SFT_ALLOW_CPU=1" in line


def test_a_missing_recipe_is_named_before_anything_else(script):
    done = script("my recipe.yaml")
    assert done.returncode == 1
    assert done.stderr.startswith("single_a100: recipe my recipe.yaml: no such file")


def test_the_papers_7b_recipe_is_the_default_and_options_come_last(script):
    done = script("--steps", "3", SCALE_SFT_ALLOW_CPU="1")
    assert done.returncode == 0, done.stderr
    arguments = done.stdout.splitlines()
    assert arguments[arguments.index("--config") + 1] == str(ROOT / "scale_sft" / "recipes" / "llama2_7b_ag.yaml")
    assert arguments[-2:] == ["--steps", "3"]
    assert "deepspeed" not in done.stdout


def test_another_recipe_is_taken_from_the_current_folder(script, tmp_path):
    (tmp_path / "mine.yaml").write_text("")
    arguments = script("mine.yaml", SCALE_SFT_ALLOW_CPU="1").stdout.splitlines()
    assert arguments[arguments.index("--config") + 1] == "mine.yaml"


def test_a_shipped_recipe_goes_by_its_name(script):
    arguments = script("llama2_13b_ma", SCALE_SFT_ALLOW_CPU="1").stdout.splitlines()
    assert arguments[arguments.index("--config") + 1] == "llama2_13b_ma"
