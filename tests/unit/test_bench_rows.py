"""Rows of results say where they come from, survive a crash, and become a page."""

import json

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
    with pytest.raises(UserError, match="line 1 is no row of results"):
        rows.read_rows(tmp_path, "step")


def test_a_folder_without_results_is_no_page(tmp_path):
    with pytest.raises(UserError, match="no results in"):
        page.write_page(tmp_path)
