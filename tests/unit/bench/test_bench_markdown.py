"""docs/benchmarks.md is what the command writes from the rows kept with the source."""

import json
from pathlib import Path

from click.testing import CliRunner

from scale_sft.bench.markdown import markdown_of
from scale_sft.cli.main import main

ROOT = Path(__file__).parents[3]
ROWS, PAGE = Path("benchmarks/results"), Path("docs/benchmarks.md")


def test_the_committed_page_is_what_the_command_writes_from_the_committed_rows(monkeypatch):
    monkeypatch.chdir(ROOT)
    command = f"scale-sft bench page {ROWS} --markdown {PAGE}"
    assert PAGE.read_text(encoding="utf-8") == markdown_of(ROWS, PAGE), f"write it again: {command}"
    assert command in PAGE.read_text(encoding="utf-8")


def test_every_figure_stands_under_its_command_and_notes_are_appended(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    rows = (ROOT / ROWS / "scale.jsonl").read_text().splitlines()
    row = json.loads(rows[0]) | {"command": "scale-sft bench scale --ranks 1 | tee <log>"}
    Path("some").mkdir()
    Path("some/scale.jsonl").write_text(json.dumps(row) + "\n")
    Path("some/notes.md").write_text("## By hand\n\n| a | b |\n")
    done = CliRunner().invoke(main, ["bench", "page", "some", "--markdown", "page.md"])
    assert done.exit_code == 0, done.output
    text = Path("page.md").read_text()
    headings = [line for line in text.splitlines() if line.startswith("## ")]
    assert headings == ["## Ranks", "## By hand", "## Versions"]
    assert "    scale-sft bench scale --ranks 1 | tee <log>\n" in text, "a command stands as it was typed"
    table = [line for line in text.splitlines() if line.startswith("| ")]
    assert len({line.count("|") for line in table[:2]}) == 1 and "| a | b |" in table
