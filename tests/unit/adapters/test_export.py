import json
import shutil
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from scale_sft.adapters.apply import apply_adapter, undo_adapter
from scale_sft.adapters.format import Adapter
from scale_sft.cli.main import main
from scale_sft.errors import UserError

IDS = torch.arange(60, 90).view(2, 15)


@torch.no_grad()
def logits(model) -> torch.Tensor:
    model.eval()
    return model(input_ids=IDS, attention_mask=torch.ones_like(IDS), use_cache=False).logits


def load(folder: Path):
    return AutoModelForCausalLM.from_pretrained(folder, dtype="auto")


def train_a_little(run, steps: int = 3) -> None:
    """A few steps of a session with drop and grow, without its records."""
    from scale_sft.train import forward_backward

    for step in range(1, steps + 1):
        run.tuning.begin_step(step)
        forward_backward(run, run.inputs.order.batch(step))
        run.tuning.update(0.05)
        if run.tuning.schedule.reallocates_at(step):
            run.tuning.reallocate(step, run.resident)
        run.resident.write()


@pytest.fixture
def trained(session, tiny_model, tmp_path):
    """(architecture, dtype) -> (session after a few steps, its adapter folder, the base's folder)."""

    def get(architecture: str = "llama", dtype: str = "float32", method: str = "ag"):
        base = tiny_model(architecture, dtype)
        run = session(base=str(base), method=method, attention="sdpa")
        train_a_little(run)
        run.adapter().save(tmp_path / "adapter")
        return run, tmp_path / "adapter", base

    return get


def merged(adapter: Path, output: Path, *more: str) -> Path:
    result = CliRunner().invoke(main, ["merge", str(adapter), "--output", str(output), *more])
    assert result.exit_code == 0, result.output
    return output


def refused(adapter: Path, output: Path, *more: str) -> str:
    result = CliRunner().invoke(main, ["merge", str(adapter), "--output", str(output), *more])
    assert result.exit_code == 1 and result.stderr.count("error:") == 1 and "Traceback" not in result.output
    assert not output.exists() or not any(output.iterdir())
    return result.stderr


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_adapter_merged_and_trained_model_have_bit_identical_logits(trained, architecture, dtype, tmp_path) -> None:
    run, adapter, base = trained(architecture, dtype)
    expected = logits(run.model)
    stock = load(base)
    assert stock.dtype is getattr(torch, dtype)
    untouched = logits(stock)
    assert not torch.equal(expected, untouched)
    kept = apply_adapter(stock, Adapter.load(adapter))
    assert torch.equal(logits(stock), expected)
    undo_adapter(stock, Adapter.load(adapter), kept)
    assert torch.equal(logits(stock), untouched)
    from_disk = load(merged(adapter, tmp_path / "merged"))
    assert from_disk.dtype is getattr(torch, dtype)
    assert torch.equal(logits(from_disk), expected)
    run.resident.restore()
    assert torch.equal(logits(run.model), untouched)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("method", ["ag", "ma"])
def test_whatever_is_not_active_has_its_pretrained_bits_and_restoring_gives_all_back(
    trained, architecture, dtype, method
) -> None:
    run, _, base = trained(architecture, dtype, method)
    pretrained = dict(load(base).named_parameters())
    active = {delta.name: delta.indices.long() for delta in run.tuning.store}
    bits = lambda tensor: tensor.detach().flatten().view(torch.int16 if dtype == "bfloat16" else torch.int32)
    changed = 0
    for name, weight in run.model.named_parameters():
        differs = bits(weight) != bits(pretrained[name])
        changed += int(differs.sum())
        differs[active.get(name, [])] = False
        assert not differs.any(), name
    assert changed > 0
    run.resident.restore()
    for name, weight in run.model.named_parameters():
        assert torch.equal(bits(weight), bits(pretrained[name])), name


@pytest.mark.parametrize("prefix", [True, False])
def test_a_base_stored_with_or_without_the_class_prefix_is_merged(trained, tiny_model, tmp_path, prefix: bool) -> None:
    """GPT-2 files name their tensors with or without `transformer.`; both load to the same model."""
    run, adapter, base = trained("gpt2")
    tensors = load_file(base / "model.safetensors")
    bare = {name.removeprefix("transformer."): tensor for name, tensor in tensors.items()}
    stored = {f"transformer.{name}": tensor for name, tensor in bare.items()} if prefix else bare
    other = tmp_path / "other"
    shutil.copytree(base, other)
    save_file(stored, other / "model.safetensors", metadata={"format": "pt"})
    from_disk = load(merged(adapter, tmp_path / "merged", "--base", str(other)))
    assert torch.equal(logits(from_disk), logits(run.model))


def test_a_base_in_several_files_is_merged(trained, tmp_path) -> None:
    run, adapter, base = trained()
    load(base).save_pretrained(tmp_path / "cut", max_shard_size="20KB")
    assert len(list((tmp_path / "cut").glob("*.safetensors"))) > 1
    from_disk = load(merged(adapter, tmp_path / "merged", "--base", str(tmp_path / "cut")))
    assert torch.equal(logits(from_disk), logits(run.model))


def test_a_merged_folder_has_tokenizer_and_configuration(trained, tmp_path) -> None:
    from transformers import AutoTokenizer

    _, adapter, _ = trained()
    folder = merged(adapter, tmp_path / "merged")
    assert AutoTokenizer.from_pretrained(folder)("1 + 1")["input_ids"]
    assert json.loads((folder / "config.json").read_text())["dtype"] == "float32"


def test_an_adapter_round_trips_exactly(trained) -> None:
    run, adapter, _ = trained("llama", "float32", "ma")
    loaded, present = Adapter.load(adapter), run.adapter()
    assert loaded.shapes == present.shapes and loaded.info["method"] == "ma"
    for name in present.indices:
        assert torch.equal(loaded.indices[name], present.indices[name])
        assert torch.equal(loaded.deltas[name], present.deltas[name])


def test_an_adapter_is_refused_on_another_base(trained, tiny_model, tmp_path) -> None:
    _, adapter, base = trained()
    other = load(base)
    other.model.layers[1].mlp.up_proj.weight.data[3, 4] += 0.5
    before = other.model.layers[0].mlp.up_proj.weight.clone()
    with pytest.raises(UserError, match="not the one it was trained on"):
        apply_adapter(other, Adapter.load(adapter))
    assert torch.equal(before, other.model.layers[0].mlp.up_proj.weight)
    other.save_pretrained(tmp_path / "other")
    assert "not the base" in refused(adapter, tmp_path / "merged", "--base", str(tmp_path / "other"))
    with pytest.raises(UserError, match="the model has no weight"):
        apply_adapter(load(tiny_model("opt")), Adapter.load(adapter))


def test_merging_never_writes_into_a_folder_that_is_not_empty(trained, tmp_path) -> None:
    _, adapter, _ = trained()
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "mine.txt").write_text("mine")
    result = CliRunner().invoke(main, ["merge", str(adapter), "--output", str(tmp_path / "taken")])
    assert result.exit_code == 1 and "not empty" in result.stderr
    assert [path.name for path in (tmp_path / "taken").iterdir()] == ["mine.txt"]


def test_merging_something_that_is_no_adapter_is_one_error(trained, tmp_path) -> None:
    assert "adapter" in refused(tmp_path / "nothing", tmp_path / "merged")


DAMAGE = {
    "unsorted": lambda i, d: (i.flip(0), d),
    "repeated": lambda i, d: (torch.cat((i[:1], i[:-1])), d),
    "outside": lambda i, d: (torch.cat((i[:-1], torch.tensor([10**6], dtype=i.dtype))), d),
    "negative": lambda i, d: (torch.cat((torch.tensor([-1], dtype=i.dtype), i[1:])), d),
    "of different lengths": lambda i, d: (i, d[:-1]),
    "not finite": lambda i, d: (i, d / 0),
    "of another dtype": lambda i, d: (i.float(), d),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_adapter_is_refused_before_any_weight_is_touched(trained, damage: str, tmp_path) -> None:
    _, adapter, _ = trained()
    file = adapter / "adapter_model.safetensors"
    tensors = load_file(file)
    name = "model.layers.1.mlp.down_proj.weight"
    tensors[f"{name}.indices"], tensors[f"{name}.deltas"] = DAMAGE[damage](
        tensors[f"{name}.indices"], tensors[f"{name}.deltas"]
    )
    save_file(tensors, file)
    with pytest.raises(UserError, match=f"adapter: .*'{name}'"):
        Adapter.load(adapter)
    refused(adapter, tmp_path / "merged")


def test_a_truncated_or_foreign_file_is_refused(trained) -> None:
    _, adapter, _ = trained()
    file, config = adapter / "adapter_model.safetensors", adapter / "adapter_config.json"
    whole = file.read_bytes()
    file.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UserError, match="damaged"):
        Adapter.load(adapter)
    file.write_bytes(whole)
    for text in ("{", "[]", "{}", config.read_text().replace("scale_sft sparse delta", "something else")):
        config.write_text(text)
        with pytest.raises(UserError, match="adapter: "):
            Adapter.load(adapter)
