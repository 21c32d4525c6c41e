"""Adapters on a model, and in folders, as PEFT has them."""

from __future__ import annotations

import json

import peft
import pytest
import torch
from peft import AutoPeftModelForCausalLM, PeftModel, get_peft_model
from tiny_peft import batches, same, tiny, train, weights_of, wrapped
from transformers import AutoModelForCausalLM

import scale_sft
from scale_sft.adapters import arithmetic
from scale_sft.errors import UserError
from scale_sft.peft import SpielConfig, hotswap

BF16 = torch.bfloat16


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """Folders: base (bf16), one adapter of it (saved by PEFT), another one (saved by us)."""
    folder = tmp_path_factory.mktemp("peft")
    tiny(BF16).save_pretrained(folder / "base")
    for name, seed in (("one", 0), ("two", 1)):
        model = wrapped(load(folder), seed=seed, task_type="CAUSAL_LM")
        train(model, 8)
        model.save_pretrained(folder / name)
    scale_sft.Adapter.load(folder / "two").save(folder / "ours")
    return folder


def load(home):
    return AutoModelForCausalLM.from_pretrained(home / "base", dtype=BF16)


def logits(model) -> torch.Tensor:
    with torch.no_grad():
        return model(batches(1)[0]["input_ids"]).logits


@pytest.fixture
def base(home):
    return {name: weight.clone() for name, weight in load(home).named_parameters()}


def is_base(model, base) -> bool:
    now = weights_of(model)
    return same(now, {name: base[name] for name in now})


@pytest.mark.parametrize("folder", ["one", "ours"])
def test_each_side_reads_the_others_folder_with_the_same_logits(home, folder) -> None:
    under_peft = PeftModel.from_pretrained(load(home), home / folder)
    plain = load(home)
    with scale_sft.load_adapter(plain, home / folder):
        assert torch.equal(logits(under_peft), logits(plain))
    assert not torch.equal(logits(under_peft), logits(plain))
    assert not any(one.requires_grad for one in under_peft.parameters())
    assert torch.equal(logits(AutoPeftModelForCausalLM.from_pretrained(home / folder)), logits(under_peft))


def test_merging_and_unloading_leave_a_plain_model(home, base) -> None:
    model = PeftModel.from_pretrained(load(home), home / "one")
    tuned = logits(model)
    merged = model.merge_and_unload(safe_merge=True)
    assert type(merged) is type(load(home)) and torch.equal(logits(merged), tuned)
    unloaded = PeftModel.from_pretrained(load(home), home / "one").unload()
    assert all(torch.equal(weight, base[name]) for name, weight in unloaded.named_parameters())


def test_cycles_of_merging_disabling_and_swapping_never_move_a_bit_of_the_base(home, base) -> None:
    model = PeftModel.from_pretrained(load(home), home / "one", is_trainable=True)
    model.load_adapter(home / "ours", "other")
    tuned, other = weights_of(model), None
    for _ in range(20):
        model.merge_adapter()
        assert same(weights_of(model), tuned)
        model.unmerge_adapter()
        with model.disable_adapter():
            assert is_base(model, base)
        model.set_adapter("other")
        other = other or weights_of(model)
        assert same(weights_of(model), other) and not same(other, tuned)
        model.set_adapter("default")
        assert same(weights_of(model), tuned)
    assert all(layer.spiel_values["default"].requires_grad for layer in model.base_model.spiel_layers())


def test_an_adapter_that_is_deleted_gives_way_to_the_next_one_or_to_the_base(home, base) -> None:
    model = PeftModel.from_pretrained(load(home), home / "one")
    model.load_adapter(home / "ours", "other")
    with_default = weights_of(model)
    model.set_adapter("other")
    model.delete_adapter("other")
    assert model.active_adapters == ["default"] and same(weights_of(model), with_default)
    model.delete_adapter("default")
    assert is_base(model, base)


def test_a_weighted_sum_is_that_of_adapter_arithmetic(home) -> None:
    model = PeftModel.from_pretrained(load(home), home / "one")
    model.load_adapter(home / "ours", "other")
    model.add_weighted_adapter(["default", "other"], [0.75, -2.0], "sum")
    expected = arithmetic.add([scale_sft.Adapter.load(home / name) for name in ("one", "ours")], [0.75, -2.0])
    for layer in model.base_model.spiel_layers("sum"):
        assert torch.equal(layer.spiel_indices["sum"], expected.indices[layer.weight_name])
        assert torch.equal(layer.spiel_values["sum"], expected.deltas[layer.weight_name])
    assert model.active_adapters == ["default"]


@pytest.mark.parametrize("kind", ["ties", "dare_linear", "dare_ties", "magnitude_prune"])
def test_a_pruned_combination_keeps_its_share_and_survives_a_folder(home, tmp_path, kind) -> None:
    model = PeftModel.from_pretrained(load(home), home / "one")
    model.load_adapter(home / "ours", "other")
    model.add_weighted_adapter(["default", "other"], [1.0, 1.0], kind, combination_type=kind, density=0.4)
    model.set_adapter(kind)
    values = torch.cat([layer.spiel_values[kind] for layer in model.base_model.spiel_layers(kind)])
    assert 0.2 < float((values != 0).float().mean()) < 0.8
    model.save_pretrained(tmp_path, selected_adapters=[kind])
    assert torch.equal(logits(PeftModel.from_pretrained(load(home), tmp_path / kind)), logits(model))


def test_hotswap_replaces_entries_of_any_number(home, base) -> None:
    model = PeftModel.from_pretrained(load(home), home / "one")
    pruned = arithmetic.prune(scale_sft.Adapter.load(home / "ours"), 0.02)
    for adapter, plain in (("ours", home / "ours"), ("pruned", pruned)):
        hotswap(model, plain)
        other = load(home)
        with scale_sft.load_adapter(other, plain):
            assert torch.equal(logits(model), logits(other)), adapter
    with model.disable_adapter():
        assert is_base(model, base)


def test_a_whole_state_dict_brings_base_and_deltas_back(home, base) -> None:
    model = PeftModel.from_pretrained(load(home), home / "one")
    again = get_peft_model(load(home), SpielConfig(density=0.05))
    for weight in again.parameters():
        torch.nn.init.constant_(weight, 0.5)
    again.load_state_dict(model.state_dict())
    assert torch.equal(logits(again), logits(model))
    with again.disable_adapter():
        assert is_base(again, base)


def test_casting_casts_base_and_deltas_each_for_itself(home) -> None:
    model = PeftModel.from_pretrained(load(home), home / "one").float()
    with model.disable_adapter():
        assert torch.equal(logits(model), logits(load(home).float()))


def test_modules_to_save_are_trained_and_saved_but_only_peft_reads_them(home, tmp_path) -> None:
    model = wrapped(load(home), modules_to_save=["lm_head"], target_modules="all-linear", task_type="CAUSAL_LM")
    train(model, 3)
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(PeftModel.from_pretrained(load(home), tmp_path)), logits(model))
    with pytest.raises(UserError, match="whole modules.*lm_head"):
        scale_sft.Adapter.load(tmp_path)


def test_an_adapter_added_with_the_config_object_of_another_is_its_copy(home) -> None:
    model = PeftModel.from_pretrained(load(home), home / "one", is_trainable=True)
    before = weights_of(model)
    model.add_adapter("ref", model.peft_config["default"])
    model.set_adapter("ref")
    assert same(weights_of(model), before)


def test_the_first_entries_are_those_of_attach_and_all_linear_are_the_default() -> None:
    model, plain = wrapped(tiny(), seed=3), tiny()
    sparse = scale_sft.attach(plain, density=0.05, seed=3, total_steps=4)
    for layer in model.base_model.spiel_layers():
        assert torch.equal(layer.spiel_indices["default"], sparse.tuning.store[layer.weight_name].indices)
    assert len(wrapped(tiny(), target_modules="all-linear").base_model.targeted_module_names) == 14
    assert (
        len(wrapped(tiny(), target_modules="all-linear", exclude_modules=["q_proj"]).base_model.targeted_module_names)
        == 12
    )
    assert sum(model.get_nb_trainable_parameters()) > sparse.tuning.store.active


def test_a_config_survives_its_folder(home) -> None:
    config = peft.PeftConfig.from_pretrained(home / "one")
    assert type(config) is SpielConfig and config.density == 0.05 and config.update_interval_steps == 4
    assert json.loads((home / "one" / "adapter_config.json").read_text())["peft_type"] == "SPIEL"


# --- what cannot work says so ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"densty": 0.1}, "unknown option 'densty'; did you mean 'density'"),
        ({"density": 2.0}, "density"),
        ({"density": 0.1, "rank_equivalent": 2}, "got density and rank_equivalent, expected one"),
        ({"method": "ma"}, "method: got 'ma'.*scale_sft.attach"),
        ({"start_from": "x"}, "start_from.*is_trainable=True"),
        ({"delta_dtype": "bfloat16"}, "delta_dtype.*float32"),
        ({"selection_batches": 3}, "selection_batches: got 3.*scale_sft.attach"),
        ({"drop_criterion": "age"}, "drop_criterion: got 'age'"),
        ({"score": "nonsense"}, "nonsense"),
        ({"optimizer_state": "keep"}, "optimizer_state: got 'keep', expected carry or reset"),
        ({"estimation_steps": 9, "update_interval_steps": 3}, "estimation_steps: got 9, expected at most"),
        ({"total_steps": 0}, "total_steps: got 0"),
        ({"layers_pattern": "layers"}, "layers_pattern: got no layers_to_transform"),
    ],
)
def test_an_option_that_cannot_be_is_named(options, message) -> None:
    with pytest.raises(UserError, match=message):
        SpielConfig(**options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"target_modules": ["q_proj", "lm_head"], "modules_to_save": ["lm_head"]}, "modules_to_save: got 'lm_head'"),
        ({"target_modules": ["embed_tokens"]}, "'model.embed_tokens' is a Embedding layer"),
        ({"tunable_weights": 3, "density": None}, "tunable_weights: got 3"),
        ({"entries_per_weight": {"x.weight": 3}}, "entries_per_weight"),
    ],
)
def test_a_model_that_cannot_carry_an_adapter_stays_as_it_was(options, message) -> None:
    model = tiny()
    kinds = [type(module) for module in model.modules()]
    with pytest.raises(UserError, match=message):
        wrapped(model, **options)
    assert [type(module) for module in model.modules()] == kinds


def test_a_tied_weight_is_refused() -> None:
    model = tiny()
    model.lm_head.weight = model.model.embed_tokens.weight
    with pytest.raises(UserError, match="'lm_head.weight' is tied to another layer"):
        wrapped(model, target_modules=["lm_head"])


@pytest.mark.quantized
def test_a_quantised_base_is_refused_with_the_way_that_works() -> None:
    from bitsandbytes.nn import Linear4bit

    model = tiny()
    model.model.layers[0].mlp.up_proj = Linear4bit(32, 64, bias=False)
    with pytest.raises(UserError, match="'model.layers.0.mlp.up_proj' is quantised.*scale_sft.attach"):
        wrapped(model)


def test_two_adapters_are_not_active_or_merged_together(home) -> None:
    model = PeftModel.from_pretrained(load(home), home / "one")
    model.load_adapter(home / "ours", "other")
    before = weights_of(model)
    with pytest.raises(UserError, match="set_adapter: got 'default' and 'other', expected one adapter"):
        model.base_model.set_adapter(["default", "other"])
    with pytest.raises(UserError, match="merge: got"):
        model.merge_adapter(["default", "other"])
    assert same(weights_of(model), before)


def test_a_checkpoint_of_another_density_or_another_base_is_refused(home) -> None:
    wide = wrapped(load(home), density=0.1)
    with pytest.raises(UserError, match="entries, expected .* as in adapter 'default'"):
        wide.load_adapter(home / "one", "default")
    with pytest.raises(UserError, match="entries in the checkpoint, expected"):
        wide.load_state_dict(PeftModel.from_pretrained(load(home), home / "one").state_dict())
    with pytest.raises(UserError, match="got another base, not the one it was trained on"):
        PeftModel.from_pretrained(tiny(BF16, seed=7), home / "one")
    for sizes in ({"num_hidden_layers": 1}, {"num_hidden_layers": 4}, {"hidden_size": 16}, {"hidden_size": 64}):
        with pytest.raises(UserError, match="got another base"):
            PeftModel.from_pretrained(tiny(BF16, seed=7, **sizes), home / "one")
    with pytest.raises(UserError, match="is in float32, expected bfloat16"):
        PeftModel.from_pretrained(tiny(), home / "one")
    with pytest.raises(UserError, match="hotswap: the adapters differ"):
        hotswap(wrapped(load(home), target_modules=["q_proj"]), home / "one")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((["default", "nobody"], [1, 1], "new"), "adapters: got"),
        ((["default"], [1, 1], "new"), "weights: got 2 for 1"),
        ((["default"], [1], "default"), "adapter_name: got 'default', which exists"),
        ((["default"], [1], "new", "svd"), "combination_type: got 'svd'"),
        ((["default"], [1], "new", "ties"), "density: got None"),
    ],
)
def test_a_combination_that_cannot_be_adds_nothing(home, arguments, message) -> None:
    model = PeftModel.from_pretrained(load(home), home / "one")
    with pytest.raises(UserError, match=message):
        model.add_weighted_adapter(*arguments)
    assert list(model.peft_config) == ["default"]
