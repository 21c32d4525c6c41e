"""What `import scale_sft` gives for adapters: one meaning per name, and everything says what it is."""

import pydoc
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from adapter_factory import load, make_adapter

import scale_sft
from scale_sft.adapters.format import Adapter


@pytest.fixture
def folder(tiny_model, tmp_path):
    return make_adapter(tiny_model("llama"), tmp_path / "adapter")


def test_importing_the_package_loads_no_torch() -> None:
    code = "import sys, scale_sft; dir(scale_sft); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_dir_and_help_list_the_public_names() -> None:
    assert {"Adapter", "load_adapter", "merge", "UserError", "__version__"} <= set(dir(scale_sft))
    assert all(hasattr(scale_sft, name) for name in dir(scale_sft))
    shown = pydoc.render_doc(scale_sft, renderer=pydoc.plaintext)
    assert "class Adapter" in shown and "load_adapter(model" in shown and "merge(" in shown
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        scale_sft.nothing  # noqa: B018


def test_an_adapter_has_one_interface_in_memory_and_on_disk(folder, tmp_path) -> None:
    whole = scale_sft.Adapter.load(folder)
    with scale_sft.Adapter.open(folder) as lazy:
        assert type(lazy) is type(whole) is Adapter and repr(lazy) == repr(whole)
        assert (lazy.shapes, lazy.info, lazy.dtype, lazy.is_quantized) == (
            (whole.shapes, whole.info, whole.dtype, whole.is_quantized)
        )
        for name in whole.shapes:
            assert torch.equal(lazy.indices[name], whole.indices[name])
            assert torch.equal(lazy.deltas[name], whole.deltas[name])
            assert lazy.active(name) == whole.active(name) == whole.deltas[name].numel()
        assert lazy.active() == whole.active() == sum(map(len, whole.deltas.values()))
        lazy.save(tmp_path / "copy")
    name = "adapter_model.safetensors"
    assert (tmp_path / "copy" / name).read_bytes() == (folder / name).read_bytes()
    assert f"{whole.active():,} entries in 14 weights" in repr(whole)


def test_an_adapter_in_memory_merges_like_its_folder(folder, tmp_path) -> None:
    for source, output in ((folder, "a"), (scale_sft.Adapter.load(folder), "b")):
        assert scale_sft.merge(source, tmp_path / output) == tmp_path / output
    same = [(tmp_path / output / "model.safetensors").read_bytes() for output in "ab"]
    assert same[0] == same[1]


def test_a_live_adapter_says_what_the_model_carries(tiny_model, folder) -> None:
    model = load(tiny_model("llama"))
    live = scale_sft.load_adapter(model, folder)
    entries = scale_sft.Adapter.load(folder).active()
    assert (
        repr(live)
        == f"<LiveAdapter: {entries:,} entries in 14 weights of LlamaForCausalLM, base {str(tiny_model('llama'))!r}>"
    )
    live.swap(None)
    assert repr(live) == "<LiveAdapter: the base on LlamaForCausalLM>"
    live.undo()
    assert repr(live) == "<LiveAdapter: undone on LlamaForCausalLM>"


def test_a_base_named_by_a_relative_path_is_found_from_another_folder(
    tiny_model, folder, tmp_path, monkeypatch
) -> None:
    adapter, base = Adapter.load(folder), tiny_model("llama")
    monkeypatch.chdir(base.parent)
    Adapter(adapter.indices, adapter.deltas, adapter.shapes, {**adapter.info, "base": base.name}).save(tmp_path / "a")
    assert Adapter.load(tmp_path / "a").info["base"] == str(base)
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    scale_sft.merge(tmp_path / "a", ".")
    assert (tmp_path / "elsewhere" / "config.json").is_file()


@pytest.mark.parametrize("base", ["demo", "meta-llama/Llama-2-7b-hf", "/not/here"])
def test_a_base_that_is_not_a_folder_here_keeps_its_name(folder, tmp_path, base) -> None:
    adapter = Adapter.load(folder)
    Adapter(adapter.indices, adapter.deltas, adapter.shapes, {**adapter.info, "base": base}).save(tmp_path / "a")
    assert Adapter.load(tmp_path / "a").info["base"] == base


def test_the_examples_of_the_documentation_run(tiny_model, tmp_path, monkeypatch, capsys) -> None:
    """The Python blocks of docs/adapters.md, one after the other, where the paths in them exist."""
    shutil.copytree(tiny_model("llama", "bfloat16"), tmp_path / "BASE")
    for seed, name in enumerate(("runs/demo/adapter", "run/adapter", "other/adapter")):
        make_adapter(tmp_path / "BASE", tmp_path / name, dtype="bfloat16", seed=seed)
    monkeypatch.chdir(tmp_path)
    text = (Path(__file__).parents[3] / "docs" / "adapters.md").read_text()
    blocks = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    assert len(blocks) >= 3
    exec("\n".join(blocks), {})
    assert "<Adapter: " in capsys.readouterr().out and (tmp_path / "merged" / "config.json").is_file()
