"""Experts fused into one parameter: names, views and gradients of their slices, and deltas in them."""

import copy

import pytest
import torch

import scale_sft
from scale_sft.errors import UserError
from scale_sft.model import compiled_blocks
from scale_sft.model.experts import fused_weights, layer_kind, named_weights, parse_slice, weight_named
from scale_sft.model.fingerprints import add_sums, fingerprint, fingerprints_of
from scale_sft.model.loading import enable_checkpointing
from scale_sft.model.resident import ResidentDeltas, WeightPart, effective_values
from scale_sft.model.targets import attach_taps, find_targets, unreached
from scale_sft.spiel.deltas import DeltaStore
from scale_sft.spiel.taps import detach
from tests.methods import ESTIMATED
from tests.unit.model.mixtures import KINDS, mixture


@pytest.mark.parametrize("kind", KINDS)
def test_a_slice_is_a_view_of_its_parameter_under_a_name_that_parses_back(kind):
    model = mixture(kind)
    fused = list(fused_weights(model))
    assert fused
    weights = named_weights(model)
    for one in fused:
        for number, name in enumerate(one.slice_names()):
            assert parse_slice(name) == (one.name, number)
            found = weight_named(model, name)
            assert found.is_contiguous() and tuple(found.shape) == one.slice_shape
            assert found.data_ptr() == one.weight[number].data_ptr() == weights[name].data_ptr()
            assert torch.equal(found, one.weight[number])


def test_the_name_of_a_whole_parameter_is_no_slice():
    assert parse_slice("model.layers.0.mlp.up_proj.weight") is None


def test_the_kind_of_a_weight_is_a_name_that_chooses_it():
    targets = find_targets(mixture("deepseek_v3"), None)
    kinds = {layer_kind(target.name) for target in targets}
    assert {"q_b_proj", "down_proj", "experts.down_proj"} <= kinds
    assert [target.name for target in find_targets(mixture("deepseek_v3"), tuple(kinds))] == [t.name for t in targets]


IDS = torch.arange(24).mul(7).remainder(61).add(3).view(2, 12)
FEW_IDS = IDS[:1, :1]


def gradients(model, ids=IDS, more=()) -> dict[str, torch.Tensor]:
    """Let autograd form the gradients of parameters and slices."""
    model.requires_grad_(True).zero_grad()
    model(input_ids=ids, labels=ids, **dict(more)).loss.backward()
    found = {name: weight.grad for name, weight in model.named_parameters()}
    for fused in fused_weights(model):
        found |= dict(zip(fused.slice_names(), fused.weight.grad, strict=True))
    model.requires_grad_(False).zero_grad()
    return found


class Sums:
    """A recorder that adds up whole gradients."""

    def __init__(self):
        self.found: dict[str, torch.Tensor] = {}

    def __call__(self, name, left, right):
        self.found[name] = self.found.get(name, 0) + left.t() @ right


@pytest.mark.parametrize(
    ("kind", "checkpointing"),
    [
        *((kind, False) for kind in (*KINDS, "jetmoe", "llama4_text", "nemotron_h")),
        ("mixtral", True),
        ("gpt_oss", True),
    ],
)
def test_slices_get_the_gradients_of_autograd_and_the_model_computes_as_before(kind, checkpointing):
    model = mixture(kind).train()
    if checkpointing:
        enable_checkpointing(model)
    expected, logits = gradients(model), model(input_ids=IDS).logits.detach()
    sums, targets = Sums(), find_targets(model, None)
    attach_taps(targets, sums)
    tapped = model(input_ids=IDS, labels=IDS)
    assert torch.equal(tapped.logits, logits)
    tapped.loss.backward()
    slices = {name for fused in fused_weights(model) for name in fused.slice_names()}
    assert slices <= {target.name for target in targets} == set(sums.found)
    for name, found in sums.found.items():
        assert torch.allclose(found, expected[name], rtol=0, atol=1e-7), name
    for target in targets:
        detach(target.module)
    assert not any("forward" in vars(module) for module in model.modules())


def test_routers_are_frozen_unless_they_are_named():
    for kind in KINDS:
        model = mixture(kind).train()
        router = "router" if kind in ("gpt_oss", "granitemoe") else "gate"
        assert not any(f".{router}." in target.name for target in find_targets(model, None)), kind
        expected, sums, targets = gradients(model), Sums(), find_targets(model, (router,))
        attach_taps(targets, sums)
        model(input_ids=IDS, labels=IDS).loss.backward()
        assert targets and all(torch.allclose(sums.found[t.name], expected[t.name], atol=1e-7) for t in targets), kind


@pytest.mark.parametrize(
    ("wanted", "count"),
    [
        (("experts",), 16),
        (("gate_up_proj",), 8),
        (("experts.down_proj",), 8),
        (("experts.gate_up_proj.2",), 2),
        (("model.layers.1.mlp.experts.gate_up_proj.3", "q_proj"), 3),
        (r".*layers\.0\.mlp\.experts\..*", 8),
        (r"model\.layers\.1\.mlp\.experts", 8),
    ],
)
def test_slices_are_chosen_by_module_parameter_number_and_regular_expression(wanted, count):
    model = mixture("mixtral")
    everything = find_targets(model, None)
    chosen = find_targets(model, wanted)
    assert len(chosen) == count
    rest = find_targets(model, None, wanted)
    names = {target.name for target in chosen}
    assert [target.name for target in rest] == [target.name for target in everything if target.name not in names]


def test_an_unknown_expert_is_refused_with_the_kinds_that_there_are():
    with pytest.raises(UserError, match=r"'experts.down_proj.4' matches no layer.*experts.gate_up_proj \(8x\)"):
        find_targets(mixture("mixtral"), ("experts.down_proj.4",))


def trained(method: str, dtype=torch.float32, steps=9, ids=IDS, **options):
    model = mixture("mixtral", dtype)
    before = {name: weight.clone() for name, weight in model.named_parameters()}
    settings = {"density": 0.1, "total_steps": 12, "update_interval_steps": 4, "estimation_steps": 2, **options}
    sparse = scale_sft.attach(model, method=method, **settings)
    optimizer = sparse.optimizer(lr=1e-2)
    for _ in range(steps):
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
    return sparse, optimizer, before


@pytest.mark.parametrize(("method", "dtype"), [("ag", torch.float32), ("ag", torch.bfloat16), ("ma", torch.float32)])
def test_trained_slices_hold_their_deltas_and_give_the_base_back(method, dtype):
    sparse, optimizer, before = trained(method, dtype)
    assert optimizer.turnovers and sparse.carrier.misplaced() is None
    weights = named_weights(sparse.model)
    for delta in sparse.tuning.store:
        parameter, number = parse_slice(delta.name) or (delta.name, None)
        base = before[parameter] if number is None else before[parameter][number]
        expected = base.clone().view(-1)
        index = delta.indices.long()
        expected[index] = effective_values(expected[index], delta.deltas)
        assert torch.equal(weights[delta.name].reshape(-1), expected), delta.name
    sparse.detach()
    assert all(torch.equal(weight, before[name]) for name, weight in sparse.model.named_parameters())


@pytest.mark.parametrize("method", ["ag", "ag sampled", "ag columns", "ma", "static"])
def test_an_expert_that_meets_no_token_keeps_its_entries(method):
    options = {name: value for name, value in ESTIMATED.items() if name != "method"} if method == "static" else {}
    options |= {"draw": "sample", "score": "balanced"} if "sampled" in method else {}
    options |= {"granularity": "column", "draw": "sample"} if "columns" in method else {}
    method = method.split()[0]
    start, _, _ = trained(method, steps=0, **options)
    sparse, optimizer, _ = trained(method, ids=FEW_IDS.repeat(1, 12), steps=6, **options)
    assert optimizer.turnovers
    silent, met = 0, sparse.tuning.recorder.received  # in the first step; later routes may leave an expert out
    for delta, initial in zip(sparse.tuning.store, start.tuning.store, strict=True):
        if parse_slice(delta.name) and delta.name not in met and not delta.deltas.any():
            silent += 1
            assert torch.equal(delta.indices, initial.indices), delta.name
    assert silent


@pytest.mark.parametrize("options", [{"method": "columns"}, {"method": "static", "row_quota": 4, "column_quota": 4}])
def test_an_expert_that_meets_no_token_before_the_first_choice_gets_random_entries(options):
    names = {"target_modules": ("experts",), "selection_batches": 1, "draw": "top", "density": 0.2}
    sparse, optimizer, _ = trained(steps=2, ids=FEW_IDS.repeat(1, 12), **names, **options)
    silent = [delta for delta in sparse.tuning.store if not delta.deltas.any()]
    assert optimizer.steps == 1 and 0 < len(silent) < len(sparse.tuning.store)
    for delta in silent:  # not the first ones of each, as equal scores would choose
        assert len({tuple(one.indices.tolist()) for one in silent if one.shape == delta.shape}) > 1


def test_experts_of_which_none_is_reached_are_refused_as_dead():
    model = mixture("mixtral")
    targets = find_targets(model, None)
    names = {target.name for target in targets}
    assert unreached(targets, names - {"model.layers.0.mlp.experts.down_proj.1"}) == []
    gone = {name for name in names if "layers.0.mlp.experts.down_proj" in name}
    assert unreached(targets, names - gone) == ["model.layers.0.mlp.experts.down_proj.0"]


@pytest.mark.parametrize(("method", "granularity"), [("ag", "entry"), ("ma", "entry"), ("ag", "row")])
def test_training_resumes_bit_for_bit(method, granularity):
    whole, _, _ = trained(method, steps=9, granularity=granularity)
    sparse, optimizer, _ = trained(method, steps=5, granularity=granularity)
    state = copy.deepcopy(optimizer.state_dict())
    sparse.detach()
    settings = {"density": 0.1, "total_steps": 12, "update_interval_steps": 4, "estimation_steps": 2}
    again = scale_sft.attach(sparse.model, method=method, granularity=granularity, **settings)
    optimizer = again.optimizer(lr=1e-2)
    optimizer.load_state_dict(state)
    for _ in range(4):
        again.model(input_ids=IDS, labels=IDS).loss.backward()
        optimizer.step()
    assert again.tuning.digests() == whole.tuning.digests()


def test_slices_of_a_parameter_in_shards_have_the_prints_and_writes_of_a_whole_one():
    weight = mixture("mixtral").get_parameter("model.layers.0.mlp.experts.down_proj").detach()
    entries, size = weight[0].numel(), weight.numel()
    whole = WeightPart.whole(weight)
    prints = [fingerprint(whole.cut(number * entries, entries)) for number in range(4)]
    assert prints == [fingerprint(WeightPart.whole(one.clone())) for one in weight]
    store = DeltaStore({str(number): tuple(weight.shape[1:]) for number in range(4)}, {str(n): 40 for n in range(4)})
    store.flat.normal_()
    expected = weight.clone()
    for number, delta in enumerate(store):
        flat = expected[number].view(-1)
        flat[delta.indices.long()] = effective_values(flat[delta.indices.long()], delta.deltas)
    for ranks in (1, 2, 3, 7):
        of_rank = -(-size // ranks)
        shards = weight.clone().view(-1).split(of_rank)
        totals = [(0, 0)] * 4
        for rank, shard in enumerate(shards):
            held = WeightPart(lambda shard=shard: shard, rank * of_rank, rank * of_rank + len(shard))
            parts = {str(number): held.cut(number * entries, entries) for number in range(4)}
            assert fingerprints_of(parts) == {name: fingerprint(part) for name, part in parts.items()}
            totals = [add_sums(total, fingerprint(part)) for total, part in zip(totals, parts.values(), strict=True)]
            carrier = ResidentDeltas(store, parts)
            carrier.write()
            assert carrier.misplaced() is None
        assert totals == prints
        assert torch.equal(torch.cat(shards).view_as(expected), expected), ranks


def test_compiled_blocks_with_experts_train_the_same_bits(monkeypatch):
    monkeypatch.setattr(compiled_blocks, "BACKEND", "eager")
    sparse, optimizer, _ = trained("ag", steps=0)
    compiled_blocks.compile_blocks(compiled_blocks.decoder_blocks(sparse.model, sparse.shapes))
    for _ in range(5):
        sparse.model(input_ids=IDS, labels=IDS).loss.backward()
        optimizer.step()
    assert sparse.tuning.digests() == trained("ag", steps=5)[0].tuning.digests()
