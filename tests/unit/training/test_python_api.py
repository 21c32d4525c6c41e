"""`scale_sft.train(...)`: the module is callable, takes what the command line takes, and returns what the run left."""

import subprocess
import sys
from pathlib import Path

import pytest

import scale_sft
from scale_sft.config.loading import load
from scale_sft.errors import UserError


@pytest.fixture(autouse=True)
def without_report(monkeypatch) -> None:
    monkeypatch.setattr("scale_sft.training.lifecycle.write_report", lambda folder: folder / "report.html")


def test_it_trains_and_returns_files_and_held_out_results(run_options, pairs_file) -> None:
    result = scale_sft.train(**run_options, eval_data=str(pairs_file), save_merged=True)
    assert isinstance(result, scale_sft.RunResult)
    assert result.output_dir == Path(run_options["output_dir"])
    assert result.steps == run_options["steps"]
    assert (result.adapter / "config.json").exists() or any(result.adapter.iterdir())
    assert (result.merged / "config.json").is_file()
    assert result.after.loss < result.before.loss
    assert scale_sft.train(**run_options, eval_data=str(pairs_file), save_merged=True) == result, "it is finished"
    assert [record["step"] for record in result.metrics if record["event"] == "step"][-1] == result.steps
    assert scale_sft.train(**run_options, eval_data=str(pairs_file), save_merged=True) == result, "it is finished"


def test_options_win_over_a_recipe_a_file_and_a_configuration(run_options, tmp_path) -> None:
    (tmp_path / "mine.yaml").write_text("sparse:\n  density: 0.5\nrun:\n  steps: 100\n")
    rest = {name: value for name, value in run_options.items() if name not in ("density", "output_dir", "steps")}
    for number, recipe in enumerate((tmp_path / "mine.yaml", load(tmp_path / "mine.yaml", {}))):
        result = scale_sft.train(recipe, **rest, tunable_weights=500, epochs=0.25, output_dir=tmp_path / str(number))
        assert result.steps == 2, "24 examples in batches of 4"
        written = load(result.output_dir / "config.yaml", {})
        assert (written.sparse.density, written.sparse.tunable_weights) == (None, 500)
        assert result.before is None and result.merged is None


def test_mistakes_are_exceptions_and_nothing_is_written(run_options, tmp_path) -> None:
    with pytest.raises(UserError, match="did you mean 'density'"):
        scale_sft.train("demo", densty=0.1)
    with pytest.raises(UserError, match="density"):
        scale_sft.train(**{**run_options, "density": 7})
    assert not Path(run_options["output_dir"]).exists()


def test_the_module_stays_a_module_and_importing_the_package_loads_no_torch() -> None:
    from scale_sft import train
    from scale_sft.train import main

    assert train.main is main and train.train is not train
    assert "demo" in train.__call__.__doc__
    code = "import sys, scale_sft; scale_sft.train; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
