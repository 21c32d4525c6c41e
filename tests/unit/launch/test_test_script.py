"""launch/test.sh and launch/check.sh: every test is in one group, every check is run, the last line sums up."""

import itertools
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

if sys.version_info < (3, 11):
    tomllib = pytest.importorskip("tomli")
else:
    import tomllib

ROOT = Path(__file__).parents[3]
SETTINGS = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["pytest"]["ini_options"]
MARKERS = [marker.split(":")[0] for marker in SETTINGS["markers"]]
FAST = shlex.split(SETTINGS["addopts"])[-1]
GROUPS = re.findall(r'-m (?:"([^"]+)"|(\w+))', (ROOT / "launch" / "test.sh").read_text().split('part" = fast')[1])

# Stands in for a Python with everything installed: notes each call, writes the results pytest would, and fails where
# FAKE_FAILURE occurs in the call.
FAKE_PYTHON = f"""#!/usr/bin/env bash
case "$*" in
    -m*) echo "$*" >> "$CALLS"
         file=; for word; do case $word in *.xml) file=$word ;; esac; done
         bad=0; case "$*" in *$FAKE_FAILURE*) bad=1 ;; esac
         [ -z "$file" ] || echo "<testsuite tests='10' failures='$bad' errors='0' skipped='2'/>" > "$file"
         exit "$bad" ;;
    *) exec {sys.executable} "$@" ;;
esac
"""


def is_chosen(expression: str, markers: tuple[str, ...]) -> bool:
    return eval(expression, {name: name in markers for name in MARKERS})


def test_every_test_is_in_exactly_one_group_and_fast_ones_have_no_marker() -> None:
    groups = [quoted or plain for quoted, plain in GROUPS]
    assert len(groups) == 4
    for count in range(len(MARKERS) + 1):
        for markers in itertools.combinations(MARKERS, count):
            assert sum(is_chosen(group, markers) for group in groups) == 1, markers
            assert is_chosen(FAST, markers) == (not markers)


@pytest.fixture
def script(tmp_path):
    """(arguments, failure="nothing") -> the finished test.sh of a copy of the project, and the calls of its Python."""
    project = tmp_path / "project"
    shutil.copytree(ROOT / "launch", project / "launch")
    programs = tmp_path / "venv" / "bin"
    programs.mkdir(parents=True)
    for name in ("python", "lint-imports"):
        (programs / name).write_text(FAKE_PYTHON if name == "python" else '#!/bin/sh\necho floors >> "$CALLS"\n')
        (programs / name).chmod(0o755)
    (programs / "nvidia-smi").write_text("#!/bin/sh\nexit 9\n")
    (programs / "nvidia-smi").chmod(0o755)

    def run(*arguments, failure="nothing", name="test.sh"):
        calls = tmp_path / "calls"
        calls.write_text("")
        variables = {"SCALE_SFT_VENV": str(tmp_path / "venv"), "CALLS": str(calls), "FAKE_FAILURE": failure}
        done = subprocess.run(
            [project / "launch" / name, *arguments],
            env=os.environ | variables | {"PATH": f"{programs}:{os.environ['PATH']}"},
            cwd="/", stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=60, check=False,
        )  # fmt: skip
        return done, calls.read_text().splitlines()

    return run


@pytest.mark.parametrize(
    ("arguments", "groups", "last"),
    [
        ((), 2, "16 passed, 0 failed, 4 skipped"),
        (("--fast",), 1, "8 passed, 0 failed, 2 skipped"),
        (("--all",), 4, "32 passed, 0 failed, 8 skipped"),
        (("--checks", "--fast", "-x", "tests/unit"), 1, "8 passed, 0 failed, 2 skipped"),
    ],
    ids=["default", "fast", "all", "checks and options of pytest"],
)
def test_its_last_line_sums_up_the_groups(script, arguments, groups, last) -> None:
    done, calls = script(*arguments)
    assert done.returncode == 0, done.stderr
    runs = [call for call in calls if call.startswith("-m pytest")]
    assert len(runs) == groups and done.stdout.splitlines()[-1] == last
    if "--checks" in arguments:
        assert all("-x tests/unit" in run for run in runs)
        assert calls[:4] == ["-m ruff check .", "-m ruff format --check .", "-m mypy", "floors"]


@pytest.mark.parametrize("failure", ["ruff check", "ruff format", "mypy", "several ranks"])
def test_a_check_or_a_test_that_fails_fails_it_after_all_else_has_run(script, failure) -> None:
    done, calls = script("--checks", failure=failure)
    assert done.returncode == 1 and len(calls) == 6
    tests_failed = failure == "several ranks"
    assert done.stdout.splitlines()[-1].endswith(
        "1 failed, 4 skipped" if tests_failed else "0 failed, 4 skipped; checks failed"
    )


def test_chosen_checks_alone_are_run_and_an_unknown_one_is_refused(script) -> None:
    done, calls = script("lint", "floors", name="check.sh")
    assert done.returncode == 0 and calls == ["-m ruff check .", "floors"]
    done, _ = script("spelling", name="check.sh")
    assert done.returncode == 1 and "got spelling, expected lint, format, types or floors" in done.stderr
