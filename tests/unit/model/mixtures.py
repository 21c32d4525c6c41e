"""Tiny random mixtures of experts, one of each way in which transformers builds them."""

from __future__ import annotations

from typing import Any

import torch

KINDS = ("mixtral", "qwen3_moe", "gpt_oss", "deepseek_v3", "granitemoe", "ernie4_5_moe")

_SIZES: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 16,
    "intermediate_size": 24,
    "moe_intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "num_experts": 4,
    "num_local_experts": 4,
    "n_routed_experts": 4,
    "moe_num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_k": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "tie_word_embeddings": False,
}
_LATENT = {"q_lora_rank": 8, "kv_lora_rank": 8, "qk_nope_head_dim": 8, "qk_rope_head_dim": 8, "v_head_dim": 8}
_OWN: dict[str, dict[str, Any]] = {
    "deepseek_v3": {"n_group": 1, "topk_group": 1, "n_shared_experts": 1, "first_k_dense_replace": 1, **_LATENT},
    "ernie4_5_moe": {"moe_num_shared_experts": 1},
    "gpt_oss": {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}},
}


def mixture(kind: str, dtype: torch.dtype = torch.float32, **options: Any) -> Any:
    """Build a tiny random mixture of experts; the same each time.

    Args:
        options: of its configuration.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model(kind, **{**_SIZES, **_OWN.get(kind, {}), **options})
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
        with torch.no_grad():
            for weight in model.parameters():  # some classes leave fused weights and biases empty
                if weight.dim() == 3 or not weight.isfinite().all():
                    weight.normal_(0, 0.1)
    return model
