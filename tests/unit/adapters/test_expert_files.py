"""An expert's slice is a weight like any other: files that hold experts one by one or fused, models, and reports."""

import json
import re
from pathlib import Path

import pytest
import torch
from adapter_factory import load
from click.testing import CliRunner
from safetensors.torch import load_file, save_file

import scale_sft
from scale_sft.adapters.apply import apply_adapter, undo_adapter
from scale_sft.adapters.base_files import BaseFiles, require_mergeable
from scale_sft.adapters.export import export
from scale_sft.adapters.format import Adapter
from scale_sft.adapters.merge import merge, unmerge
from scale_sft.adapters.verify import verify
from scale_sft.cli.main import main
from scale_sft.config.options import ModelConfig
from scale_sft.errors import UserError
from scale_sft.model.experts import named_weights
from tests.expert_models import ONE_BY_ONE, TYPES, expert_adapter, make_experts


@pytest.fixture(scope="module")
def base_of(tmp_path_factory):
    """(type, dtype) -> folder of a tiny random model."""
    made: dict = {}

    def get(kind: str, dtype: torch.dtype = torch.float32) -> Path:
        if (kind, dtype) not in made:
            made[kind, dtype] = make_experts(kind, tmp_path_factory.mktemp(kind), dtype)
        return made[kind, dtype]

    return get


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    """Compare the names, dtypes and bits of tensors."""
    bits = lambda tensor: tensor.contiguous().view(-1).view(torch.uint8)
    return a.keys() == b.keys() and all(a[n].dtype is b[n].dtype and torch.equal(bits(a[n]), bits(b[n])) for n in a)


@pytest.mark.parametrize("kind", TYPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_a_merged_model_is_the_one_in_memory_and_unmerges(base_of, tmp_path, kind, dtype) -> None:
    base = base_of(kind, dtype)
    adapter, model = expert_adapter(base, dtype=dtype), load(base, dtype)
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    kept = apply_adapter(model, adapter)
    assert same(dict(model.state_dict()), dict(load(merge(adapter, tmp_path / "merged"), dtype).state_dict()))
    restored = unmerge(adapter, tmp_path / "merged", tmp_path / "restored")
    stored = load_file(base / "model.safetensors")
    assert same(stored, load_file(restored / "model.safetensors"))
    assert not same(stored, load_file(tmp_path / "merged" / "model.safetensors"))
    undo_adapter(model, adapter, kept)
    assert same(dict(model.state_dict()), before)


@pytest.mark.parametrize("kind", ["mixtral", "gpt_oss"])
def test_files_in_shards_merge_into_the_same_shards(base_of, tmp_path, kind) -> None:
    adapter, sharded = expert_adapter(base_of(kind)), tmp_path / "sharded"
    load(base_of(kind)).save_pretrained(sharded, max_shard_size="20KB")  # cuts between the matrices of one expert
    merged, whole = merge(adapter, tmp_path / "merged", str(sharded)), merge(adapter, tmp_path / "whole")
    names = {path.name: set(load_file(path)) for path in sharded.glob("*.safetensors")}
    assert len(names) > 3 and names == {path.name: set(load_file(path)) for path in merged.glob("*.safetensors")}
    assert same(dict(load(merged).state_dict()), dict(load(whole).state_dict()))


@pytest.mark.parametrize("kind", ONE_BY_ONE)
def test_a_merge_holds_one_expert_at_a_time(base_of, kind) -> None:
    adapter = expert_adapter(base_of(kind))
    with BaseFiles(base_of(kind)) as files:
        sources = files.sources_of(adapter.shapes)
    experts = [name for name in adapter.shapes if ".experts." in name]
    assert {len(sources[name].stored) for name in experts} <= {1, 2}
    assert len({stored for name in experts for stored in sources[name].stored}) >= len(experts)
    assert all(f".{name.rpartition('.')[2]}." in stored for name in experts for stored in sources[name].stored)


def test_some_experts_of_a_layer_are_enough(base_of, tmp_path) -> None:
    for kind in ("qwen3_moe", "granitemoe"):
        whole = expert_adapter(base_of(kind))
        names = [name for name in whole.shapes if name.endswith(("layers.1.mlp.experts.down_proj.11", "down_proj.3"))]
        names = names or [name for name in whole.shapes if name.endswith("down_proj.11")]
        part = _part(whole, names[:2])
        model = load(base_of(kind))
        apply_adapter(model, part)
        merged = load(merge(part, tmp_path / kind))
        assert same(dict(model.state_dict()), dict(merged.state_dict()))


def _part(adapter: Adapter, names: list[str]) -> Adapter:
    from scale_sft.model.fingerprints import combine_fingerprints

    prints = {name: adapter.info["base_fingerprints"][name] for name in names}
    pairs = {name: (int(value[:16], 16), int(value[16:], 16)) for name, value in prints.items()}
    shapes = {name: adapter.shapes[name] for name in names}
    info = {**adapter.info, "base_fingerprints": prints, "base_hash": combine_fingerprints(pairs, shapes)}
    return Adapter({n: adapter.indices[n] for n in names}, {n: adapter.deltas[n] for n in names}, shapes, info)


@pytest.mark.parametrize(
    ("kind", "damage"),
    [
        ("mixtral", lambda t: t.pop("model.layers.1.block_sparse_moe.experts.7.w3.weight")),
        ("qwen3_moe", lambda t: t.update({"model.layers.0.mlp.experts.11.down_proj.weight": torch.zeros(16, 25)})),
        ("gpt_oss", lambda t: t.update({"model.layers.0.mlp.experts.down_proj": torch.zeros(11, 24, 16)})),
    ],
)
def test_files_that_a_merge_could_not_write_are_refused_before_training(base_of, tmp_path, kind, damage) -> None:
    adapter, config = expert_adapter(base_of(kind)), ModelConfig(base=str(tmp_path))
    tensors = load_file(base_of(kind) / "model.safetensors")
    (tmp_path / "config.json").write_text((base_of(kind) / "config.json").read_text())
    save_file(tensors, tmp_path / "model.safetensors")
    require_mergeable(config, None, adapter.shapes, loaded=True)
    damage(tensors)
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(UserError, match=r"^base: .* does not fit 'model\.layers\.[01]\.mlp\.experts\..*\d'"):
        require_mergeable(config, None, adapter.shapes, loaded=True)


def test_a_slice_that_the_model_does_not_have_is_refused(base_of) -> None:
    adapter, model = expert_adapter(base_of("mixtral")), load(base_of("mixtral"))
    last = "model.layers.0.mlp.experts.down_proj.11"
    for wrong in ("model.layers.0.mlp.experts.down_proj.12", "model.layers.0.self_attn.o_proj.weight.0"):
        renamed = lambda table, wrong=wrong: {wrong if name == last else name: value for name, value in table.items()}
        other = Adapter(renamed(adapter.indices), renamed(adapter.deltas), renamed(adapter.shapes), adapter.info)
        with pytest.raises(UserError, match="no weight"):
            apply_adapter(model, other)


@pytest.mark.parametrize("kind", ["mixtral", "gpt_oss"])
def test_adapters_of_experts_swap_on_a_live_model(base_of, kind) -> None:
    first, second = (expert_adapter(base_of(kind), seed=seed) for seed in (0, 1))
    model, ids = load(base_of(kind)), torch.arange(60, 90).view(2, 15)
    expected = []
    for adapter in (first, second):
        other = load(base_of(kind))
        apply_adapter(other, adapter)
        expected.append(dict(other.state_dict()))
    base = {name: weight.clone() for name, weight in model.state_dict().items()}
    live = scale_sft.load_adapter(model, first)
    assert same(dict(model.state_dict()), expected[0])
    live.swap(second)
    assert same(dict(model.state_dict()), expected[1])
    model(input_ids=ids)
    live.undo()
    assert same(dict(model.state_dict()), base)


def test_arithmetic_takes_experts_one_by_one(base_of) -> None:
    from scale_sft.adapters.arithmetic import add, overlap, scale

    first, second = (expert_adapter(base_of("qwen3_moe"), seed=seed) for seed in (0, 1))
    model = load(base_of("qwen3_moe"))
    apply_adapter(model, add([first, scale(first, -1.0), second]))
    other = load(base_of("qwen3_moe"))
    apply_adapter(other, second)
    assert same(dict(model.state_dict()), dict(other.state_dict()))
    assert overlap(first, second).keys() == first.shapes.keys()


def test_an_adapter_of_experts_reads_as_it_was_saved(base_of, tmp_path) -> None:
    adapter = expert_adapter(base_of("mixtral"))
    adapter.save(tmp_path)
    read = Adapter.load(tmp_path)
    assert list(read.shapes) == list(adapter.shapes)
    assert all(torch.equal(read.deltas[name], adapter.deltas[name]) for name in read.shapes)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["shapes"].keys() == adapter.shapes.keys()
    assert set(read.shapes) <= set(named_weights(load(base_of("mixtral"))))


def test_inspection_shows_the_experts_of_a_layer_together(base_of, tmp_path) -> None:
    from scale_sft.adapters.inspection import inspect
    from scale_sft.adapters.inspection_page import write_page

    adapter = expert_adapter(base_of("mixtral"))
    adapter.save(tmp_path)
    found = inspect(tmp_path)
    assert found.by_kind["gate_up_proj"].weights == 24 and set(found.by_kind) == {"gate_up_proj", "down_proj", "o_proj"}
    assert found.by_parameter["model.layers.1.mlp.experts.down_proj"].active == 12 * 5
    assert found.by_layer["1"].weights == 25
    write_page(found, tmp_path / "page.html")
    page = (tmp_path / "page.html").read_text()
    assert "model.layers.1.mlp.experts.down_proj" in page
    alone = {name: float(adapter.deltas[name].abs().max()) for name in adapter.shapes}
    assert {name: one.largest for name, one in found.by_weight.items()} == pytest.approx(alone)


@pytest.fixture
def trained(base_of, train_run, tokenizer):
    """(type, option=value, ...) -> the adapter of a short run with experts among its targets."""

    def run(kind: str, **options) -> Path:
        base = base_of(kind, torch.bfloat16)
        tokenizer.save_pretrained(base)
        return train_run(base=str(base), dtype="bfloat16", density=0.2, steps=2, max_length=32, **options) / "adapter"

    return run


def test_a_run_over_experts_is_merged_exported_and_verified(trained, tmp_path) -> None:
    adapter = trained("mixtral")
    assert any(".experts." in name for name in Adapter.load(adapter).shapes)
    export(adapter, "merged", tmp_path / "merged")
    assert verify(adapter, "merged", tmp_path / "merged").identical
    for to in ("shira", "supertuning"):
        with pytest.raises(UserError, match=r"export: got 48 experts of fused parameters .* Fix: --to merged"):
            export(adapter, to, tmp_path / to)
        assert not (tmp_path / to).exists()
    answer = CliRunner().invoke(
        main, ["chat", str(adapter), "--prompt", "{}", "--max_new_tokens", "2"], input="1 + 1 =\n"
    )
    assert answer.exit_code == 0, answer.output


@pytest.mark.quantized
def test_a_base_in_four_bits_keeps_its_experts_and_merges_with_their_deltas(trained, base_of, tmp_path, capsys) -> None:
    adapter = trained("mixtral", quantization="nf4", learning_rate=0.1)
    assert re.search(r"nf4: 0\.\d\d of 0\.\d\d MiB of the base stay in bfloat16", capsys.readouterr().out)
    content = Adapter.load(adapter)
    merged = named_weights(load(merge(adapter, tmp_path / "merged"), torch.bfloat16))
    base, changed = named_weights(load(base_of("mixtral", torch.bfloat16), torch.bfloat16)), 0
    for name in (name for name in content.shapes if ".experts." in name):
        wanted = base[name].clone().view(-1)
        places, deltas = content.indices[name].long(), content.deltas[name]
        wanted[places] = (wanted[places].float() + deltas).to(torch.bfloat16)
        changed += int((wanted != base[name].view(-1)).sum())
        assert torch.equal(merged[name].view(-1), wanted)
    assert changed > 100
