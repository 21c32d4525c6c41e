"""The input embedding and the output layer as targets: which they are, and their gradients in whole models."""

import pytest
import torch
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    Gemma3TextConfig,
    GPT2Config,
    GPTNeoXConfig,
    LlamaConfig,
    OPTConfig,
)

import scale_sft
from scale_sft.errors import UserError
from scale_sft.model import output_layer
from scale_sft.model.coverage import coverage
from scale_sft.model.loss import token_loss_sum
from scale_sft.model.targets import choose_targets, find_targets

V = 41
SMALL = {
    "vocab_size": V, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2,
    "num_key_value_heads": 2, "max_position_embeddings": 32, "pad_token_id": 0,
}  # fmt: skip
CONFIGS = {
    "llama": lambda: LlamaConfig(**SMALL),
    "llama, tied": lambda: LlamaConfig(**SMALL, tie_word_embeddings=True),
    "gpt2, tied": lambda: GPT2Config(vocab_size=V, n_embd=16, n_layer=1, n_head=2, n_positions=32),
    "opt, tied and narrow": lambda: OPTConfig(**SMALL, ffn_dim=24, word_embed_proj_dim=8),
    "gemma3, tied and scaled": lambda: Gemma3TextConfig(**SMALL, head_dim=8, sliding_window=8),
    "gpt_neox": lambda: GPTNeoXConfig(**SMALL, tie_word_embeddings=False),
}
NAMES = {
    "llama": ["model.embed_tokens.weight", "lm_head.weight"],
    "llama, tied": ["model.embed_tokens.weight"],
    "gpt2, tied": ["transformer.wte.weight"],
    "opt, tied and narrow": ["model.decoder.embed_tokens.weight"],
    "gemma3, tied and scaled": ["model.embed_tokens.weight"],
    "gpt_neox": ["gpt_neox.embed_in.weight", "lm_head.weight"],
}


def made(name: str) -> nn.Module:
    config = CONFIGS[name]()
    for rate in ("resid_pdrop", "embd_pdrop", "attn_pdrop", "dropout", "attention_dropout", "hidden_dropout"):
        if hasattr(config, rate):
            setattr(config, rate, 0.0)
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config).requires_grad_(False).train()


@pytest.fixture
def batch():
    labels = torch.randint(1, V // 2, (2, 7), generator=torch.Generator().manual_seed(0))
    labels[0, :3] = -100
    ids = labels.clamp(min=0)  # the padding token occurs
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}


@pytest.mark.parametrize("name", CONFIGS)
def test_both_uses_of_a_weight_feed_one_gradient_which_is_that_of_autograd(name, batch, monkeypatch) -> None:
    monkeypatch.setattr(output_layer, "CPU_CHUNK", 3 * V)
    model = made(name)
    ends = [model.get_parameter(weight) for weight in NAMES[name]]
    for weight in ends:
        weight.requires_grad_(True)
    token_loss_sum(model, batch).backward()
    expected = {weight: end.grad for weight, end in zip(NAMES[name], ends, strict=True)}
    model.requires_grad_(False)
    if "narrow" not in name:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    sparse = scale_sft.attach(model, density=0.5, total_steps=9, train_embeddings="both")
    optimizer = sparse.optimizer(lr=1e-3)
    assert [target.name for target in sparse.targets if target.name in NAMES[name]] == NAMES[name]
    for total in (token_loss_sum, lambda model, batch: model(**batch).loss * (batch["labels"][:, 1:] >= 0).sum()):
        optimizer.zero_grad()
        total(model, batch).backward()
        of_each = sparse.tuning.recorder.gradients.split([delta.active for delta in sparse.tuning.store])
        for delta, found in zip(sparse.tuning.store, of_each, strict=True):
            if delta.name in expected:
                wanted = expected[delta.name].view(-1)[delta.indices.long()]
                torch.testing.assert_close(found, wanted, rtol=1e-4, atol=2e-6)
                assert found.any()
    optimizer.step()
    sparse.detach()
    for end in ends:
        assert end.grad is None or not end.requires_grad


@pytest.mark.parametrize(
    ("name", "wanted", "excluded", "option", "expected"),
    [
        ("llama", None, None, "none", []),
        ("llama", None, None, "input", ["model.embed_tokens.weight"]),
        ("llama", None, None, "output", ["lm_head.weight"]),
        ("llama", None, ("lm_head",), "both", ["model.embed_tokens.weight"]),
        ("llama", ("q_proj", "lm_head"), None, "none", ["lm_head.weight"]),
        ("llama", ("embed_tokens",), None, "none", ["model.embed_tokens.weight"]),
        ("llama, tied", ("lm_head",), None, "none", ["model.embed_tokens.weight"]),
        ("llama, tied", ("embed_tokens", "lm_head"), None, "output", ["model.embed_tokens.weight"]),
        ("gpt2, tied", None, None, "input", ["transformer.wte.weight"]),
    ],
)
def test_options_choose_them_next_to_the_layers_of_the_blocks(name, wanted, excluded, option, expected) -> None:
    model = made(name)
    choice = choose_targets(model, wanted, excluded, option)
    assert [target.name for target in choice.targets if target.name in NAMES[name]] == expected
    in_blocks = len(choice.targets) - len(expected)
    assert in_blocks == (0 if wanted and "q_proj" not in wanted else 1 if wanted else 7 if "llama" in name else 4)
    line = coverage(model, choice).line()
    assert all(target.removesuffix(".weight").split(".")[-1] in line for target in expected), line


@pytest.mark.parametrize(
    ("name", "excluded", "option", "message"),
    [
        ("llama, tied", ("lm_head",), "both", "exclude_modules: got 'lm_head', which shares its weight with a target"),
        ("llama, tied", ("embed_tokens",), "output", "exclude_modules: got 'model.embed_tokens'"),
    ],
)
def test_a_tied_weight_is_trained_whole_or_not_at_all(name, excluded, option, message) -> None:
    with pytest.raises(UserError, match=message):
        find_targets(made(name), None, excluded, option)


def test_a_weight_that_a_third_layer_shares_is_refused() -> None:
    model = made("llama, tied")
    model.extra = nn.Linear(16, V, bias=False)
    model.extra.weight = model.lm_head.weight
    with pytest.raises(UserError, match="'model.embed_tokens' is tied to another layer"):
        find_targets(model, ("embed_tokens",))
    with pytest.raises(UserError, match="names no input embedding"):
        find_targets(nn.Sequential(nn.Linear(2, 2)), None, None, "input")


def test_an_embedding_that_is_used_past_its_forward_is_refused(monkeypatch) -> None:
    """Only part of its gradient would reach the tap."""
    from transformers.models.llama import modeling_llama

    forward = modeling_llama.LlamaModel.forward

    def reading(self, *arguments, **named):
        found = forward(self, *arguments, **named)
        found.last_hidden_state = found.last_hidden_state + self.embed_tokens.weight.sum(0)
        return found

    monkeypatch.setattr(modeling_llama.LlamaModel, "forward", reading)
    monkeypatch.setattr("scale_sft.model.reach._PROBED", {})
    model = made("llama")
    with pytest.raises(UserError, match=r"got 'model.embed_tokens' \(used past its module's forward\)"):
        find_targets(model, None, None, "input")
    assert len(find_targets(model, None)) == 7
