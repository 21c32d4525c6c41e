"""Files and folders appear whole or not at all, wherever an output is asked for."""

import errno
import json
import os
import subprocess
from pathlib import Path

import pytest
from safetensors import SafetensorError

from scale_sft.errors import UserError
from scale_sft.files import new_folder, require_free_bytes, write_atomically, write_json, write_text


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


def _link(target: Path, at: Path) -> Path:
    at.symlink_to(target)
    return at


def _folder(path: Path, *entries: str) -> Path:
    path.mkdir(parents=True)
    for entry in entries:
        (path / entry).mkdir()
    return path


PLACES = {  # name: (make it in a folder and return the output to ask for, the path where the files must be)
    "a new name": (lambda at: at / "new", "new"),
    "a new name in a new folder": (lambda at: at / "a" / "b", "a/b"),
    "an empty folder": (lambda at: _folder(at / "empty"), "empty"),
    "a link to an empty folder": (lambda at: _link(_folder(at / "empty"), at / "link"), "empty"),
    "a link to nothing": (lambda at: _link(at / "nothing", at / "link"), "nothing"),
    "the present folder": (lambda at: Path("."), "here"),
    "a path with a tilde": (lambda at: Path("~/out"), "home/out"),
    "a fresh file system": (lambda at: _folder(at / "disk", "lost+found"), "disk"),
    "what a killed process left": (lambda at: _folder(at / "old", ".scale_sft.partial"), "old"),
}


@pytest.mark.parametrize("place", PLACES)
def test_an_output_becomes_what_was_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: str) -> None:
    make, expected = PLACES[place]
    monkeypatch.chdir(_folder(tmp_path / "here"))
    monkeypatch.setenv("HOME", str(_folder(tmp_path / "home")))
    with new_folder(make(tmp_path), "test") as work:
        (work / "config.json").write_text("{}")
        (work / "weights").write_text("all")
    found = tmp_path / expected
    assert sorted(path.name for path in found.iterdir() if path.name != "lost+found") == ["config.json", "weights"]
    assert not list(tmp_path.rglob("*partial*")) and not (tmp_path / "here" / "~").exists()


REFUSED = {  # name: (make it, return the output to ask for; what the error says)
    "a file": (lambda at: (at / "out").write_text("x") and at / "out", "is not a folder"),
    "a folder with something in it": (lambda at: _folder(at / "out", "something"), "is not empty"),
    "a link to such a folder": (lambda at: _link(_folder(at / "out", "something"), at / "link"), "is not empty"),
    "a link to itself": (lambda at: _link(at / "link", at / "link"), "is not a folder"),
    "a path below a file": (lambda at: (at / "file").write_text("x") and at / "file" / "out", "was not written"),
    "a name that is too long": (lambda at: at / ("x" * 300), "was not written"),
}


@pytest.mark.parametrize("place", REFUSED)
def test_an_output_that_cannot_be_is_refused_before_the_work(tmp_path: Path, place: str) -> None:
    make, message = REFUSED[place]
    output = make(tmp_path)
    with pytest.raises(UserError, match=message), new_folder(output, "test"):
        pytest.fail("the work began")


@pytest.mark.parametrize("place", ["a new name", "an empty folder"])
@pytest.mark.parametrize(
    "error", [OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)), SafetensorError("I/O error: No space left on device")]
)
def test_a_full_disk_is_one_line_and_leaves_nothing(tmp_path: Path, place: str, error: Exception) -> None:
    make, expected = PLACES[place]

    def fill(output: Path) -> None:
        with new_folder(output, "test") as work:
            (work / "weights").write_text("half")
            raise error

    with pytest.raises(UserError, match="test: .*No space left on device") as caught:
        fill(make(tmp_path))
    assert "\n" not in str(caught.value)
    assert not (tmp_path / expected).exists() or not list((tmp_path / expected).iterdir())


def test_a_disk_that_is_too_small_is_named_before_the_work(tmp_path: Path) -> None:
    require_free_bytes(tmp_path, 1, "test")
    with pytest.raises(UserError, match="bytes are needed, .* are free"):
        require_free_bytes(tmp_path, 1 << 62, "test")


def test_a_mount_point_is_filled(tmp_path: Path) -> None:
    """It can be neither removed nor renamed over."""
    disk = _folder(tmp_path / "disk")
    command = ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(disk)]
    made = subprocess.run(command, check=False, capture_output=True, text=True)
    if made.returncode:
        pytest.skip(f"cannot mount a tmpfs here: {made.stderr.strip()}")
    try:
        with pytest.raises(UserError, match="No space left"), new_folder(disk, "test") as work:
            (work / "weights").write_bytes(bytes(1 << 20))
        assert not list(disk.iterdir())
        with new_folder(disk, "test") as work:
            (work / "weights").write_text("all")
        assert [path.name for path in disk.iterdir()] == ["weights"]
    finally:
        subprocess.run(["umount", "--lazy", str(disk)], check=True)
