"""Tiny random models of the configurations in transformers: every type with a text model, two layers of width 64."""

from __future__ import annotations

import dataclasses
import inspect
from typing import Any

VOCABULARY = 259  # all bytes and three special tokens: the tokenizer of the check

_SMALL: dict[str, Any] = {
    # widths
    **dict.fromkeys(("hidden_size", "d_model", "n_embd", "embed_dim", "embedding_size", "width", "dim"), 64),
    **dict.fromkeys(("attention_hidden_size", "lru_width", "attention_dim", "mamba_hidden_dim"), 64),
    **dict.fromkeys(("intermediate_size", "ffn_dim", "ffn_hidden_size", "n_inner", "encoder_ffn_dim"), 96),
    **dict.fromkeys(("decoder_ffn_dim", "dense_intermediate_size", "intermediate_size_mlp"), 96),
    **dict.fromkeys(("moe_intermediate_size", "shared_expert_intermediate_size", "expert_ffn_hidden_size"), 32),
    **dict.fromkeys(("moe_shared_expert_intermediate_size", "shared_intermediate_size"), 32),
    # depths and counts
    **dict.fromkeys(("num_hidden_layers", "n_layer", "num_layers", "n_layers", "decoder_layers", "encoder_layers"), 2),
    **dict.fromkeys(("depth", "num_hidden_groups"), 2),
    **dict.fromkeys(("num_attention_heads", "n_head", "num_heads", "n_heads", "encoder_attention_heads"), 4),
    **dict.fromkeys(("decoder_attention_heads", "attention_heads"), 4),
    **dict.fromkeys(("num_key_value_heads", "num_kv_heads", "kv_n_heads"), 2),
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"), 4),
    **dict.fromkeys(("num_experts_per_tok", "moe_topk", "top_k", "moe_k", "num_experts_per_token"), 2),
    **dict.fromkeys(("n_group", "topk_group", "n_shared_experts", "num_shared_experts"), 1),
    **dict.fromkeys(("max_position_embeddings", "n_positions", "max_seq_len", "max_sequence_length"), 128),
    "vocab_size": VOCABULARY,
    "pad_token_id": 258, "bos_token_id": 256, "eos_token_id": 257, "decoder_start_token_id": 256,
    # latent attention
    "q_lora_rank": 32, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 16,
    "head_dim": 16, "kv_channels": 16,
    # state spaces
    "mamba_n_heads": 8, "mamba_d_head": 16, "mamba_d_state": 16, "mamba_d_ssm": 128, "mamba_num_heads": 8,
    "mamba_head_dim": 16, "ssm_state_size": 16, "mamba_chunk_size": 16, "chunk_size": 16, "time_step_rank": 4,
    "mamba_dt_rank": 4, "state_size": 16,
    "linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 16, "linear_value_head_dim": 16,
    "sliding_window": 32, "image_size": 28, "patch_size": 14, "initializer_range": 0.1, "init_std": 0.1,
}  # fmt: skip


def tiny_config(model_type: str) -> Any:
    """Make a small configuration of a model type, by its class's own fields."""
    from transformers import CONFIG_MAPPING

    kind = CONFIG_MAPPING[model_type]
    return kind(**_arguments(kind))


def _arguments(kind: Any) -> dict[str, Any]:
    fields = set(inspect.signature(kind.__init__).parameters)
    if dataclasses.is_dataclass(kind):
        fields |= {f.name for f in dataclasses.fields(kind)}
    given = {}
    for name, value in _SMALL.items():
        if name in fields:
            given[name] = value
    for name, sub in getattr(kind, "sub_configs", {}).items():
        if name in fields and inspect.isclass(sub) and hasattr(sub, "model_type"):
            given[name] = _arguments(sub)
    if "kv_lora_rank" in given and "num_key_value_heads" in given:
        given["num_key_value_heads"] = given["num_attention_heads"]
    return given
