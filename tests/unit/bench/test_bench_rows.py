"""Rows of results say where they come from, survive a crash, and become a page."""

import json
import subprocess

import pytest

from scale_sft.bench import page, rows
from scale_sft.errors import UserError


def test_a_row_says_machine_versions_commit_and_command(tmp_path):
    rows.Results(tmp_path, "step").add({"dtype": "float32"}, seconds=1.5)
    (row,) = rows.read_rows(tmp_path, "step")
    assert row["settings"] == {"dtype": "float32"} and row["result"] == {"seconds": 1.5}
    assert row["versions"]["torch"] and row["machine"]["cores"] >= 1 and row["commit"] and row["command"]
    assert "/" not in row["command"].split()[0]


def test_rows_of_one_invocation_belong_together_and_earlier_ones_stay(tmp_path):
    first, second = rows.Results(tmp_path, "step"), rows.Results(tmp_path, "step")
    second.run = first.run + "b"
    first.add({}, n=1), second.add({}, n=2), second.add({}, n=3)
    found = rows.read_rows(tmp_path, "step")
    assert [row["result"]["n"] for row in found] == [1, 2, 3]
    assert [row["result"]["n"] for row in rows.last_run(found)] == [2, 3]


def test_a_last_line_cut_off_by_a_crash_is_left_out_and_any_other_is_an_error(tmp_path):
    results = rows.Results(tmp_path, "step")
    results.add({}, n=1)
    whole = results.path.read_text()
    results.path.write_text(whole + whole[:40])
    assert len(rows.read_rows(tmp_path, "step")) == 1
    results.path.write_text(json.dumps({"benchmark": "step"}) + "\n" + whole)
    with pytest.raises(UserError, match="line 1 is not a row of results"):
        rows.read_rows(tmp_path, "step")


def test_added_results_are_no_change_of_the_source(tmp_path):
    git = lambda *words: subprocess.run(
        ["git", "-c", "user.name=a", "-c", "user.email=a@b", "-C", str(tmp_path), *words], check=True, timeout=30
    )
    source, results = tmp_path / "scale_sft" / "train.py", tmp_path / "benchmarks" / "results" / "step.jsonl"
    for file in (source, results):
        file.parent.mkdir(parents=True)
    source.write_text("1"), results.write_text("1")
    git("init", "-q"), git("add", "."), git("commit", "-qm", "first")
    clean = rows.commit_of(tmp_path)
    results.write_text("2")
    assert rows.commit_of(tmp_path) == clean and len(clean) >= 10 and not clean.endswith("+")
    source.write_text("2")
    assert rows.commit_of(tmp_path) == clean + "+"


def row_of(run, machine, **settings):
    return {"run": run, "machine": {"gpus": [machine]}, "settings": settings, "result": {}}


def test_rows_are_of_one_case_where_machine_and_settings_but_those_that_vary_are_equal():
    a, b, c = row_of("1", "H200", n=1, x=1), row_of("1", "H200", n=2, x=1), row_of("1", "A100", n=1, x=1)
    d = row_of("2", "H200", n=1, x=1)
    other = row_of("2", "H200", n=1, x=2)
    assert rows.by_case([a, b, c, other, d], ["n"]) == [[a, b, d], [c], [other]]
    assert rows.newest([a, b, d]) == [d, b]


def test_the_origin_of_a_table_names_every_invocation_in_it():
    first = {"command": "one", "commit": "c", "finished": "1", "versions": {"torch": "2"}}
    sources = [row_of("1", "H200") | first, row_of("2", "H200") | first | {"command": "two", "finished": "2"}]
    found = page.origin(sources)
    assert found["command"] == "one; two" and found["commit"] == "c" and found["machine"] == "1 x H200"


@pytest.mark.parametrize("benchmark", page.BENCHMARKS)
@pytest.mark.parametrize("settings", [{}, {"contestant": "x", "weights": "many"}])
def test_a_row_of_something_else_is_named_by_file_and_line(tmp_path, benchmark, settings):
    rows.Results(tmp_path, benchmark).add(settings, seconds=1.0)
    with pytest.raises(
        UserError, match=rf"{benchmark}\.jsonl, line 1: expected a row as `bench {benchmark}` .*Fix: remove"
    ):
        page.write_page(tmp_path)


def test_a_folder_without_results_is_no_page(tmp_path):
    with pytest.raises(UserError, match="bench: got no results in"):
        page.write_page(tmp_path)
