"""Tiny random models of the configurations in transformers: every type with a text model, two layers of width 64."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Mapping
from typing import Any

from scale_sft.errors import UserError, first_line

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
    **dict.fromkeys(("n_group", "topk_group", "n_shared_experts", "num_shared_experts", "first_k_dense_replace"), 1),
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
    "linear_head_dim": 16, "linear_num_heads": 4, "linear_num_key_heads": 2, "linear_num_value_heads": 4,
    "linear_key_head_dim": 16, "linear_value_head_dim": 16,
    "full_attention_interval": 2, "attn_layer_period": 2, "attn_layer_offset": 1,
    "rotary_dim": 8, "sliding_window": 32, "image_size": 28, "patch_size": 14,
    "initializer_range": 0.1, "init_std": 0.1,
}  # fmt: skip


_ROPE = {"rope_type": "default", "rope_theta": 10000.0}
_SECTIONS = {"rope_parameters": {**_ROPE, "mrope_section": [4, 2, 2]}}  # halves of head_dim for time, height and width
_VISION = {"out_hidden_size": 64, "embed_dim": 64, "projection_dim": 64, "spatial_merge_size": 2}

_SPECIAL: dict[str, dict[str, Any]] = {
    "bamba": {"attn_layer_indices": [1]},
    "cohere_compass_text": {"rope_parameters": {"full_attention": _ROPE, "sliding_attention": _ROPE}},
    "dbrx": {
        "attn_config": {"kv_n_heads": 2, "rope_theta": 10000.0, "clip_qkv": 8.0},
        "ffn_config": {"ffn_hidden_size": 32, "moe_num_experts": 4, "moe_top_k": 2, "hidden_size": 64},
    },
    "dots3_note": {
        "text_config": {"num_hidden_layers": 2},
        "vision_config": {"per_layer_config": {}, "adapter_in_dim": 64, "adapter_out_dim": 64},
        "audio_config": {"adapter_input_size": 64, "adapter_out_dim": 64, "downsample_hidden_size": 32},
    },
    "dots3_note_text": {"num_hidden_layers": 2},
    "gemma3n_text": {
        "num_hidden_layers": 4, "num_kv_shared_layers": 0, "hidden_size_per_layer_input": 8, "laurel_rank": 8,
        "vocab_size_per_layer_input": VOCABULARY, "activation_sparsity_pattern": [0.0] * 4,
        "layer_types": ["sliding_attention", "full_attention"] * 2, "intermediate_size": [96] * 4,
    },
    "gemma4_text": {"hidden_size_per_layer_input": 8, "vocab_size_per_layer_input": VOCABULARY, "global_head_dim": 16},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "granitemoehybrid": {"layers_block_type": ["mamba", "attention"]},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"], "num_dense_layers": 1},
    "longcat_flash": {"num_layers": 2, "head_dim": 8, "zero_expert_num": 2, "moe_topk": 2},
    "mamba2": {"num_heads": 8, "head_dim": 16},
    "qwen4_exp": {"text_config": {"num_hidden_layers": 2}},
    "qwen4_exp_text": {"num_hidden_layers": 2},
    "xglm": {"pad_token_id": 1},
    "zamba": {
        "num_hidden_layers": 3, "layers_block_type": ["linear_attention", "hybrid", "hybrid"],
        "attention_hidden_size": 128, "attention_head_dim": 32, "n_mamba_heads": 2,
    },
    "zamba2": {
        "num_hidden_layers": 3, "layers_block_type": ["mamba", "hybrid", "mamba"], "num_mem_blocks": 1,
        "hybrid_layer_ids": [1], "mamba_ngroups": 1, "mamba_headdim": 16, "n_mamba_heads": 8, "adapter_rank": 8,
    },
    "zaya": {"num_experts_per_tok": 1},
    # wrappers
    "gemma3": {"mm_tokens_per_image": 4, "vision_config": {"model_type": "siglip_vision_model"}},
    "internvl": {
        "text_config": {"model_type": "qwen2"}, "vision_config": {"image_size": [28, 28], "patch_size": [14, 14]},
    },
    "gemma4": {"text_config": {
        "hidden_size_per_layer_input": 8, "vocab_size_per_layer_input": VOCABULARY, "global_head_dim": 16,
    }},
    "llama4": {"vision_config": {
        "projector_input_dim": 64, "projector_output_dim": 64, "vision_output_dim": 64, "intermediate_size": 256,
    }},
    "llava": {"text_config": {"model_type": "llama"}, "vision_config": {"model_type": "clip_vision_model"}},
    "llava_next": {"text_config": {"model_type": "llama"}, "vision_config": {"model_type": "clip_vision_model"}},
    "mistral3": {"text_config": {"model_type": "mistral"}, "vision_config": {"model_type": "pixtral"}},
    "mllama": {"text_config": {
        "num_hidden_layers": 3, "cross_attention_layers": [1], "rope_parameters": _ROPE, "pad_token_id": 258,
    }, "vision_config": {
        "num_global_layers": 1, "intermediate_layers_indices": [0], "vision_output_dim": 128, "max_num_tiles": 1,
        "supported_aspect_ratios": [[1, 1]],
    }},
    "qwen2_5_vl": {"text_config": _SECTIONS, "vision_config": {"fullatt_block_indexes": [1]}},
    "qwen2_vl": {"text_config": _SECTIONS},
    "qwen3_5": {
        "text_config": {"layer_types": ["linear_attention", "full_attention"]},
        "vision_config": {"deepstack_visual_indexes": []},
    },
    "qwen3_vl": {"vision_config": {"deepstack_visual_indexes": [0]}},
    "smolvlm": {"text_config": {"model_type": "llama"}},
}  # fmt: skip
"""What the rule below cannot know. Where a name has `layer` in it, the layers are not one of each kind."""

WRAPPERS = (
    "gemma3", "gemma4", "internvl", "llama4", "llava", "llava_next", "mistral3", "mllama", "qwen2_5_vl", "qwen2_vl",
    "qwen3_5", "qwen3_vl", "qwen3_vl_moe", "smolvlm",
)  # fmt: skip
"""Vision-language models that are checked."""

_NOT_CHECKED = (
    "bart", "bert", "bert-generation", "big_bird", "bigbird_pegasus", "blenderbot", "blenderbot-small", "blt",
    "camembert", "cpmant", "data2vec-text", "electra", "emu3", "ernie", "fuyu", "gemma3n", "gemma4_assistant",
    "gemma4_unified", "gemma4_unified_assistant", "git", "got_ocr2", "marian", "mbart", "megatron-bert", "moshi",
    "moss_transcribe_diarize", "musicgen", "musicgen_melody", "mvp", "pegasus", "phi4_multimodal", "plbart",
    "prophetnet", "reformer", "rembert", "roberta", "roberta-prelayernorm", "roc_bert", "roformer", "trocr", "whisper",
    "xlm", "xlm-roberta", "xlm-roberta-xl", "xlnet", "xmod",
)  # fmt: skip
"""Encoders, decoders that belong to an encoder, and helpers of other models; or they do not get small."""


_OWN_VALUES = ("model_type", "dtype", "torch_dtype", "name_or_path", "initializer_range", "init_std")
_LAYER_KINDS = ("layer_types", "layers_block_type", "block_types", "mlp_layer_types")


def types() -> list[str]:
    """List the model types to check: every decoder of text, and the wrappers."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    text = [name for name in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES if name not in _NOT_CHECKED and name not in WRAPPERS]
    return [*text, *WRAPPERS]


def tiny_config(model_type: str) -> Any:
    """Make a small configuration of a model type: every size that its class has, by name, and the special ones."""
    from transformers import CONFIG_MAPPING

    kind = CONFIG_MAPPING[model_type]
    return kind(**_arguments(kind, _SPECIAL.get(model_type, {})))


def tiny_like(config: Any) -> Any:
    """Make a small configuration with the switches of another: all but its sizes.

    Raises:
        UserError: the model runs code of its own, or does not get small.
    """
    kind = type(config)
    if getattr(config, "auto_map", None):
        raise UserError(
            f"base: got a model with code of its own ({kind.__name__}), expected a type of transformers. Fix: train it "
            "for one step: --steps 1"
        )
    special = _SPECIAL.get(config.model_type, {})
    try:
        return kind(**_arguments(kind, special, config))
    except Exception as error:  # a configuration's own checks
        raise UserError(
            f"base: a tiny model like {kind.__name__} cannot be built: {first_line(error)}. Fix: check its type, "
            f"without these settings: scale-sft models check {config.model_type}"
        ) from None


def _arguments(kind: Any, special: Mapping[str, Any], like: Any = None) -> dict[str, Any]:
    """Choose the arguments of a configuration's class; `like`: a configuration whose switches are taken."""
    from transformers import CONFIG_MAPPING, PretrainedConfig

    fields = set(inspect.signature(kind.__init__).parameters)
    own = special.get("vision_config") is None and "vision" in kind.__name__.lower()
    given = {name: value for name, value in {**_SMALL, **(_VISION if own else {})}.items() if name in fields}
    if "kv_lora_rank" in given and "num_key_value_heads" in given:
        given["num_key_value_heads"] = given["num_attention_heads"]
    if like is not None:
        given |= _switches(given, special, like, fields)
    if not any("layer" in name for name in special):
        given |= _layers(like if like is not None else _defaults(kind), fields)
    for name, sub in getattr(kind, "sub_configs", {}).items():
        wanted = dict(special.get(name, {}))
        mine = getattr(like, name, None)
        if mine is not None:
            sub = type(mine)
            if wanted.pop("model_type", mine.model_type) != mine.model_type:  # made for another part
                wanted = {}
            wanted = {"model_type": mine.model_type, **wanted}
        elif "model_type" in wanted:
            sub = CONFIG_MAPPING[wanted["model_type"]]
        if name in fields and inspect.isclass(sub) and issubclass(sub, PretrainedConfig):
            given[name] = {**_arguments(sub, wanted, mine), **wanted}
    return {
        **given,
        **{name: value for name, value in special.items() if name not in given or name not in kind.sub_configs},
    }


def _switches(given: Mapping[str, Any], special: Mapping[str, Any], like: Any, fields: Iterable[str]) -> dict[str, Any]:
    """Take what is not a size from `like`: flags, names, factors, and the parts that it lacks."""
    taken: dict[str, Any] = {}
    rope = _setting(like, "rope_parameters")
    if isinstance(rope, dict) and "rope_parameters" in fields and all(map(_is_plain, rope.values())):
        short = {"original_max_position_embeddings": 32} if "original_max_position_embeddings" in rope else {}
        taken["rope_parameters"] = {**rope, **short}
    for name in sorted({*fields} - {*special} - {*_OWN_VALUES}):
        value = _setting(like, name)
        if (
            (name in given and vars(like).get(name, given) is None)
            or isinstance(value, bool | str)
            or _is_factor(name, value)
        ):
            taken[name] = value
    heads, shared = (_setting(like, name) for name in ("num_attention_heads", "num_key_value_heads"))
    if "num_key_value_heads" in taken.keys() | given.keys() and shared in (1, heads):
        taken["num_key_value_heads"] = 1 if shared == 1 else given.get("num_attention_heads", 4)
    return taken


def _layers(like: Any, fields: Iterable[str]) -> dict[str, Any]:
    """Take one layer of each kind from `like`, two at least: its settings by layer, and their number."""
    by_layer = {name: value for name in fields if isinstance(value := _setting(like, name), list) and len(value) > 1}
    kinds = [by_layer[name] for name in _LAYER_KINDS if name in by_layer]
    if not kinds:
        return {}
    chosen = {layers.index(kind) for layers in kinds for kind in layers}
    depth = len(kinds[0])
    if len(chosen) == 1:
        chosen.add(depth - 1)
    taken: dict[str, Any] = {"num_hidden_layers": len(chosen)}
    for name, settings in by_layer.items():
        if len(settings) == depth:
            taken[name] = [settings[layer] for layer in sorted(chosen)]
    return taken


def _setting(config: Any, name: str) -> Any:
    """Return a setting of a configuration; None where it has none, or not one for all layers."""
    try:
        return getattr(config, name, None)
    except Exception:  # transformers' AmbiguousGlobalPerLayerAttributeError is not an AttributeError
        return None


def _defaults(kind: Any) -> Any:
    """Make a configuration of a class with its own defaults, or None where it has none."""
    try:
        return kind()
    except Exception:
        return None


def _is_plain(value: Any) -> bool:
    return isinstance(value, bool | str | int | float)


def _is_factor(name: str, value: Any) -> bool:
    return isinstance(value, float) and name not in _SMALL


def byte_tokenizer() -> Any:
    """Make a tokenizer of bytes and three special tokens."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: n for n, token in enumerate([*alphabet, "<s>", "</s>", "<pad>"])}
    raw = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    raw.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=raw, bos_token="<s>", eos_token="</s>", pad_token="<pad>")
