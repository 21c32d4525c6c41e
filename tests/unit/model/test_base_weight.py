import copy

import pytest
import torch
from torch import Tensor, nn

from scale_sft.model.fingerprints import combine_fingerprints, fingerprint
from scale_sft.model.resident import ResidentDeltas, WeightPart, effective_values
from scale_sft.spiel.deltas import DeltaStore
from scale_sft.spiel.drop_grow import apply_exchange, exchange_by_gradient

SHAPES = {"a": (6, 10), "b": (8, 8)}
DTYPES = [torch.float32, torch.bfloat16]


def weights(dtype: torch.dtype) -> dict[str, nn.Parameter]:
    """Random weights with a negative zero, a denormal and a large value among them."""
    generator = torch.Generator().manual_seed(0)
    made = {}
    for name, shape in SHAPES.items():
        values = torch.randn(shape, generator=generator).to(dtype)
        values.view(-1)[:3] = torch.tensor([-0.0, 1e-39, 3e38], dtype=dtype)
        made[name] = nn.Parameter(values, requires_grad=False)
    return made


def bits(weight: Tensor) -> Tensor:
    return weight.detach().contiguous().view(torch.uint8)


def same_bits(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return all(torch.equal(bits(one[name]), bits(other[name])) for name in one)


def exchange_some(store: DeltaStore, seed: int, resident: ResidentDeltas, k: int = 4) -> None:
    """A reallocation of `k` entries of each weight on random candidates."""
    for delta in store:
        generator = torch.Generator().manual_seed(seed)
        candidates = torch.randperm(delta.numel, generator=generator)[:10].sort().values
        mean = torch.randn(10, generator=generator)
        resident.release(delta)
        apply_exchange(delta, exchange_by_gradient(delta.indices, delta.deltas.abs(), candidates, mean, k), 1)
        resident.adopt(delta)


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_effective_value_follows_the_one_rounding_rule(dtype: torch.dtype) -> None:
    base, deltas = torch.tensor([1.0, 256.0, -3.0]).to(dtype), torch.tensor([0.001, 1.0, 3.0])
    assert torch.equal(effective_values(base, deltas), (base.float() + deltas).to(dtype))


@pytest.mark.parametrize("dtype", DTYPES)
def test_restoring_gives_the_exact_bytes_back_after_writes_and_reallocations(dtype: torch.dtype) -> None:
    base = weights(dtype)
    original = copy.deepcopy(base)
    store = DeltaStore(SHAPES, {"a": 12, "b": 64})
    resident = ResidentDeltas(store, {name: WeightPart.whole(weight) for name, weight in base.items()})
    for round_ in range(5):
        store.flat.add_(torch.randn(store.active))
        resident.write()
        assert not same_bits(base, original)
        exchange_some(store, round_, resident)
        resident.write()
    resident.restore()
    assert same_bits(base, original)


@pytest.mark.parametrize("dtype", DTYPES)
def test_dropped_entries_return_to_the_pretrained_bits_and_active_ones_are_effective(dtype: torch.dtype) -> None:
    base = weights(dtype)
    original = copy.deepcopy(base)
    store = DeltaStore(SHAPES, {"a": 12, "b": 20})
    resident = ResidentDeltas(store, {name: WeightPart.whole(weight) for name, weight in base.items()})
    for round_ in range(4):
        store.flat.add_(torch.randn(store.active))
        resident.write()
        exchange_some(store, round_, resident)
        resident.write()
        for delta in store:
            expected = original[delta.name].clone().view(-1)
            place = delta.indices.long()
            expected[place] = (expected[place].float() + delta.deltas).to(dtype)
            assert torch.equal(bits(base[delta.name].view(-1)), bits(expected))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("parts", [2, 3, 7])
def test_a_weight_cut_into_parts_is_written_and_restored_as_the_whole(dtype: torch.dtype, parts: int) -> None:
    whole, cut = weights(dtype), weights(dtype)
    original = copy.deepcopy(cut)
    stores = [DeltaStore(SHAPES, {"a": 12, "b": 20}) for _ in range(parts + 1)]
    residents = [ResidentDeltas(stores[0], {name: WeightPart.whole(weight) for name, weight in whole.items()})]
    for part in range(parts):
        held = {}
        for name, weight in cut.items():
            size = -(-weight.numel() // parts)
            start, stop = min(part * size, weight.numel()), min((part + 1) * size, weight.numel())
            view = weight.data.view(-1)[start:stop]
            held[name] = WeightPart(lambda view=view: view, start, stop)
        residents.append(ResidentDeltas(stores[part + 1], held))
    for round_ in range(3):
        noise = torch.randn(stores[0].active)
        for store, resident in zip(stores, residents, strict=True):
            store.flat.add_(noise)
            exchange_some(store, round_, resident)
            resident.write()
        assert same_bits(whole, cut)
    for resident in residents[1:]:
        resident.restore()
    assert same_bits(cut, original)


def parts_of(entries: Tensor, bounds: list[int]) -> list[WeightPart]:
    return [
        WeightPart(lambda low=low, high=high: entries[low:high], low, high)
        for low, high in zip([0, *bounds], [*bounds, entries.numel()], strict=True)
    ]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bounds", [[30], [1], [7, 7, 59], [10, 20, 30, 40, 50, 60]])
def test_a_fingerprint_does_not_depend_on_the_cut_into_parts(dtype: torch.dtype, bounds: list[int]) -> None:
    entries = weights(dtype)["a"].data.view(-1)
    prints = [fingerprint(part) for part in parts_of(entries, bounds)]
    added = tuple(sum(each) & (1 << 64) - 1 for each in zip(*prints, strict=True))
    assert added == fingerprint(WeightPart(lambda: entries, 0, 60))


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_fingerprint_tells_one_bit_and_an_exchange_of_two_entries(dtype: torch.dtype) -> None:
    entries = weights(dtype)["a"].data.view(-1)
    seen = {fingerprint(WeightPart(lambda: entries, 0, 60))}
    other = entries.clone()
    other[0] = 0.0  # was -0.0
    seen.add(fingerprint(WeightPart(lambda: other, 0, 60)))
    swapped = entries.clone()
    swapped[[4, 5]] = entries[[5, 4]]
    seen.add(fingerprint(WeightPart(lambda: swapped, 0, 60)))
    assert len(seen) == 3


def test_the_hash_of_all_weights_names_weights_and_shapes() -> None:
    prints, shapes = {"a": (1, 2), "b": (3, 4)}, {"a": (2, 3), "b": (4, 5)}
    known = combine_fingerprints(prints, shapes)
    assert known == combine_fingerprints(dict(reversed(prints.items())), shapes) and len(known) == 64
    assert known != combine_fingerprints({"a": (1, 2), "c": (3, 4)}, {**shapes, "c": (4, 5)})
    assert known != combine_fingerprints(prints, {**shapes, "a": (3, 2)})
