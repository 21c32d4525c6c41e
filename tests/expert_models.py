"""Tiny random models with fused experts, and adapters of all their experts."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import AutoModelForCausalLM

from scale_sft.adapters.format import Adapter
from scale_sft.model.experts import fused_weights, named_weights
from scale_sft.model.fingerprints import combine_fingerprints, fingerprint
from scale_sft.model.resident import WeightPart
from scale_sft.spiel.seeding import random_indices

_SIZES = {
    "vocab_size": 259, "bos_token_id": 256, "eos_token_id": 257, "pad_token_id": 258, "hidden_size": 16,
    "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 64,
    "initializer_range": 0.1,
}  # fmt: skip
_KINDS = {
    "mixtral": {"num_local_experts": 12, "intermediate_size": 24},
    "qwen3_moe": {"num_experts": 12, "moe_intermediate_size": 24, "intermediate_size": 24, "head_dim": 8},
    "deepseek_v3": {
        "n_routed_experts": 12, "moe_intermediate_size": 24, "intermediate_size": 24, "n_shared_experts": 1,
        "num_experts_per_tok": 2, "n_group": 1, "topk_group": 1, "kv_lora_rank": 8, "q_lora_rank": 8,
        "qk_rope_head_dim": 4, "qk_nope_head_dim": 4, "v_head_dim": 4, "first_k_dense_replace": 1,
        "num_key_value_heads": 2,
    },
    "ernie4_5_moe": {
        "moe_num_experts": 12, "moe_intermediate_size": 24, "intermediate_size": 24, "moe_k": 2,
        "moe_layer_start_index": 1,
    },
    "nemotron_h": {
        "layers_block_type": ["moe", "attention"], "n_routed_experts": 12, "moe_intermediate_size": 24,
        "num_experts_per_tok": 2, "moe_latent_size": None, "head_dim": 8, "mamba_num_heads": 4, "mamba_head_dim": 8,
        "ssm_state_size": 8, "n_groups": 1, "intermediate_size": 24, "moe_shared_expert_intermediate_size": 24,
    },
    "gpt_oss": {"num_local_experts": 12, "intermediate_size": 24, "head_dim": 8, "num_experts_per_tok": 2},
    "granitemoe": {"num_local_experts": 12, "intermediate_size": 24, "num_experts_per_tok": 2},
}  # fmt: skip
ONE_BY_ONE = ("mixtral", "qwen3_moe", "deepseek_v3", "ernie4_5_moe", "nemotron_h")
"""Types whose files hold a tensor, or two, per expert; those of the others hold the fused ones."""
TYPES = tuple(_KINDS)


def make_experts(kind: str, folder: Path, dtype: torch.dtype = torch.float32, **save) -> Path:
    """Write a random model of a type, with 12 experts a layer: numbers of one digit and of two."""
    from transformers import CONFIG_MAPPING

    sizes = {**_SIZES, **_KINDS[kind]}
    if "layers_block_type" in sizes:
        del sizes["num_hidden_layers"]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(CONFIG_MAPPING[kind](**sizes)).to(dtype)
        for name, weight in model.named_parameters():
            if "bias" in name.rpartition(".")[2]:
                torch.nn.init.normal_(weight, std=0.1)
    model.save_pretrained(folder, **save)
    return folder


def expert_adapter(base: Path, *, dtype: torch.dtype = torch.float32, seed: int = 0, extra: str = "o_proj") -> Adapter:
    """An adapter of every expert and of the layers called `extra`: random entries, deltas as large as the weights."""
    model = AutoModelForCausalLM.from_pretrained(base, dtype=dtype)
    weights = named_weights(model)
    names = [name for fused in fused_weights(model) for name in fused.slice_names()]
    names += [name for name in weights if name.endswith(f"{extra}.weight")]
    generator = torch.Generator().manual_seed(seed)
    shapes = {name: tuple(weights[name].shape) for name in names}
    indices = {name: random_indices(shape, 5, seed, name).int() for name, shape in shapes.items()}
    prints = {name: _print(weights[name].reshape(-1)) for name in names}
    info = {
        "base": str(base), "revision": None, "dtype": str(dtype).removeprefix("torch."), "method": "ag",
        "base_hash": combine_fingerprints(prints, shapes),
        "base_fingerprints": {name: f"{a:016x}{b:016x}" for name, (a, b) in prints.items()},
    }  # fmt: skip
    return Adapter(indices, {name: 0.1 * torch.randn(5, generator=generator) for name in names}, shapes, info)


def _print(entries: torch.Tensor) -> tuple[int, int]:
    return fingerprint(WeightPart(lambda: entries, 0, entries.numel()))
