"""What makes a grown entry learn: how its moments and its rate begin, what it replaces, and how crowded its row is."""

import pytest
import torch
from carriers import NoCarrier
from torch import Tensor

from scale_sft.spiel.algorithm import SparseFineTuning
from scale_sft.spiel.deltas import DeltaStore
from scale_sft.spiel.drop_grow import drop_scores, exchange_by_gradient, keep_unless_better
from scale_sft.spiel.optimizers import AdamW, Growth
from scale_sft.spiel.schedules import ReallocationSchedule
from scale_sft.spiel.selection.spread import update_rates
from scale_sft.spiel.settings import Backends, MethodSettings

SHAPES = {"a": (12, 10), "b": (6, 20)}
SCHEDULE = ReallocationSchedule(
    total_steps=12, update_interval_steps=4, estimation_steps=2, initial_replacement_fraction=0.9
)


def gradient(step: int, name: str) -> Tensor:
    return torch.randn(SHAPES[name], generator=torch.Generator().manual_seed(97 * step + len(name) + ord(name[0])))


def trained(last: int = 7, *, together: bool = False, learning_rate: float = 0.1, **settings):
    """A method after `last` steps."""
    store = DeltaStore(SHAPES, {"a": 30, "b": 40}, seed=1)
    backends = Backends(together=together)
    tuning = SparseFineTuning(store, MethodSettings(**settings), SCHEDULE, backends)
    for step in range(1, last + 1):
        tuning.begin_step(step)
        for name in SHAPES:
            tuning.recorder.record(name, gradient(step, name))
        tuning.update(learning_rate)
        if SCHEDULE.reallocates_at(step):
            tuning.reallocate(step, NoCarrier())
    return tuning


@pytest.mark.parametrize("together", [False, True])
def test_moments_that_are_not_seeded_start_from_zero_and_count_from_zero(together) -> None:
    seeded = trained(6, together=together)
    fresh = trained(6, together=together, growth=Growth(seed_moments=False))
    for name, delta in ((delta.name, delta) for delta in fresh.store):
        newest = delta.cohort == 2
        state = fresh.optimizer.state_of(name)
        assert bool(newest.any()) and not bool(state["exp_avg"][newest].any() | state["exp_avg_sq"][newest].any())
    assert fresh.optimizer.gradients_seen == [6, 4, 0] and seeded.optimizer.gradients_seen == [6, 6, 2]
    newest = seeded.store["a"].cohort == 2
    assert bool(seeded.optimizer.state_of("a")["exp_avg"][newest].all())


def test_an_entry_without_seeded_moments_moves_by_the_rate_in_its_first_update() -> None:
    tuning = trained(7, growth=Growth(seed_moments=False))
    for delta in tuning.store:
        newest = delta.cohort == 2
        assert torch.allclose(delta.deltas[newest].abs(), torch.tensor(0.1), rtol=1e-4)


@pytest.mark.parametrize("seeded", [False, True])
def test_the_rate_of_grown_entries_rises_over_their_first_updates_and_that_of_others_does_not(seeded) -> None:
    optimizer = AdamW(DeltaStore({"a": (4, 4)}, {"a": 5}), growth=Growth(seeded, 4), estimation_steps=3)
    plain = AdamW(DeltaStore({"a": (4, 4)}, {"a": 5}), growth=Growth(seeded), estimation_steps=3)
    for each in (optimizer, plain):
        each.count_gradient(1.0)
        each.begin_cohort()
    shares = []
    for _ in range(6):
        warm, cold = optimizer.count_gradient(1.0)[0], plain.count_gradient(1.0)[0]
        assert warm[0] == cold[0]
        shares.append(float(warm[1] / cold[1]))
    assert shares == pytest.approx([0.25, 0.5, 0.75, 1, 1, 1])


def test_dropped_by_age_an_entry_is_judged_by_what_it_moved_per_step() -> None:
    store = DeltaStore({"a": (4, 4)}, {"a": torch.tensor([1, 2, 3])})
    delta = store["a"]
    delta.deltas.copy_(torch.tensor([0.8, -0.5, 0.3]))
    delta.cohort.copy_(torch.tensor([0, 1, 2]))
    scores = drop_scores(delta, "age", torch.tensor([20.0, 10.0, 1.0]))
    assert scores.tolist() == pytest.approx([0.04, 0.05, 0.3])
    assert trained(10, drop_criterion="age").digests() != trained(10).digests()


def test_an_exchange_keeps_the_most_promising_of_both_sides() -> None:
    indices, candidates = torch.tensor([1, 4, 6, 9]), torch.tensor([0, 2, 7])
    scores, mean = torch.tensor([0.1, 0.2, 0.3, 0.4]), torch.tensor([3.0, 1.0, 2.0])
    whole = exchange_by_gradient(indices, scores, candidates, mean, 3)
    assert whole.grown.tolist() == [0, 2, 7]
    promises = mean[whole.grown_candidates]
    some = keep_unless_better(whole, indices, torch.tensor([2.0, 0.5, 2.5]), promises)
    assert some.grown.tolist() == [0] and some.kept.tolist() == [True, False, True, True]  # 2.0 ties: the entry stays
    assert torch.cat((indices, some.grown))[some.order].tolist() == [0, 1, 6, 9]
    none = keep_unless_better(whole, indices, torch.full((3,), 9.0), promises)
    assert bool(none.kept.all()) and none.replaced == 0
    assert torch.equal(keep_unless_better(whole, indices, torch.zeros(3), promises).order, whole.order)


def test_only_candidates_that_promise_more_are_exchanged() -> None:
    plain, careful = trained(6), trained(6, exchange_if_better=True)
    youngest = [sum(int((d.cohort == 2).sum()) for d in tuning.store) for tuning in (plain, careful)]
    assert 0 < youngest[1] < youngest[0]


def test_crowded_rows_and_columns_move_less_and_the_mean_stays() -> None:
    store = DeltaStore({"a": (8, 8)}, {"a": torch.tensor([0, 1, 2, 3, 4, 5, 62])})
    rates = update_rates(store["a"].entries)
    assert float(rates.mean()) == pytest.approx(1)
    assert float(rates[-1] / rates[0]) == pytest.approx(6**0.25)
    scaled, plain = (trained(1, scale_rates=on, learning_rate=0.5) for on in (True, False))
    for one, other in zip(scaled.store, plain.store, strict=True):
        torch.testing.assert_close(one.deltas, other.deltas * update_rates(one.entries))
