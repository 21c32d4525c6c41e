"""Merging rewrites the adapter's weights alone: whatever else the base holds keeps its stored bytes.

DeepSeek-V3 is the case: transformers keeps its `e_score_correction_bias`, which decides between experts, in float32
whatever dtype a model is loaded in. Rounded to bfloat16 it sends tokens to other experts.
"""

from pathlib import Path

import pytest
import torch
from adapter_factory import load, make_adapter
from safetensors.torch import load_file

from scale_sft.adapters.apply import apply_adapter
from scale_sft.adapters.export import export
from scale_sft.adapters.format import Adapter
from scale_sft.adapters.merge import UNMERGE_FILE, merge, unmerge

IDS = torch.arange(60, 90).view(2, 15)
CORRECTION = "e_score_correction_bias"


@pytest.fixture(scope="module")
def deepseek(tmp_path_factory, tokenizer):
    """(dtype) -> folder of a tiny DeepSeek-V3 with one dense block and one of four experts; its correction is fp32."""
    made: dict[str, Path] = {}

    def get(dtype: str) -> Path:
        if dtype not in made:
            from transformers import AutoModelForCausalLM, DeepseekV3Config

            config = DeepseekV3Config(
                vocab_size=259, bos_token_id=256, eos_token_id=257, pad_token_id=258, hidden_size=32,
                intermediate_size=48, moe_intermediate_size=16, num_hidden_layers=2, num_attention_heads=2,
                num_key_value_heads=2, n_shared_experts=1, n_routed_experts=4, num_experts_per_tok=2, n_group=1,
                topk_group=1, kv_lora_rank=16, q_lora_rank=16, qk_rope_head_dim=8, qk_nope_head_dim=8, v_head_dim=8,
                first_k_dense_replace=1, max_position_embeddings=64, initializer_range=0.1,
            )  # fmt: skip
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(0)
                model = AutoModelForCausalLM.from_config(config).to(getattr(torch, dtype))
                gate = model.model.layers[1].mlp.gate
                gate.e_score_correction_bias = torch.randn(4) * 1e-3 + 1  # ties but for what bfloat16 cannot hold
            made[dtype] = tmp_path_factory.mktemp(f"deepseek-{dtype}")
            model.save_pretrained(made[dtype])
            tokenizer.save_pretrained(made[dtype])
        return made[dtype]

    return get


@torch.no_grad()
def logits(model) -> torch.Tensor:
    return model(input_ids=IDS, use_cache=False).logits


def changed(base: Path, merged: Path) -> set[str]:
    """Names of tensors whose dtype or bytes differ."""
    as_bytes = lambda tensor: tensor.contiguous().view(-1).view(torch.uint8)
    before, after = load_file(base / "model.safetensors"), load_file(merged / "model.safetensors")
    assert before.keys() == after.keys()
    return {
        name
        for name, tensor in before.items()
        if tensor.dtype is not after[name].dtype or not torch.equal(as_bytes(tensor), as_bytes(after[name]))
    }


@pytest.mark.parametrize("stored", ["bfloat16", "float32"])
@pytest.mark.parametrize("way", ["merge", "export"])
def test_only_the_adapters_weights_are_rewritten(deepseek, tmp_path, stored, way) -> None:
    base = deepseek(stored)
    adapter = make_adapter(base, tmp_path / "adapter", dtype="bfloat16", targets=("o_proj", "up_proj"))
    if way == "merge":
        merge(adapter, tmp_path / "merged")
    else:
        export(adapter, "merged", tmp_path / "merged")
    assert changed(base, tmp_path / "merged") == set(Adapter.load(adapter).shapes)
    trained = load(base, torch.bfloat16)
    apply_adapter(trained, Adapter.load(adapter))
    merged = load(tmp_path / "merged", "auto")
    assert merged.dtype is torch.bfloat16
    assert torch.equal(logits(merged), logits(trained))


def test_the_correction_matters_in_this_test(deepseek) -> None:
    model = load(deepseek("bfloat16"), torch.bfloat16)
    exact = logits(model)
    gate = model.model.layers[1].mlp.gate
    assert gate.e_score_correction_bias.dtype is torch.float32
    gate.e_score_correction_bias = gate.e_score_correction_bias.bfloat16().float()
    assert not torch.equal(logits(model), exact)


def test_unmerging_gives_back_every_byte(deepseek, tmp_path) -> None:
    base = deepseek("bfloat16")
    adapter = make_adapter(base, tmp_path / "adapter", dtype="bfloat16")
    restored = unmerge(adapter, merge(adapter, tmp_path / "merged"), tmp_path / "restored")
    assert changed(base, restored) == set() and not (restored / UNMERGE_FILE).exists()


@pytest.mark.quantized
@pytest.mark.parametrize("stored", ["bfloat16", "float32"])
def test_a_base_in_four_bits_merges_with_the_rest_as_it_is_stored(deepseek, train_run, tmp_path, stored) -> None:
    base = deepseek(stored)
    run = train_run(base=str(base), dtype="bfloat16", quantization="nf4", steps=2)
    merged = merge(run / "adapter", tmp_path / "merged")
    before, after = load_file(base / "model.safetensors"), load_file(merged / "model.safetensors")
    kept = [name for name in before if name.endswith("norm.weight") or CORRECTION in name or "embed_tokens" in name]
    assert len(kept) > 6 and all(torch.equal(before[name], after[name]) for name in kept)
    assert all(before[name].dtype is after[name].dtype for name in kept)
    model = load(merged, "auto")
    found = dict(model.named_buffers())[f"model.layers.1.mlp.gate.{CORRECTION}"]
    assert model.dtype is torch.bfloat16 and torch.equal(found, before[f"model.layers.1.mlp.gate.{CORRECTION}"])


@pytest.mark.quantized
def test_quantised_again_the_rest_is_as_it_was_stored(deepseek, train_run, tmp_path) -> None:
    from scale_sft.evaluation.requantize import merge_into_few_bits

    base = deepseek("float32")
    run = train_run(base=str(base), dtype="bfloat16", quantization="nf4", steps=2)
    merge_into_few_bits(run / "adapter", tmp_path / "few", "nf4")
    before, after = load_file(base / "model.safetensors"), load_file(tmp_path / "few" / "model.safetensors")
    kept = [name for name in before if name.endswith("norm.weight") or CORRECTION in name or "embed_tokens" in name]
    assert all(torch.equal(before[name], after[name]) for name in kept)
    assert not list((tmp_path / "few").glob(".*")) and (tmp_path / "few" / "README.md").is_file()
    load(tmp_path / "few", "auto")
