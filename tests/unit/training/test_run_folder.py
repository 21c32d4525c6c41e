"""The folder of a run has one owner at a time, for as long as that process lives."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner

from scale_sft.cli.main import main as cli
from scale_sft.errors import UserError
from scale_sft.training.run_folder import RunFolder

HOLD = """
import sys
from scale_sft.training.run_folder import RunFolder

mine = RunFolder(sys.argv[1])
mine.lock()
print("locked", flush=True)
sys.stdin.read()
"""


@pytest.fixture
def holder(tmp_path):
    """A process that holds the folder, until it is told to end."""
    command = [sys.executable, "-c", HOLD, str(tmp_path)]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "locked\n"
    yield process
    process.kill()
    process.wait()
    process.stdin.close()
    process.stdout.close()


def test_a_second_run_in_the_folder_is_refused_and_told_of_the_first(holder, tmp_path, train_run):
    with pytest.raises(UserError, match=rf"is in use by process {holder.pid} on "):
        RunFolder(tmp_path).lock()
    with pytest.raises(UserError, match="is in use by process"):
        train_run(output_dir=str(tmp_path))
    assert not (tmp_path / "config.yaml").exists()


def test_the_folder_is_free_once_its_owner_is_dead(holder, tmp_path):
    os.kill(holder.pid, signal.SIGKILL)
    holder.wait()
    RunFolder(tmp_path).lock()


def test_a_folder_that_cannot_be_written_is_one_error_before_anything_is_read(tmp_path, train_run, monkeypatch):
    monkeypatch.setattr("scale_sft.training.inputs.read_inputs", lambda *_: pytest.fail("inputs were read"))
    access = os.access
    monkeypatch.setattr(os, "access", lambda path, mode: str(path) != str(tmp_path) and access(path, mode))
    with pytest.raises(UserError, match=f"^output_dir: .* cannot be written: no permission in {tmp_path}. Fix: "):
        train_run(output_dir=str(tmp_path / "deep" / "run"))


def test_a_folder_that_turns_out_not_to_be_writable_is_one_error():
    with pytest.raises(UserError, match="^output_dir: /proc/no/run cannot be written: "):
        RunFolder("/proc/no/run").lock()  # nobody may, root neither


def test_without_a_writable_cache_tokenised_data_is_kept_in_the_run_and_that_is_said(
    train_run, monkeypatch, tmp_path, capsys
):
    (tmp_path / "file").write_text("")
    monkeypatch.setattr(
        "scale_sft.data.cache.cache_folder", lambda data: Path(data.cache_dir or tmp_path / "file" / "x")
    )
    run = train_run(steps=1)
    assert f"cannot be written (Not a directory); tokenised data is kept in {run / 'cache'}" in capsys.readouterr().out
    assert list((run / "cache").rglob("manifest.json"))


def test_data_are_shown_without_a_writable_cache(monkeypatch, tmp_path):
    (tmp_path / "file").write_text("")
    monkeypatch.setattr("scale_sft.data.cache.cache_folder", lambda data: Path(data.cache_dir or tmp_path / "file/x"))
    result = CliRunner().invoke(cli, ["data", "show", "--config", "demo", "--count", "1"])
    assert result.exit_code == 0, result.output
    assert "cannot be written (Not a directory); tokenised data is kept in" in result.output
