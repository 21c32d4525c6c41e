"""The examples run as they are, for a few steps, without a network."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from scale_sft.adapters.format import Adapter

ROOT = Path(__file__).resolve().parents[2]


def held_out(text: str) -> list[float]:
    return [float(number) for number in re.search(r"held-out loss ([\d.]+) before, ([\d.]+) after", text).groups()]


@pytest.mark.slow
@pytest.mark.parametrize("script", ["plain_loop.py", "hf_trainer.py"])
def test_a_script_trains_and_leaves_an_adapter(script, tmp_path) -> None:
    command = [sys.executable, str(ROOT / "examples" / script), str(tmp_path / "run"), "12"]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, env=environment, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    before, after = held_out(done.stdout)
    assert after < before
    assert Adapter.load(tmp_path / "run" / "adapter").info["base"] == "demo"


@pytest.mark.slow
def test_the_notebook_runs_cell_by_cell(tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("STEPS", "12")
    cells = json.loads((ROOT / "examples" / "notebook.ipynb").read_text(encoding="utf-8"))["cells"]
    names: dict = {}
    for cell in cells:
        if cell["cell_type"] == "code":
            exec("".join(cell["source"]), names)
    assert names["tuned"] < names["before"] and (tmp_path / "adapter").is_dir()
