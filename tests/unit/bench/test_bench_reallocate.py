"""One reallocation: what is measured, what is refused, and that it makes nothing of the weight's size."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner

from scale_sft.bench import page, reallocate, rows
from scale_sft.bench.peak import peak_of
from scale_sft.cli.main import main
from scale_sft.errors import UserError

CPU = torch.device("cpu")
MIB = 1 << 20
ROOT = Path(__file__).resolve().parents[3]
IN_A_FRESH_PROCESS = """
import json, sys, torch
from scale_sft.bench.reallocate import Case, run
case = Case(method=sys.argv[1], weights=10**8, density=0.002, dtype="bfloat16")
((settings, result),) = run([case], repeats=1, device=torch.device("cpu"))
print(json.dumps(result))
"""


PEAK_IN_A_FRESH_PROCESS = """
import torch
from scale_sft.bench.peak import peak_of
freed = [torch.ones(3 << 20, dtype=torch.uint8) for _ in range(20)]
del freed[::2]  # memory that may be used again without asking the system
for _ in range(2):
    peak = peak_of(lambda: [torch.ones(4 << 20, dtype=torch.uint8) for _ in range(6)], torch.device("cpu"))
print(peak.added, peak.by)
"""


def test_a_peak_is_exact_although_it_is_gone_at_the_end() -> None:
    done = subprocess.run(
        [sys.executable, "-c", PEAK_IN_A_FRESH_PROCESS], cwd=ROOT, capture_output=True, text=True, timeout=300
    )
    added, by = done.stdout.split()
    assert abs(int(added) - 24 * MIB) < 2 * MIB or by == "sampling"


def test_an_error_of_what_is_measured_is_its_own() -> None:
    with pytest.raises(ZeroDivisionError):
        peak_of(lambda: 1 // 0, CPU)


@pytest.mark.parametrize("method", ["ag", "ma"])
def test_every_reallocation_moves_entries_and_leaves_the_base_as_it_was(method: str) -> None:
    bench = reallocate.Bench(reallocate.Case(method=method, weights=6000, density=0.05, dtype="float32"), CPU)
    for _ in range(2):
        bench.begin()
        if method == "ag":
            bench.record(reallocate.Phase.PROPOSE)
            bench.estimate()
        assert bench.reallocate() > bench.case.active // 2
        bench.carrier.write()
    bench.carrier.restore()
    assert bool((bench.weight == 1).all())


def test_a_size_that_does_not_fit_the_memory_is_refused_before_anything_is_measured(monkeypatch) -> None:
    monkeypatch.setattr(reallocate, "available_bytes", lambda device: 1 << 30)
    with pytest.raises(
        UserError, match=r"1e\+09 entries in float32, .* needs 7\.\d GiB, 1\.0 GiB are free.*has 1e\+07"
    ):
        reallocate.cases([10**7, 10**9], [0.001], ["ag"], CPU, dtype="float32")


def test_the_command_writes_rows_and_a_page_with_both_plots(tmp_path: Path) -> None:
    words = ["bench", "reallocate", "--weights", "1e3,4e3", "--density", "0.01,0.1", "--repeats", "1"]
    done = CliRunner().invoke(main, [*words, "--output", str(tmp_path)], catch_exceptions=False)
    assert done.exit_code == 0 and "drop and grow" in done.output
    found = rows.read_rows(tmp_path, "reallocate")
    assert len(found) == 8 and all(row["result"]["seconds"] > 0 for row in found)
    html = (tmp_path / page.PAGE).read_text()
    assert html.count("<svg") == 2 and "One reallocation" in html

    later = {**found[0], "run": "later", "settings": {**found[0]["settings"], "weights": 9000}}
    elsewhere = [{**row, "run": "elsewhere", "machine": {"gpus": ["H200"]}} for row in found]
    part = reallocate.part([*found, later, *elsewhere])
    assert [len(table.rows) for table in part.tables] == [9, 8] and part.tables[1].title.endswith("1 x H200")
    assert len({plot.name for plot in part.plots}) == 4


@pytest.mark.parametrize(
    ("option", "given", "message"),
    [
        ("--weights", "1e5,many", "'many' is not a whole number from 4 to 100,000,000,000"),
        ("--density", "2", "2.0 is not in the range 0<x<=1"),
        ("--method", "ag,adam", "'adam' is not one of 'ag', 'ma'"),
    ],
)
def test_options_that_make_no_sense_are_told(tmp_path: Path, option: str, given: str, message: str) -> None:
    done = CliRunner().invoke(main, ["bench", "reallocate", option, given, "--output", str(tmp_path / "none")])
    assert done.exit_code == 2 and message in done.stderr
    assert not (tmp_path / "none").exists()


def test_rows_that_are_finished_stay_when_the_rest_is_interrupted(tmp_path: Path, monkeypatch) -> None:
    measured, finished = reallocate.measure, []

    def measure(case, **options):
        if case.weights == 4000 and len(finished) == 2:
            raise KeyboardInterrupt
        finished.extend([case] if case.weights == 4000 else [])
        return measured(case, **options)

    monkeypatch.setattr(reallocate, "measure", measure)
    words = ["bench", "reallocate", "--weights", "4e3", "--density", "0.01,0.1", "--repeats", "1"]
    done = CliRunner().invoke(main, [*words, "--output", str(tmp_path)])
    assert done.exit_code == 130
    assert len(rows.read_rows(tmp_path, "reallocate")) == 2 and (tmp_path / page.PAGE).exists()


@pytest.mark.slow
@pytest.mark.parametrize("method", ["ag", "ma"])
def test_a_reallocation_of_a_hundred_million_weights_makes_nothing_of_their_number(method: str) -> None:
    """Not even a mask of one byte per entry: proposal, drop and grow together peak below N bytes."""
    done = subprocess.run(
        [sys.executable, "-c", IN_A_FRESH_PROCESS, method],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    result = json.loads(done.stdout.splitlines()[-1])
    assert 0 < result["peak_bytes"] < 10**8, result
