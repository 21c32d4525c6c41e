"""Checkpoints as files: whole or not at all, damage recognised and named."""

import errno
import json
import os
import pickle

import pytest
import torch
from click.testing import CliRunner

from scale_sft.cli.main import main
from scale_sft.training import checkpoint_files
from scale_sft.training.checkpoint_files import (
    Damaged,
    SaveFailed,
    TensorFiles,
    find_checkpoints,
    inspect,
    prune,
    verify,
    write_checkpoint,
)


def weights():
    flat = torch.arange(60, dtype=torch.float32)
    for n, part in enumerate(flat.split(20)):  # views of one storage, as the deltas of a store are
        yield f"layers.{n}.weight", {"indices": torch.arange(20, dtype=torch.int32), "deltas": part}


def save(folder, step=12, shard_bytes=1):
    return write_checkpoint(folder, step, weights(), {"step": step}, active_entries=60, shard_bytes=shard_bytes).path


def test_what_was_written_is_read_back(tmp_path):
    files = TensorFiles(verify(save(tmp_path)))
    for name, tensors in weights():
        found = files.read(name)
        assert found.keys() == tensors.keys()
        assert all(torch.equal(found[kind], tensors[kind]) for kind in tensors)


def test_large_states_go_into_several_files(tmp_path):
    names = {file.name for file in save(tmp_path, shard_bytes=200).iterdir()}
    assert {"tensors_00001.safetensors", "tensors_00002.safetensors"} <= names
    one = {file.name for file in save(tmp_path, step=13, shard_bytes=1 << 30).iterdir()}
    assert one == {"tensors_00001.safetensors", "state.json", "manifest.json"}


def truncate(path):
    os.truncate(path / "tensors_00001.safetensors", 40)


def flip_a_byte(path):
    file = path / "tensors_00002.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)


def change_the_manifest(path):
    file = path / "manifest.json"
    file.write_text(file.read_text().replace('"active_entries": 60', '"active_entries": 61'))


def escape(path):
    """A manifest, rightly sealed, that names a file outside of the checkpoint."""
    manifest = json.loads((path / "manifest.json").read_text())
    manifest["files"]["../secret.safetensors"] = manifest["files"].pop("tensors_00001.safetensors")
    manifest["sha256"] = checkpoint_files._seal(manifest)
    (path / "manifest.json").write_text(json.dumps(manifest))


DAMAGES = {
    "truncated file": (truncate, "tensors_00001.safetensors has 40 bytes"),
    "flipped byte": (flip_a_byte, "tensors_00002.safetensors: its checksum"),
    "missing shard": (
        lambda path: (path / "tensors_00003.safetensors").unlink(),
        "tensors_00003.safetensors is missing",
    ),
    "missing manifest": (lambda path: (path / "manifest.json").unlink(), "manifest.json is missing"),
    "changed manifest": (change_the_manifest, "manifest.json is not what was written"),
    "no JSON": (lambda path: (path / "manifest.json").write_bytes(b"\xff\x00{"), "manifest.json is damaged"),
    "empty folder": (lambda path: [file.unlink() for file in path.iterdir()], "is empty"),
    "path outside": (escape, "'../secret.safetensors' is not a file of a checkpoint"),
    "pickle": (lambda path: (path / "manifest.json").write_bytes(pickle.dumps({})), "manifest.json is damaged"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damage_is_recognised_and_named(damage, tmp_path):
    path = save(tmp_path)
    act, message = DAMAGES[damage]
    act(path)
    with pytest.raises(Damaged, match=message.replace("(", r"\(")):
        verify(path)


def test_temporary_folders_and_foreign_names_are_no_checkpoints(tmp_path):
    path = save(tmp_path)
    path.rename(tmp_path / ".step_000012.77.tmp")
    (tmp_path / "step_latest").mkdir()
    assert find_checkpoints(tmp_path) == []
    save(tmp_path, step=15)
    assert [found.step for found in find_checkpoints(tmp_path)] == [15]
    assert not list(tmp_path.glob(".*")), "the next save sweeps what a killed process left"


def test_the_newest_complete_ones_are_kept(tmp_path):
    for step in (3, 6, 9, 12):
        save(tmp_path, step)
    flip_a_manifest = tmp_path / "step_000009" / "manifest.json"
    flip_a_manifest.unlink()
    prune(tmp_path, keep_last=2)
    assert [found.step for found in find_checkpoints(tmp_path)] == [12, 9, 6]


def test_a_failing_disk_leaves_the_earlier_checkpoint_and_no_half_one(tmp_path, monkeypatch):
    save(tmp_path, 3)

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    for name in ("save_file", "_flush", "_write_json"):
        with monkeypatch.context() as patch:
            patch.setattr(checkpoint_files, name, lambda *_, **__: full())
            with pytest.raises(SaveFailed, match="No space left on device"):
                save(tmp_path, 6)
        assert [file.name for file in tmp_path.iterdir()] == ["step_000003"]
        verify(tmp_path / "step_000003")


def test_saving_the_same_step_again_replaces_a_damaged_one(tmp_path):
    path = save(tmp_path)
    truncate(path)
    assert not inspect(save(tmp_path)).problem
    verify(path)


def test_ls_and_verify_tell_what_is_there(tmp_path):
    for step in (3, 6):
        save(tmp_path / "checkpoints", step)
    flip_a_byte(tmp_path / "checkpoints" / "step_000006")
    listed = CliRunner().invoke(main, ["checkpoint", "ls", str(tmp_path)])
    assert listed.exit_code == 0 and listed.output.count("complete (sizes)") == 2
    checked = CliRunner().invoke(main, ["checkpoint", "verify", str(tmp_path)])
    assert checked.exit_code == 1
    assert "complete (checksums)" in checked.output and "its checksum is not that of the manifest" in checked.output
    good = CliRunner().invoke(main, ["checkpoint", "verify", str(tmp_path / "checkpoints" / "step_000003")])
    assert good.exit_code == 0
    nothing = CliRunner().invoke(main, ["checkpoint", "ls", str(tmp_path / "nowhere")])
    assert nothing.exit_code == 1 and "holds none" in nothing.output
