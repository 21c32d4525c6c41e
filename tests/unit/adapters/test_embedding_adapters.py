"""Adapters of embeddings and output layers: merged, applied, swapped and exported; a tied weight stays one weight."""

import shutil
from pathlib import Path

import pytest
import torch
from adapter_factory import load, make_adapter
from safetensors.torch import load_file, save_file

import scale_sft
from scale_sft.adapters.apply import apply_adapter
from scale_sft.adapters.export import export
from scale_sft.adapters.format import Adapter
from scale_sft.adapters.merge import merge, unmerge
from scale_sft.adapters.verify import verify
from scale_sft.errors import UserError

IDS = torch.arange(60, 90).view(2, 15)
FILE = "model.safetensors"
LAYOUTS = {
    "embedding alone": lambda stored, own, other: {own: stored},
    "output layer alone": lambda stored, own, other: {other: stored},
    "both": lambda stored, own, other: {own: stored, other: stored.clone()},
}
NAMES = {
    "qwen2": ("model.embed_tokens.weight", "lm_head.weight", ("q_proj", "embed_tokens")),
    "gpt2": ("transformer.wte.weight", "lm_head.weight", ("c_attn", "wte")),
}


@torch.no_grad()
def logits(model) -> torch.Tensor:
    return model(input_ids=IDS, use_cache=False).logits


def stored_as(base: Path, folder: Path, architecture: str, layout: str) -> Path:
    """Copy a tied base whose file holds the shared weight under one of its names, or under both."""
    own, other, _ = NAMES[architecture]
    shutil.copytree(base, folder)
    tensors = load_file(folder / FILE)
    name = next(name for name in tensors if name in (own, other, own.partition(".")[2]))
    shared = LAYOUTS[layout](tensors.pop(name), name, other)
    save_file({**tensors, **shared}, folder / FILE, metadata={"format": "pt"})
    return folder


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("architecture", NAMES)
def test_a_tied_weight_merges_however_the_files_hold_it(tiny_model, tmp_path, architecture, layout) -> None:
    base = stored_as(tiny_model(architecture, "bfloat16"), tmp_path / "base", architecture, layout)
    own, _, targets = NAMES[architecture]
    adapter = make_adapter(base, tmp_path / "adapter", dtype="bfloat16", targets=targets)
    assert own in Adapter.load(adapter).shapes
    model = load(base, torch.bfloat16)
    before = logits(model)
    apply_adapter(model, Adapter.load(adapter))
    merged = merge(adapter, tmp_path / "merged")
    again = load(merged, torch.bfloat16)
    assert again.get_input_embeddings().weight is again.get_output_embeddings().weight
    assert torch.equal(logits(again), logits(model)) and not torch.equal(logits(model), before)
    assert load_file(merged / FILE).keys() == load_file(base / FILE).keys()
    restored = load_file(unmerge(adapter, merged, tmp_path / "restored") / FILE)
    assert all(torch.equal(tensor, restored[name]) for name, tensor in load_file(base / FILE).items())


def test_a_stored_output_layer_that_differs_is_not_tied_and_stays(tiny_model, tmp_path) -> None:
    base = stored_as(tiny_model("qwen2"), tmp_path / "base", "qwen2", "both")
    tensors = load_file(base / FILE)
    tensors["lm_head.weight"] += 1
    save_file(tensors, base / FILE, metadata={"format": "pt"})
    adapter = make_adapter(base, tmp_path / "adapter", targets=("embed_tokens",))
    merged = load_file(merge(adapter, tmp_path / "merged") / FILE)
    assert torch.equal(merged["lm_head.weight"], tensors["lm_head.weight"])
    assert not torch.equal(merged["model.embed_tokens.weight"], tensors["model.embed_tokens.weight"])


def test_a_live_adapter_moves_both_uses_of_a_tied_weight_and_leaves_the_base(tiny_model, tmp_path) -> None:
    base = tiny_model("qwen2")
    adapter, other = (make_adapter(base, tmp_path / str(seed), targets=("embed_tokens",), seed=seed) for seed in (0, 1))
    model = load(base)
    before = logits(model)
    live = scale_sft.load_adapter(model, adapter)
    first = logits(model)
    live.swap(other)
    live.swap(adapter)
    assert torch.equal(logits(model), first) and not torch.equal(first, before)
    live.undo()
    assert torch.equal(logits(model), before)


def test_untied_ends_export_merged_and_to_peft_without_the_embedding(tiny_model, tmp_path) -> None:
    base = tiny_model("llama")
    both = make_adapter(base, tmp_path / "both", targets=("embed_tokens", "lm_head", "q_proj"))
    export(both, "merged", tmp_path / "merged")
    assert verify(both, "merged", tmp_path / "merged").identical
    with pytest.raises(UserError, match="'model.embed_tokens.weight' belongs to a Embedding layer.*--to merged"):
        export(both, "shira", tmp_path / "shira")
    output = make_adapter(base, tmp_path / "output", targets=("lm_head", "q_proj"))
    export(output, "shira", tmp_path / "shira")
    assert verify(output, "shira", tmp_path / "shira").identical
