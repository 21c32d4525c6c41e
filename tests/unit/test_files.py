import json
from pathlib import Path

import pytest

from scale_sft.files import write_atomically, write_json, write_text


def test_a_file_appears_whole_under_its_name_and_nothing_beside_it(tmp_path: Path) -> None:
    write_text(tmp_path / "a.txt", "one")
    write_text(tmp_path / "a.txt", "two")
    write_json(tmp_path / "b.json", {"key": ["value", 1]})
    assert (tmp_path / "a.txt").read_text() == "two"
    assert json.loads((tmp_path / "b.json").read_text()) == {"key": ["value", 1]}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.txt", "b.json"]


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_a_write_that_fails_half_way_leaves_the_old_file_and_no_other(tmp_path: Path, error: type) -> None:
    write_text(tmp_path / "a.txt", "old")

    def fail(path: Path) -> None:
        path.write_text("ne")
        raise error

    with pytest.raises(error):
        write_atomically(tmp_path / "a.txt", fail)
    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [("a.txt", "old")]
