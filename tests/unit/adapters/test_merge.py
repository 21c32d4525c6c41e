"""A merged folder is the trained model; unmerging gives the base back; both need the memory of one tensor."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from adapter_factory import load, make_adapter
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from scale_sft.adapters.apply import apply_adapter
from scale_sft.adapters.format import Adapter
from scale_sft.adapters.merge import UNMERGE_FILE, merge, unmerge
from scale_sft.adapters.safetensors_writer import TensorReader, TensorWriter
from scale_sft.errors import UserError


def same_bytes(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    bits = lambda tensor: tensor.contiguous().view(-1).view(torch.uint8)
    return a.keys() == b.keys() and all(a[n].dtype is b[n].dtype and torch.equal(bits(a[n]), bits(b[n])) for n in a)


@pytest.fixture
def adapter(tiny_model, tmp_path) -> Path:
    return make_adapter(tiny_model("llama", "bfloat16"), tmp_path / "adapter", dtype="bfloat16")


def test_merged_weights_are_those_of_the_adapter_in_place(tiny_model, tmp_path, adapter) -> None:
    model = load(tiny_model("llama", "bfloat16"), torch.bfloat16)
    apply_adapter(model, Adapter.load(adapter))
    merged = load(merge(adapter, tmp_path / "merged"), torch.bfloat16)
    assert same_bytes(dict(model.state_dict()), dict(merged.state_dict()))


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_unmerging_gives_the_bytes_of_the_base(tiny_model, tmp_path, architecture) -> None:
    base = tiny_model(architecture, "bfloat16")
    adapter = make_adapter(base, tmp_path / "adapter", dtype="bfloat16")
    merged = merge(adapter, tmp_path / "merged")
    restored = unmerge(adapter, merged, tmp_path / "restored")
    assert same_bytes(load_file(base / "model.safetensors"), load_file(restored / "model.safetensors"))
    assert not same_bytes(load_file(base / "model.safetensors"), load_file(merged / "model.safetensors"))
    assert not (restored / UNMERGE_FILE).exists()


def test_a_model_in_several_files_merges_into_several_files(tiny_model, tmp_path, adapter) -> None:
    sharded = tmp_path / "sharded"
    load(tiny_model("llama", "bfloat16"), torch.bfloat16).save_pretrained(sharded, max_shard_size="30KB")
    merged = merge(adapter, tmp_path / "merged", str(sharded))
    assert len(list(merged.glob("*.safetensors"))) == len(list(sharded.glob("*.safetensors"))) > 2
    whole = merge(adapter, tmp_path / "whole")
    assert same_bytes(load(whole, torch.bfloat16).state_dict(), load(merged, torch.bfloat16).state_dict())


def test_weights_that_transformers_would_not_load_are_left_out(tiny_model, tmp_path, adapter) -> None:
    twice = tmp_path / "twice"
    shutil.copytree(tiny_model("llama", "bfloat16"), twice)
    shutil.copyfile(twice / "model.safetensors", twice / "consolidated.safetensors")
    assert not (merge(adapter, tmp_path / "merged", str(twice)) / "consolidated.safetensors").exists()


def test_another_adapter_does_not_unmerge(tiny_model, tmp_path, adapter) -> None:
    merged = merge(adapter, tmp_path / "merged")
    other = make_adapter(tiny_model("llama", "bfloat16"), tmp_path / "other", dtype="bfloat16", seed=1)
    with pytest.raises(UserError, match="unmerge"):
        unmerge(other, merged, tmp_path / "restored")
    with pytest.raises(UserError, match=UNMERGE_FILE):
        unmerge(adapter, tiny_model("llama", "bfloat16"), tmp_path / "restored")
    assert not (tmp_path / "restored").exists()


def test_a_merged_model_that_was_changed_does_not_unmerge(tmp_path, adapter) -> None:
    merged = merge(adapter, tmp_path / "merged")
    tensors = load_file(merged / "model.safetensors")
    tensors["model.layers.0.mlp.up_proj.weight"] += 1
    save_file(tensors, merged / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match="unmerge"):
        unmerge(adapter, merged, tmp_path / "restored")


def test_a_base_of_other_shapes_is_refused(tiny_model, tmp_path, adapter) -> None:
    with pytest.raises(UserError, match="no tensor for"):
        merge(adapter, tmp_path / "merged", str(tiny_model("gpt2", "bfloat16")))
    config = json.loads((adapter / "adapter_config.json").read_text())
    config["shapes"] = {name: [columns, rows] for name, (rows, columns) in config["shapes"].items()}
    (adapter / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match="expected"):
        merge(adapter, tmp_path / "merged")
    assert not (tmp_path / "merged").exists()


def test_a_damaged_file_is_named(tiny_model, tmp_path, adapter) -> None:
    cut = tmp_path / "cut"
    shutil.copytree(tiny_model("llama", "bfloat16"), cut)
    content = (cut / "model.safetensors").read_bytes()
    (cut / "model.safetensors").write_bytes(content[: len(content) // 2])
    with pytest.raises(UserError, match="model.safetensors is damaged"):
        merge(adapter, tmp_path / "merged", str(cut))


@pytest.mark.parametrize("content", [None, "{", "[1]", "\udcff"])
def test_a_base_without_a_sound_config_is_an_error_before_the_work(tiny_model, tmp_path, adapter, content) -> None:
    base = tmp_path / "base"
    shutil.copytree(tiny_model("llama", "bfloat16"), base)
    (base / "config.json").unlink()
    if content is not None:
        (base / "config.json").write_text(content, errors="surrogateescape")
    with pytest.raises(UserError, match=r"base: .*config.json"):
        merge(adapter, tmp_path / "merged", str(base))
    assert not (tmp_path / "merged").exists()


def test_files_written_tensor_by_tensor_are_safetensors(tmp_path) -> None:
    tensors = {
        "a": torch.arange(6).view(2, 3), "b": torch.rand(5).bfloat16(), "empty": torch.empty(0, dtype=torch.int32),
        "scalar": torch.tensor(2.5), "bool": torch.tensor([True, False]),
    }  # fmt: skip
    specs = {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()}
    with TensorWriter(tmp_path / "x.safetensors", specs, {"who": "me"}) as writer:
        for name in reversed(tensors):
            writer.write(name, tensors[name])
    assert same_bytes(load_file(tmp_path / "x.safetensors"), tensors)
    with safe_open(tmp_path / "x.safetensors", "pt") as file:
        assert file.metadata() == {"who": "me"}
    save_file(tensors, tmp_path / "y.safetensors")
    with TensorReader(tmp_path / "y.safetensors") as reader:
        assert same_bytes({name: reader.tensor(name) for name in reader.names}, tensors)


_MERGE_UNDER_A_LIMIT = """
import resource, sys
import scale_sft.adapters.merge, scale_sft.model.loading
from pathlib import Path
with scale_sft.adapters.base_files.BaseFiles(Path(sys.argv[4])) as files:
    files.sources_of({})  # imports the code of the model
now = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (now + int(sys.argv[1]),) * 2)
from safetensors import safe_open
try:
    safe_open(sys.argv[4] + "/model.safetensors", "pt").__enter__()
    sys.exit("the limit does not hold back a mapping of the whole file")
except (OSError, MemoryError, RuntimeError) as error:
    pass
scale_sft.adapters.merge.merge(sys.argv[2], sys.argv[3], sys.argv[4])
"""


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="address-space limits as on Linux")
def test_a_model_larger_than_the_memory_limit_merges(tmp_path) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(vocab_size=512, hidden_size=1024, intermediate_size=1024, num_hidden_layers=28,
                         num_attention_heads=8, max_position_embeddings=64)  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        LlamaForCausalLM(config).bfloat16().save_pretrained(tmp_path / "base")
    size = (tmp_path / "base" / "model.safetensors").stat().st_size
    adapter = make_adapter(
        tmp_path / "base", tmp_path / "adapter", dtype="bfloat16", targets=("q_proj", "down_proj"), density=0.001
    )
    limit = size // 2
    root = Path(__file__).parents[3]
    environment = {**os.environ, "PYTHONPATH": str(root), "OMP_NUM_THREADS": "1", "MALLOC_ARENA_MAX": "2"}
    arguments = [str(limit), str(adapter), str(tmp_path / "merged"), str(tmp_path / "base")]
    done = subprocess.run(
        [sys.executable, "-c", _MERGE_UNDER_A_LIMIT, *arguments],
        env=environment, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    model = load(tmp_path / "base", torch.bfloat16)
    apply_adapter(model, Adapter.load(adapter))
    assert same_bytes(dict(model.state_dict()), dict(load(tmp_path / "merged", torch.bfloat16).state_dict()))
