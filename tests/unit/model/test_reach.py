"""What a pass over text does with each layer is known before any weight is loaded, on the meta device."""

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    DbrxConfig,
    GPT2Config,
    MambaConfig,
    MixtralConfig,
    PhimoeConfig,
    Qwen3VLConfig,
)

from scale_sft.config.options import SparseConfig
from scale_sft.errors import UserError
from scale_sft.model.attention import EAGER_TOKENS, choose_attention
from scale_sft.model.coverage import Coverage, coverage_of
from scale_sft.model.dropout import DropoutOff, switch_off_randomness
from scale_sft.model.empty import empty_model, model_class
from scale_sft.model.loading import enable_checkpointing, kept_whole
from scale_sft.model.reach import NOT_BY_TEXT, PAST_ITS_FORWARD, reach_of, refuse_randomness
from scale_sft.model.targets import EXCLUDED, ROUTER, find_targets

TINY = {"vocab_size": 259, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
GROUPED = {**TINY, "num_key_value_heads": 2}
MIXTRAL = MixtralConfig(**GROUPED, num_local_experts=4, router_jitter_noise=0.1)
FFN = {"ffn_hidden_size": 48, "moe_num_experts": 4}
ATTENTION = {"kv_n_heads": 2, "rope_theta": 1e4}
DBRX = DbrxConfig(vocab_size=259, d_model=32, n_heads=4, n_layers=2, attn_config=ATTENTION, ffn_config=FFN)
MAMBA = MambaConfig(vocab_size=259, hidden_size=32, num_hidden_layers=2, state_size=8)
PHIMOE = PhimoeConfig(**GROUPED, num_local_experts=4)
VISION = {"hidden_size": 32, "intermediate_size": 48, "depth": 1, "num_heads": 2, "out_hidden_size": 32}
QWEN_VL = Qwen3VLConfig(
    text_config={**GROUPED, "head_dim": 8}, vision_config={**VISION, "deepstack_visual_indexes": [0]}
)


def test_a_weight_that_is_used_past_its_forward_is_left_out_and_named() -> None:
    model = empty_model(MAMBA)
    faults = reach_of(model).faults
    assert set(faults) == {f"backbone.layers.{n}.mixer.dt_proj" for n in (0, 1)} and set(faults.values()) == {
        PAST_ITS_FORWARD
    }
    assert not any("dt_proj" in target.name for target in find_targets(model, None))
    with pytest.raises(UserError, match=r"dt_proj' \(used past its module's forward\).*Fix: --exclude_modules dt_proj"):
        find_targets(model, ("dt_proj",))


def test_a_layer_whose_dtype_or_data_other_code_reads_stays_whole_in_4_bits() -> None:
    from scale_sft.model_check.tiny import tiny_config

    config = tiny_config("dots3_note_text")  # hidden_states.to(self.weights_proj.weight.dtype)
    paths = [f"model.layers.{n}.self_attn.indexer.weights_proj" for n in (0, 1)]
    assert list(reach_of(empty_model(config)).read) == paths and kept_whole(config) == ["lm_head", *paths]
    clamped = kept_whole(tiny_config("gemma3n_text")) or []  # self.prediction_coefs.weight.data.clamp_()
    assert "model.layers.0.altup.prediction_coefs" in clamped and kept_whole(MIXTRAL) is None


def test_of_a_vision_language_model_the_text_part_is_trained() -> None:
    model = empty_model(QWEN_VL)
    names = [target.name for target in find_targets(model, None)]
    assert len(names) == 14 and all(name.startswith("model.language_model.layers.") for name in names)
    assert find_targets(model, ("q_proj", "qkv")) and not any(
        "visual" in t.name for t in find_targets(model, r".*\.\d+\..*")
    )
    with pytest.raises(UserError, match=f"1 layers that match can be trained: {NOT_BY_TEXT}"):
        find_targets(model, ("qkv",))


def test_the_share_that_is_not_reached_is_said_with_its_reasons() -> None:
    attention, experts, router = 2 * 32 * (32 + 32 + 16 + 16), 2 * 4 * 32 * 3 * 48, 2 * 4 * 32
    found = coverage_of(empty_model(MIXTRAL), SparseConfig(density=0.1))
    assert (found.entries, found.reached) == (attention + experts + router, attention + experts)
    assert found.line() == "99.4 % of the weights in the blocks are targets; not trained: 0.6 % gate (" + ROUTER + ")"
    found = coverage_of(empty_model(MIXTRAL), SparseConfig(density=0.1, exclude_modules=("experts.gate_up_proj", "0")))
    assert {(one.kind, one.reason, one.weights) for one in found.rest} == {
        ("experts.gate_up_proj", EXCLUDED, 8),
        ("experts.down_proj", EXCLUDED, 2),
        ("gate", ROUTER, 2),
    }
    assert Coverage.of_document(found.document()) == found
    found = coverage_of(empty_model(DBRX), SparseConfig(density=0.1))
    assert {(one.kind, one.reason) for one in found.rest} == {
        *((f"mlp.{leaf}", "a parameter of DbrxExpertGLU, not nn.Linear") for leaf in ("w1", "v1", "w2")),
        ("layer", ROUTER),
    }
    everything = coverage_of(
        empty_model(GPT2Config(vocab_size=259, n_embd=32, n_layer=2, n_head=4)), SparseConfig(density=0.1)
    )
    assert everything.line() == "100 % of the weights in the blocks are targets"


def test_dropout_and_jitter_are_off_at_any_depth_of_a_configuration() -> None:
    config = DbrxConfig(resid_pdrop=0.1, attn_config={"attn_pdrop": 0.2}, ffn_config={"moe_jitter_eps": 0.1})
    switch_off_randomness(config)
    assert (config.resid_pdrop, config.attn_config.attn_pdrop, config.ffn_config.moe_jitter_eps) == (0.0, 0.0, None)
    assert PhimoeConfig(router_jitter_noise=0.01, input_jitter_noise=0.1).router_jitter_noise == 0.01
    config = PhimoeConfig(router_jitter_noise=0.01, input_jitter_noise=0.1)
    switch_off_randomness(config)
    assert (config.router_jitter_noise, config.input_jitter_noise) == (0.01, 0.0)  # the former is a threshold there


def test_a_router_in_memory_does_not_jitter_while_deltas_are_trained() -> None:
    model = AutoModelForCausalLM.from_config(MIXTRAL).train()
    ids = torch.arange(12).view(2, 6)
    run = lambda: model(input_ids=ids, use_cache=False).logits
    assert not torch.equal(run(), run())
    off = DropoutOff(model)
    assert torch.equal(run(), run())
    off.restore()
    assert not torch.equal(run(), run()) and model.config.router_jitter_noise == 0.1


def test_a_forward_pass_that_samples_is_refused_or_allowed_by_name() -> None:
    model = empty_model(PHIMOE)
    with pytest.raises(UserError, match="PhimoeTopKRouter draws random numbers.*Fix: --allow_randomness true"):
        refuse_randomness(model, allowed=False)
    assert "PhimoeTopKRouter" in (refuse_randomness(model, allowed=True) or "")
    for config in (MIXTRAL, MAMBA, QWEN_VL):
        assert refuse_randomness(empty_model(config), allowed=False) is None


def test_auto_attention_is_what_a_model_has_and_a_cpu_does_fast() -> None:
    llama_like, gemma_like = (
        type("M", (), {"config": type("C", (), {"_attn_implementation": name})}) for name in ("sdpa", "eager")
    )
    chosen = lambda asked, model, dtype, tokens, device: choose_attention(asked, model, dtype, tokens, device).name
    assert chosen("auto", llama_like, torch.float32, 64, "cpu") == "sdpa"
    assert chosen("auto", llama_like, torch.bfloat16, EAGER_TOKENS, "cpu") == "eager"
    assert chosen("auto", llama_like, torch.bfloat16, EAGER_TOKENS + 1, "cpu") == "sdpa"
    assert chosen("auto", llama_like, torch.bfloat16, 64, "cuda") == "sdpa"
    assert chosen("auto", gemma_like, torch.float32, 999, "cuda") == "eager"
    assert chosen("sdpa", llama_like, torch.bfloat16, 64, "cpu") == "sdpa"
    assert "no sdpa" in (choose_attention("auto", gemma_like, torch.float32, 9, "cpu").note or "")


@pytest.mark.parametrize("kind", ["gptj", "bloom", "gpt_oss"])
def test_a_model_without_sdpa_gets_eager_and_is_refused_sdpa_by_name(kind: str) -> None:
    from scale_sft.model_check.tiny import tiny_config

    config = tiny_config(kind)
    assert choose_attention("auto", empty_model(config), torch.float32, 64, "cpu").name == "eager"
    with pytest.raises(UserError, match="attention: got sdpa, expected auto.*Fix: --attention auto"):
        empty_model(config, attention="sdpa")


def test_a_base_that_generates_no_text_is_refused() -> None:
    from transformers import ViTConfig

    with pytest.raises(UserError, match="base: got a model of type 'vit', expected one that generates text"):
        model_class(ViTConfig())


def test_checkpointing_of_a_model_that_cannot_is_one_error() -> None:
    model = empty_model(MAMBA)
    model.supports_gradient_checkpointing = False
    with pytest.raises(UserError, match="gradient_checkpointing: got true, expected false, as MambaForCausalLM"):
        enable_checkpointing(model)
