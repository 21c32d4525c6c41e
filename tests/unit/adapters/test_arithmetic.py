"""Sums, products and intersections of adapters are those of the dense vectors that they stand for."""

import json

import pytest
import torch
from adapter_factory import load, make_adapter
from click.testing import CliRunner

import scale_sft
from scale_sft.adapters import arithmetic
from scale_sft.adapters.format import Adapter
from scale_sft.cli.main import main
from scale_sft.errors import UserError


def dense(adapter: Adapter, name: str) -> torch.Tensor:
    rows, columns = adapter.shapes[name]
    flat = torch.zeros(rows * columns, dtype=torch.float64)
    if name in adapter.indices:
        flat[adapter.indices[name].long()] = adapter.deltas[name].double()
    return flat


def command(*arguments):
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


@pytest.fixture
def folders(tiny_model, tmp_path):
    base = tiny_model("llama")
    return [make_adapter(base, tmp_path / f"in{seed}", seed=seed, density=0.3) for seed in range(3)]


@pytest.fixture
def three(folders):
    return [Adapter.load(folder) for folder in folders]


def test_a_weighted_sum_is_the_dense_sum_rounded_once(three) -> None:
    factors = [1.0, -0.3, 0.7]
    result = arithmetic.add(three, factors)
    for name in result.shapes:
        wanted = sum(factor * dense(adapter, name) for factor, adapter in zip(factors, three, strict=True))
        assert torch.equal(dense(result, name), wanted.float().double())


def test_template_and_end_of_turn_outlive_arithmetic_where_all_operands_agree(three) -> None:
    for adapter, end in zip(three, (7, 7, 8), strict=True):
        adapter.info.update(chat_template="{{ messages }}", end_token_id=end)
    results = [arithmetic.scale(three[0], 2), arithmetic.add(three[:2], [1, 1]), arithmetic.add(three, [1, 1, 1])]
    assert [result.info.get("end_token_id") for result in results] == [7, 7, None]
    assert all(result.info["chat_template"] == "{{ messages }}" for result in results)


def test_adding_the_negative_leaves_zeros_and_negating_twice_nothing_new(three) -> None:
    first = three[0]
    negative = arithmetic.scale(first, -1)
    assert not any(deltas.any() for deltas in arithmetic.add([first, negative]).deltas.values())
    back = arithmetic.scale(negative, -1)
    assert all(torch.equal(back.deltas[name], first.deltas[name]) for name in first.deltas)


def test_intersection_and_difference_make_up_the_first(three) -> None:
    first, second, _ = three
    inside, outside = arithmetic.intersect([first, second]), arithmetic.difference([first, second])
    whole = arithmetic.add([inside, outside])
    for name in first.shapes:
        assert torch.equal(whole.indices[name], first.indices[name])
        assert torch.equal(whole.deltas[name], first.deltas[name])
        assert torch.isin(inside.indices[name], second.indices[name]).all()
        assert not torch.isin(outside.indices[name], second.indices[name]).any()


def test_pruning_keeps_the_largest_of_each_weight(three) -> None:
    pruned = arithmetic.prune(three[0], 0.1)
    for name, (rows, columns) in pruned.shapes.items():
        kept, everything = pruned.deltas[name].abs(), three[0].deltas[name].abs()
        assert kept.numel() == int(0.1 * rows * columns)
        assert kept.min() >= everything.sort(descending=True).values[kept.numel()]


def test_an_adapter_that_was_pruned_to_nothing_is_still_one(three, tiny_model, tmp_path) -> None:
    arithmetic.prune(three[0], 0.0).save(tmp_path / "none")
    model = load(tiny_model("llama"))
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    scale_sft.load_adapter(model, tmp_path / "none")
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_adapters_on_different_layers_of_one_base_add_up_and_apply(tiny_model, tmp_path) -> None:
    base = tiny_model("llama")
    parts = [
        Adapter.load(make_adapter(base, tmp_path / leaf, targets=(leaf,), density=0.2))
        for leaf in ("q_proj", "up_proj")
    ]
    arithmetic.add(parts).save(tmp_path / "sum")
    model = load(base)
    scale_sft.load_adapter(model, tmp_path / "sum")
    weights = dict(model.named_parameters())
    for adapter in parts:
        for name in adapter.shapes:
            wanted = (dict(load(base).named_parameters())[name].double().view(-1) + dense(adapter, name)).float()
            assert torch.equal(weights[name].view(-1), wanted)


def test_adapters_of_two_bases_are_not_added(tiny_model, tmp_path, three) -> None:
    other = Adapter.load(make_adapter(tiny_model("gpt2"), tmp_path / "gpt2"))
    with pytest.raises(UserError, match="different bases"):
        arithmetic.add([three[0], other])
    info = dict(three[1].info)
    name = next(iter(three[1].shapes))
    info["base_fingerprints"] = info["base_fingerprints"] | {name: "0" * 32}
    changed = Adapter(three[1].indices, three[1].deltas, three[1].shapes, info)
    with pytest.raises(UserError, match=f"different bases: '{name}'"):
        arithmetic.intersect([three[0], changed])
    half = Adapter.load(make_adapter(tiny_model("llama", "bfloat16"), tmp_path / "bf16", dtype="bfloat16"))
    with pytest.raises(UserError, match="dtype"):
        arithmetic.add([three[0], half])


def test_an_adapter_overlaps_wholly_with_itself_and_not_in_sign_with_its_negative(three) -> None:
    first = three[0]
    for name, found in arithmetic.overlap(first, arithmetic.scale(first, -1)).items():
        assert found.shared == found.first == found.second == first.indices[name].numel()
        assert found.same_sign == 0
    assert all(found.same_sign == found.shared for found in arithmetic.overlap(first, first).values())


def test_random_adapters_overlap_as_by_chance(three) -> None:
    rows = arithmetic.overlap(three[0], three[1]).values()
    shared, chance = sum(row.shared for row in rows), sum(row.by_chance for row in rows)
    assert shared == pytest.approx(chance, rel=0.2)


def test_commands_write_adapters_with_their_provenance(folders, tmp_path) -> None:
    a, b, _ = folders
    result = command("add", a, b, "--weights", "1,0.5", "--output", tmp_path / "sum")
    assert result.exit_code == 0 and result.output.count("\n") == 1
    told = command("add", a, b, "--output", tmp_path / "plain", "--verbose").output
    assert "overlap of" in told and "same sign" in told
    for operation, *options in (("scale", "--factor", 2), ("negate",), ("prune", "--density", 0.1)):
        done = command(operation, tmp_path / "sum", *options, "--output", tmp_path / operation)
        assert done.exit_code == 0, done.output
    made = json.loads((tmp_path / "prune" / "adapter_config.json").read_text())["made_from"]
    assert made["operation"] == "prune" and made["operands"][0]["operation"] == "add"
    rows = json.loads(command("overlap", a, b, "--json").output)
    assert rows[0]["total"]["first"] == sum(weight["first"] for weight in rows[0]["weights"].values())


def test_commands_tell_what_is_wrong(folders, tmp_path) -> None:
    a, b, _ = folders
    wrong = {
        ("add", a, b, "--weights", "1"): "1 weights for 2 adapters",
        ("add", a, b, "--weights", "x,1"): "expected numbers",
        ("add", a): "expected 2 or more",
        ("prune", a, "--density", 2): "expected a fraction",
        ("negate", tmp_path / "nothing"): "adapter_config.json",
    }
    for arguments, message in wrong.items():
        result = command(*arguments, "--output", tmp_path / "out")
        assert result.exit_code == 1 and message in result.output, arguments
        assert not (tmp_path / "out").exists()
    assert "not empty" in command("negate", a, "--output", b).output
