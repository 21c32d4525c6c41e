import random

import pytest
import torch
from carriers import NoCarrier
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from scale_sft.spiel.algorithm import SparseFineTuning
from scale_sft.spiel.deltas import DeltaStore
from scale_sft.spiel.drop_grow import apply_exchange, drop_scores, exchange_by_accumulators, exchange_by_gradient
from scale_sft.spiel.schedules import ReallocationSchedule
from scale_sft.spiel.settings import MethodSettings


def by_hand(deltas: dict[int, float], means: dict[int, float], k: int) -> dict[int, float]:
    """Drop and grow of SFT-AG on plain dicts (index -> delta, candidate -> mean), tried from k downwards."""
    for count in range(k, -1, -1):
        dropped = set(sorted(deltas, key=lambda n: (abs(deltas[n]), n))[:count])
        growable = sorted((n for n in means if n not in set(deltas) - dropped), key=lambda n: (-abs(means[n]), n))
        if len(growable) >= count:
            grown = growable[:count]
            return {n: deltas.get(n, 0.0) for n in sorted((set(deltas) - dropped) | set(grown))}
    raise AssertionError("zero can always be grown")


@pytest.mark.parametrize("seed", range(60))
def test_drop_and_grow_is_what_is_done_by_hand(seed: int) -> None:
    """Small weights with ties, few or many candidates, any k: indices and deltas are those of plain Python."""
    rng = random.Random(seed)
    n = rng.randint(4, 40)
    active = sorted(rng.sample(range(n), rng.randint(1, n)))
    candidates = sorted(rng.sample(range(n), rng.randint(1, n)))
    deltas = {index: rng.choice([-2.0, -1.0, -0.5, 0.0, 0.5, 1.0, 3.0]) for index in active}
    means = {index: rng.choice([-3.0, -1.0, 0.0, 1.0, 2.0]) for index in candidates}
    for k in {0, 1, len(active) // 2, len(active)}:
        store = DeltaStore({"w": (1, n)}, {"w": torch.tensor(active)})
        delta = store["w"]
        delta.deltas.copy_(torch.tensor([deltas[index] for index in active]))
        mean = torch.tensor([means[index] for index in candidates])
        exchange = exchange_by_gradient(
            delta.indices, drop_scores(delta, "magnitude"), torch.tensor(candidates), mean, k
        )
        apply_exchange(delta, exchange, 1)
        assert dict(zip(delta.indices.tolist(), delta.deltas.tolist(), strict=True)) == by_hand(deltas, means, k)
        grown = set(delta.indices.tolist()) - set(active)
        assert exchange.replaced == len(grown) and set(exchange.grown.tolist()) == grown
        assert {i for i, c in zip(delta.indices.tolist(), delta.cohort.tolist(), strict=True) if c} == grown


@pytest.mark.parametrize("seed", range(10))
def test_growth_by_accumulators_takes_the_largest_products_among_those_not_active_before(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    row, col = (torch.rand(6, generator=generator) * 4).round(), (torch.rand(5, generator=generator) * 4).round()
    active = torch.randperm(30, generator=generator)[:12].sort().values
    deltas = (torch.randn(12, generator=generator) * 2).round()
    products = torch.outer(row, col).flatten().tolist()
    for k in (0, 3, 12):
        exchange = exchange_by_accumulators(active, deltas.abs(), row, col, k)
        before = active.tolist()
        dropped = sorted(range(12), key=lambda n: (abs(float(deltas[n])), before[n]))[:k]
        free = sorted(set(range(30)) - set(before), key=lambda n: (-products[n], n))
        expected = sorted({before[n] for n in range(12) if n not in dropped} | set(free[:k]))
        assert exchange.merge(active, exchange.grown).tolist() == expected


def test_when_no_candidate_can_grow_nothing_is_dropped() -> None:
    indices, candidates = torch.tensor([1, 4, 6]), torch.tensor([4, 6])
    exchange = exchange_by_gradient(indices, torch.tensor([1.0, 2.0, 3.0]), candidates, torch.ones(2), 1)
    assert exchange.kept.all() and exchange.replaced == 0


def test_with_too_few_candidates_only_as_many_are_dropped_the_smallest_first() -> None:
    indices = torch.tensor([0, 1, 2, 3])
    exchange = exchange_by_gradient(indices, torch.tensor([4.0, 1.0, 2.0, 3.0]), torch.tensor([8, 9]), torch.ones(2), 4)
    assert exchange.kept.tolist() == [True, False, False, True]
    assert exchange.merge(indices, exchange.grown).tolist() == [0, 3, 8, 9]


def test_an_entry_both_dropped_and_grown_stays_with_its_delta_and_cohort() -> None:
    store = DeltaStore({"w": (2, 5)}, {"w": torch.tensor([3, 7])})
    delta = store["w"]
    delta.deltas.copy_(torch.tensor([0.25, 9.0]))
    exchange = exchange_by_gradient(
        delta.indices, delta.deltas.abs(), torch.tensor([1, 3]), torch.tensor([1.0, 5.0]), 1
    )
    apply_exchange(delta, exchange, 1)
    assert delta.indices.tolist() == [3, 7] and delta.deltas.tolist() == [0.25, 9.0] and delta.cohort.tolist() == [0, 0]


def test_a_weight_that_is_wholly_active_stays_so() -> None:
    everything = torch.arange(12)
    scores = torch.rand(12)
    for exchange in (
        exchange_by_gradient(everything, scores, everything, torch.rand(12), 12),
        exchange_by_accumulators(everything, scores, torch.rand(3), torch.rand(4), 12),
    ):
        assert exchange.replaced == 0 and exchange.merge(everything, exchange.grown).tolist() == everything.tolist()


def test_the_change_criterion_measures_from_the_last_reallocation() -> None:
    store = DeltaStore({"w": (2, 5)}, {"w": torch.tensor([0, 4, 8])}, keep_reference=True)
    delta = store["w"]
    delta.deltas.copy_(torch.tensor([5.0, 1.0, -2.0]))
    delta.reference.copy_(torch.tensor([4.75, 0.0, 0.0]))
    assert drop_scores(delta, "change").tolist() == [0.25, 1.0, 2.0]
    exchange = exchange_by_gradient(delta.indices, drop_scores(delta, "change"), torch.tensor([2]), torch.ones(1), 1)
    apply_exchange(delta, exchange, 1)
    assert delta.indices.tolist() == [2, 4, 8]
    assert torch.equal(delta.reference, delta.deltas) and delta.deltas.tolist() == [0.0, 1.0, -2.0]


class LargestTensor(TorchDispatchMode):
    """Remembers how many entries the largest tensor made under it has."""

    entries = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        self.entries = max([self.entries, *(leaf.numel() for leaf in tree_leaves(result) if torch.is_tensor(leaf))])
        return result


@pytest.mark.parametrize("method", ["ag", "ma", "static"])
@pytest.mark.parametrize("seed", range(3))
def test_the_number_of_active_entries_never_changes_and_indices_stay_sorted(method: str, seed: int) -> None:
    """Thirty steps on random gradients, a reallocation every third: counts, order, and new deltas at zero."""
    generator = torch.Generator().manual_seed(seed)
    shapes, active = {"a": (7, 9), "b": (12, 4), "c": (3, 3)}, {"a": 11, "b": 40, "c": 9}
    schedule = ReallocationSchedule(
        total_steps=30, update_interval_steps=3, estimation_steps=2, initial_replacement_fraction=0.9,
        only_first=method == "static", estimates=method != "ma",
    )  # fmt: skip
    tuning = SparseFineTuning(DeltaStore(shapes, active, seed=seed), MethodSettings(method=method), schedule)
    moved = 0
    for step in range(1, 31):
        tuning.begin_step(step)
        for name, shape in shapes.items():
            for _ in range(2):
                tuning.recorder.record(name, torch.randn(shape, generator=generator))
        tuning.update(0.01)
        if not schedule.reallocates_at(step):
            continue
        before = {delta.name: set(delta.indices.tolist()) for delta in tuning.store}
        turnover = tuning.reallocate(step, NoCarrier())
        moved += turnover.replaced
        assert turnover.replaced == turnover.dropped
        for delta in tuning.store:
            assert delta.active == active[delta.name] == delta.deltas.numel() == delta.cohort.numel()
            assert bool((delta.indices[1:] > delta.indices[:-1]).all())
            assert int(delta.indices[0]) >= 0 and int(delta.indices[-1]) < delta.numel
            new = torch.tensor([index not in before[delta.name] for index in delta.indices.tolist()])
            assert bool((delta.deltas[new] == 0).all())
            assert torch.equal(new, delta.cohort == turnover.number)
    assert moved > 0
    assert len(tuning.cohort_steps) == 1 + len(schedule.reallocations())


def test_an_update_and_growth_of_momentum_approximation_make_no_tensor_of_the_weights_size() -> None:
    shape, active = (384, 640), 500
    schedule = ReallocationSchedule(total_steps=10, update_interval_steps=3, estimation_steps=1, estimates=False)
    tuning = SparseFineTuning(DeltaStore({"w": shape}, {"w": active}), MethodSettings(method="ma"), schedule)
    tuning.begin_step(1)
    tuning.recorder.record("w", torch.randn(shape))
    with LargestTensor() as largest:
        tuning.update(0.01)
        turnover = tuning.reallocate(1, NoCarrier())
    assert turnover.replaced == active
    assert 0 < largest.entries <= 4 * (sum(shape) + active)  # of 245,760


@pytest.mark.parametrize("criterion", ["magnitude", "change"])
def test_a_weight_that_no_gradient_reaches_in_a_phase_keeps_its_entries(criterion: str) -> None:
    """As an expert to which no token was routed; the other weight reallocates as ever."""
    store = DeltaStore({"reached": (4, 6), "missed": (4, 6)}, {"reached": 5, "missed": 5},
                       keep_reference=criterion == "change")  # fmt: skip
    schedule = ReallocationSchedule(total_steps=9, update_interval_steps=3, estimation_steps=2)
    tuning = SparseFineTuning(store, MethodSettings(drop_criterion=criterion), schedule)
    before = {delta.name: delta.indices for delta in store}
    for step in (1, 2):
        tuning.begin_step(step)
        tuning.recorder.record("reached", torch.randn(4, 6, generator=torch.Generator().manual_seed(step)))
        tuning.update(0.1)
    assert tuning.reallocate(2, NoCarrier()).replaced > 0
    assert not torch.equal(store["reached"].indices, before["reached"])
    assert torch.equal(store["missed"].indices, before["missed"]) and not store["missed"].cohort.any()
