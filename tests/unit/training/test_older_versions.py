"""What older versions wrote is read by this one: a killed run resumes, its adapter loads, applies and merges.

tests/data/before_packages was made by the version whose modules lay flat in one folder (make.sh there says how).
"""

import hashlib
import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from scale_sft.adapters.apply import apply_adapter, undo_adapter
from scale_sft.adapters.format import Adapter
from scale_sft.adapters.live import load_adapter
from scale_sft.adapters.merge import merge, unmerge
from scale_sft.config.loading import load
from scale_sft.reporting.metrics_file import read_metrics
from scale_sft.train import run_training
from scale_sft.training import lifecycle

FILES = Path(__file__).parents[2] / "data" / "before_packages"
EXPECTED = json.loads((FILES / "expected.json").read_text())
METHODS = pytest.mark.parametrize("method", ["ag", "ma"])
WEIGHTS = "adapter_model.safetensors"
# Sums have one order on one kind of CPU under one torch: elsewhere the last bits of a training run may differ.
SAME_MACHINE = (torch.__version__, torch.backends.cpu.get_cpu_capability()) == (
    EXPECTED["torch"],
    EXPECTED["cpu_capability"],
)


@pytest.fixture
def old(tmp_path, monkeypatch):
    """A copy of the old files as the present folder: the paths in them are relative."""
    shutil.copytree(FILES, tmp_path / "old")
    monkeypatch.chdir(tmp_path / "old")
    monkeypatch.setattr(lifecycle, "write_report", lambda folder: folder / "report.html")
    return tmp_path / "old"


def digests(file):
    as_bytes = lambda value: value.contiguous().view(-1).view(torch.uint8).numpy().tobytes()
    return {name: hashlib.sha256(as_bytes(value)).hexdigest() for name, value in sorted(load_file(file).items())}


def base_model(folder):
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder / "base", dtype=torch.float32)


@METHODS
def test_a_killed_run_resumes_to_the_bits_of_the_old_uninterrupted_one(old, method):
    run_training(load(old / method / "config.yaml", {}))
    found, wanted = (load_file(old / method / name / WEIGHTS) for name in ("adapter", "adapter_after_12_steps"))
    assert found.keys() == wanted.keys()
    same = torch.equal if SAME_MACHINE else lambda a, b: torch.allclose(a, b, rtol=1e-3, atol=1e-6)
    assert all(same(found[name], wanted[name]) for name in wanted)
    assert (old / method / "merged" / "README.md").is_file()
    wanted = EXPECTED["losses"][method]
    records = read_metrics(old / method / "metrics.jsonl")
    losses = [record["loss"] for record in records if record["event"] == "step"]
    assert losses == wanted if SAME_MACHINE else losses == pytest.approx(wanted, rel=1e-4)


@METHODS
def test_an_old_adapter_applies_to_its_base_and_comes_off_again(old, method):
    adapter = Adapter.load(old / method / "adapter_after_12_steps")
    before, model = base_model(old).state_dict(), base_model(old)
    kept = apply_adapter(model, adapter)
    for name, indices in adapter.indices.items():
        values = before[name].view(-1).clone()
        values[indices.long()] += adapter.deltas[name]
        assert torch.equal(model.state_dict()[name].view(-1), values)
    undo_adapter(model, adapter, kept)
    with load_adapter(model, adapter):
        assert not all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@METHODS
@pytest.mark.parametrize("elsewhere", [False, True], ids=["where it was trained", "from another folder"])
def test_an_old_adapter_merges_into_the_bytes_that_the_old_version_wrote(old, monkeypatch, tmp_path, method, elsewhere):
    """Its base is named by a path relative to where training ran; from elsewhere `base` says where it is."""
    if elsewhere:
        monkeypatch.chdir(tmp_path)
    folder = old / method / "adapter_after_12_steps"
    merged = merge(folder, tmp_path / "merged", str(old / "base") if elsewhere else None)
    assert digests(merged / "model.safetensors") == EXPECTED["merged"][method]
    restored = unmerge(folder, merged, tmp_path / "restored")
    assert digests(restored / "model.safetensors") == digests(old / "base" / "model.safetensors")


@METHODS
def test_an_old_adapter_saved_by_this_version_has_the_same_tensors(old, tmp_path, method):
    folder = old / method / "adapter_after_12_steps"
    Adapter.load(folder).save(tmp_path / "again")
    assert digests(tmp_path / "again" / WEIGHTS) == digests(folder / WEIGHTS)
