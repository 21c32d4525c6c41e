import errno
import os
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner

import scale_sft
from scale_sft.cli.main import main
from scale_sft.cli.plan import in_one_unit
from scale_sft.version import __version__

ROOT = Path(__file__).resolve().parents[3]


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["mergee", "x"], "did you mean 'merge'?"),
        (["merge", "x", "--outptu", "y"], "--output"),
        (["merge", "x"], "--output"),
        (["report", "no-such-run"], "no-such-run holds no metrics.jsonl"),
    ],
)
def test_a_misspelt_command_is_one_error_that_says_what_is_meant(arguments: list[str], expected: str) -> None:
    result = CliRunner().invoke(main, arguments)
    assert result.exit_code in (1, 2) and expected in result.stderr
    assert result.stderr.lower().count("error:") == 1 and "Traceback" not in result.output


def test_help_lists_the_commands_and_the_version_is_that_of_the_package() -> None:
    assert "merge" in CliRunner().invoke(main, ["--help"]).stdout
    assert __version__ in CliRunner().invoke(main, ["--version"]).stdout


@pytest.mark.parametrize(
    ("raised", "status", "said"),
    [
        (OSError(errno.ENOSPC, "No space left on device", "x"), 1, "error: the disk is full: [Errno 28] No space left"),
        (PermissionError(errno.EACCES, "Permission denied", "/root/x"), 1, "error: /root/x: Permission denied"),
        (OSError("a reason\nof two lines"), 1, "error: a reason of two lines"),
        (KeyboardInterrupt(), 130, "interrupted"),
    ],
    ids=["disk full", "not permitted", "without a number", "ctrl-c"],
)
@pytest.mark.parametrize(
    ("command", "where"),
    [(["recipes", "ls"], "scale_sft.config.recipes.names"), (["train", "--config", "demo"], "scale_sft.train.run_training")],
    ids=["a tool", "train"],
)  # fmt: skip
def test_what_the_system_refuses_is_one_line(monkeypatch, command, where, raised, status, said) -> None:
    def refuse(*_, **__):
        raise raised

    monkeypatch.setattr(where, refuse)
    result = CliRunner().invoke(main, command)
    assert result.exit_code == status
    assert result.stderr.count("\n") == 1 and said in result.stderr


def test_plan_chooses_units_that_suit_the_model() -> None:
    small = CliRunner().invoke(main, ["plan", "demo", "--gpu-memory", "24"]).output
    assert "0.00" not in small and "KiB" not in small
    assert "800,384 weights" in small and " MiB " in small and "GiB usable" in small
    assert [in_one_unit([size])(size) for size in (0, 1536, 3 << 20, 5 << 30)] == [
        "0.00 KiB", "1.50 KiB", "3.00 MiB", "5.00 GiB",
    ]  # fmt: skip


def test_launch_files_are_listed_and_copied_but_never_over_others(tmp_path) -> None:
    listed = CliRunner().invoke(main, ["launch-files", "ls"]).output.split()
    assert CliRunner().invoke(main, ["launch-files", "cp", str(tmp_path)]).exit_code == 0
    copied = {str(file.relative_to(tmp_path)) for file in tmp_path.rglob("*") if file.is_file()}
    assert copied <= set(listed)
    assert {"launch/slurm_multinode.sbatch", "launch/zero3_8gpu.yaml", "ds_configs/zero3.json"} <= copied
    assert "not overwritten" in CliRunner().invoke(main, ["launch-files", "cp", str(tmp_path)]).stderr


@pytest.mark.slow
def test_nothing_draws_bars_into_a_pipe(run_options, tmp_path) -> None:
    """Tokenising, loading and verifying are where libraries draw theirs."""
    folder = run_options["output_dir"]
    scale_sft.train(**run_options)
    environment = os.environ | {"HF_HOME": str(tmp_path / "home"), "PYTHONPATH": str(ROOT)}
    for arguments in (
        ["data", "show", "--train_data", run_options["train_data"], "--base", run_options["base"], "--count", "1"],
        ["export", f"{folder}/adapter", "--to", "merged", "--output", str(tmp_path / "merged"), "--verify"],
    ):
        done = subprocess.run(
            [sys.executable, "-m", "scale_sft.cli", *arguments], env=environment, capture_output=True, check=True
        )
        assert b"\r" not in done.stdout + done.stderr
        assert b"%|" not in done.stdout + done.stderr
