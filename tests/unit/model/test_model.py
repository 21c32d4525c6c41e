import re

import pytest
import torch
from torch import nn
from torch.nn import functional
from transformers import AutoModelForCausalLM

from scale_sft.config.options import ModelConfig
from scale_sft.data.micro_batches import collate
from scale_sft.errors import UserError
from scale_sft.model.coverage import coverage
from scale_sft.model.loading import load_base, load_model_config, load_tokenizer, resolve_dtype
from scale_sft.model.loss import token_loss_sum
from scale_sft.model.targets import choose_targets, depth_of, find_targets

IN_BLOCKS = {
    "llama": {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"},
    "qwen2": {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"},
    "opt": {"q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"},
    "gpt2": {"c_attn", "c_proj", "c_fc"},
}
COUNT = {"llama": 14, "qwen2": 14, "opt": 12, "gpt2": 8}


@pytest.fixture
def load(tiny_model):
    """(architecture, option=value, ...) -> the base as the trainer loads it."""

    def get(architecture: str = "llama", **options) -> nn.Module:
        config = ModelConfig(base=str(tiny_model(architecture)), **options)
        return load_base(config, load_model_config(config), torch.device("cpu"))

    return get


def test_by_default_all_linear_layers_inside_the_blocks_are_targets(load, architecture: str) -> None:
    targets = find_targets(load(architecture), None)
    assert {target.name.split(".")[-2] for target in targets} == IN_BLOCKS[architecture]
    assert len(targets) == COUNT[architecture] and not any("lm_head" in target.name for target in targets)


@pytest.mark.parametrize(
    ("names", "depth"),
    [
        (["model.layers.0.mlp.up_proj.weight", "model.layers.0.self_attn.q_proj.weight"], 1),
        (["model.layers.1.mlp.experts.up_proj.0", "model.layers.11.mlp.experts.3.up_proj.weight"], 2),
        (["transformer.h.0.attn.c_attn.weight", "transformer.h.1.attn.c_attn.weight", "lm_head.weight"], 2),
        (["model.embed_tokens.weight"], 1),
    ],
)
def test_the_depth_of_weights_is_the_number_of_blocks_that_hold_them(names: list[str], depth: int) -> None:
    assert depth_of(names) == depth


def test_shapes_are_those_of_the_stored_weights(load, architecture: str) -> None:
    model = load(architecture)
    weights = dict(model.named_parameters())
    for target in find_targets(model, None):
        assert target.shape == tuple(weights[target.name].shape) and target.numel == weights[target.name].numel()
        assert target.transposed == (architecture == "gpt2")


@pytest.mark.parametrize(
    ("wanted", "count"),
    [
        (("q_proj",), 2),
        (("q_proj", "v_proj"), 4),
        ("q_proj", 2),
        (("self_attn.q_proj",), 2),
        ("model.layers.1.mlp.up_proj", 1),
        (r".*\.0\.mlp\..*", 3),
        (r"model\.layers\.\d+\.self_attn\.[qk]_proj", 4),
        ("lm_head", 1),
    ],
)
def test_targets_are_chosen_by_name_or_regular_expression(load, wanted, count: int) -> None:
    assert len(find_targets(load(), wanted)) == count


@pytest.mark.parametrize("wanted", ["query", ("q_proj", "query"), ("proj",), r".*\.9\..*"])
def test_a_target_that_matches_nothing_is_told_what_there_is(load, wanted) -> None:
    with pytest.raises(UserError, match="matches no layer; this model has") as error:
        find_targets(load(), wanted)
    assert "q_proj (2x)" in str(error.value) and "lm_head (1x)" in str(error.value)


def test_a_broken_regular_expression_is_named(load) -> None:
    with pytest.raises(UserError, match=re.escape("'q_(proj' is not a regular expression")):
        find_targets(load(), "q_(proj")


class RoundingLinear(nn.Linear):
    """Stands for a layer whose weight is not what it seems."""

    def forward(self, x):
        return functional.linear(x, self.weight.round())


class OwnProduct(nn.Linear):
    """A linear layer in other words, as in Falcon."""

    def forward(self, x):
        return x @ self.weight.T if self.bias is None else x @ self.weight.T + self.bias


def test_a_linear_layer_that_computes_something_else_is_left_out_and_named(load) -> None:
    model, path = load(), "model.layers.1.mlp.up_proj"
    model.model.layers[1].mlp.up_proj = RoundingLinear(32, 48)
    choice = choose_targets(model, None)
    assert choice.left_out == {path: "RoundingLinear, whose forward is not that of nn.Linear"}
    assert len(choice.targets) == 13 and "up_proj (RoundingLinear" in coverage(model, choice).line()
    for wanted in (("up_proj",), r".*\.1\.mlp\..*"):
        with pytest.raises(UserError, match=rf"got '{path}' \(RoundingLinear.*Fix: --exclude_modules up_proj"):
            find_targets(model, wanted)
    assert len(find_targets(model, ("q_proj",))) == 2


def test_a_linear_layer_in_other_words_is_trained_like_any(load) -> None:
    model = load()
    model.model.layers[1].mlp.up_proj = OwnProduct(32, 48)
    assert len(find_targets(model, None)) == 14


def test_layers_can_be_excluded_by_name_or_regular_expression(load) -> None:
    model = load()
    for excluded, count in ((("up_proj",), 12), (r".*\.1\..*", 7), ("model.layers.0.self_attn.q_proj", 13)):
        choice = choose_targets(model, None, excluded)
        assert len(choice.targets) == count and len(choice.left_out) == 14 - count
    with pytest.raises(UserError, match="exclude_modules: 'query' matches no layer"):
        find_targets(model, None, ("query",))
    with pytest.raises(UserError, match=r"none of the 2 layers that match can be trained: named by exclude_modules"):
        find_targets(model, ("up_proj",), ("up_proj",))


def test_a_model_without_linear_layers_in_blocks_is_refused() -> None:
    with pytest.raises(UserError, match="no linear layers in its blocks"):
        find_targets(nn.Sequential(nn.Linear(2, 2)), None)


def test_the_base_is_frozen_and_without_dropout(load, architecture: str) -> None:
    model = load(architecture)
    assert not any(parameter.requires_grad for parameter in model.parameters())
    assert model.training and all(module.p == 0 for module in model.modules() if isinstance(module, nn.Dropout))
    batch = {"input_ids": torch.arange(20)[None], "attention_mask": torch.ones(1, 20, dtype=torch.int64)}
    first, second = (model(**batch, use_cache=False).logits for _ in range(2))
    model.eval()
    assert torch.equal(first, second) and torch.equal(first, model(**batch, use_cache=False).logits)


def test_recorded_gradients_are_those_of_dense_autograd(session, tiny_model, architecture: str) -> None:
    run = session(base=str(tiny_model(architecture)), density=1.0)
    batch = collate(run.inputs.train, range(4), run.inputs.tokenizer.pad_token_id, torch.device("cpu"))
    run.tuning.begin_step(1)
    token_loss_sum(run.model, batch).backward()
    stock = AutoModelForCausalLM.from_pretrained(tiny_model(architecture))
    token_loss_sum(stock, batch).backward()
    weights = dict(stock.named_parameters())
    first = 0
    for delta in run.tuning.store:
        recorded = run.tuning.recorder.gradients[first : first + delta.active].view(delta.shape)
        torch.testing.assert_close(recorded, weights[delta.name].grad, rtol=1e-4, atol=1e-5)
        assert float(recorded.abs().max()) > 0
        first += delta.active


def test_auto_dtype_is_that_of_the_stored_model(tiny_model) -> None:
    for stored, asked, expected in [
        ("float32", "auto", torch.float32),
        ("bfloat16", "auto", torch.bfloat16),
        ("float16", "auto", torch.bfloat16),
        ("bfloat16", "float32", torch.float32),
    ]:
        config = ModelConfig(base=str(tiny_model("llama", stored)), dtype=asked)
        assert resolve_dtype(config, load_model_config(config)) is expected


def test_a_base_that_does_not_exist_is_one_error(tmp_path) -> None:
    for base in (str(tmp_path / "nothing"), "nobody/no-such-model"):
        with pytest.raises(UserError, match="is neither a model folder here nor a model that the hub gave"):
            load_model_config(ModelConfig(base=base))
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="holds no config.json"):
        load_model_config(ModelConfig(base=str(tmp_path / "empty")))


def test_a_base_without_weights_is_one_error(tiny_model, tmp_path) -> None:
    for name in ("config.json", "generation_config.json"):
        (tmp_path / name).write_bytes((tiny_model() / name).read_bytes())
    config = ModelConfig(base=str(tmp_path))
    with pytest.raises(UserError, match="does not load") as error:
        load_base(config, load_model_config(config), None)
    assert "\n" not in str(error.value)
    with pytest.raises(UserError, match="has no tokenizer that loads"):
        load_tokenizer(config)


def test_a_tokenizer_without_padding_pads_with_its_end_token(tiny_model, tokenizer, tmp_path) -> None:
    import copy

    bare = copy.deepcopy(tokenizer)
    bare.pad_token = None
    bare.save_pretrained(tmp_path)
    (tmp_path / "config.json").write_bytes((tiny_model() / "config.json").read_bytes())
    loaded = load_tokenizer(ModelConfig(base=str(tmp_path)))
    assert loaded.pad_token_id == loaded.eos_token_id


def test_experts_that_are_layers_of_their_own_are_refused_on_several_ranks() -> None:
    from scale_sft.training.inputs import refuse_experts

    refuse_experts(["model.layers.0.mlp.experts_gate.weight", "model.layers.0.self_attn.q_proj.weight"])
    with pytest.raises(UserError, match="layers.1.block.experts.3.w1.weight' is one of several experts"):
        refuse_experts(["model.layers.0.self_attn.q_proj.weight", "model.layers.1.block.experts.3.w1.weight"])
