import itertools
import math

import pytest

from scale_sft.spiel.schedules import LearningRateSchedule, Phase, ReallocationSchedule, scaled_rate

LENGTHS = [(40, 20, 5), (41, 10, 10), (17, 4, 1), (30, 7, 3), (3, 20, 5)]  # T, S, G


def schedule(total: int, interval: int, estimation: int, **more) -> ReallocationSchedule:
    return ReallocationSchedule(total_steps=total, update_interval_steps=interval, estimation_steps=estimation, **more)


@pytest.mark.parametrize(("total", "interval", "estimation"), LENGTHS)
def test_reallocation_happens_at_g_and_every_s_steps_after(total: int, interval: int, estimation: int) -> None:
    assert schedule(total, interval, estimation).reallocations() == list(range(estimation, total + 1, interval))


@pytest.mark.parametrize(("total", "interval", "estimation"), LENGTHS)
def test_the_g_steps_that_end_at_a_reallocation_estimate_and_the_first_proposes(total, interval, estimation) -> None:
    plan = schedule(total, interval, estimation)
    expected = dict.fromkeys(range(1, total + 1), Phase.OFF)
    for end in plan.reallocations():
        expected |= dict.fromkeys(range(end - estimation + 1, end + 1), Phase.ESTIMATE)
        expected[end - estimation + 1] = Phase.PROPOSE
    assert {step: plan.phase(step) for step in expected} == expected


def test_momentum_approximation_never_estimates() -> None:
    plan = schedule(40, 20, 5, estimates=False)
    assert {plan.phase(step) for step in range(1, 41)} == {Phase.OFF}
    assert plan.reallocations() == [5, 25]


def test_static_selection_reallocates_once() -> None:
    plan = schedule(100, 20, 5, only_first=True)
    assert plan.reallocations() == [5]
    assert [step for step in range(1, 101) if plan.phase(step) is not Phase.OFF] == [1, 2, 3, 4, 5]


def test_at_the_first_reallocation_every_delta_is_up_for_replacement() -> None:
    assert schedule(100, 20, 5, initial_replacement_fraction=0.0).replaced(5, 123) == 123


@pytest.mark.parametrize("active", [1, 99, 1000])
def test_the_replaced_fraction_falls_to_zero_as_in_equation_9(active: int) -> None:
    plan = schedule(100, 20, 5, initial_replacement_fraction=0.2)
    for step in plan.reallocations()[1:]:
        assert plan.replaced(step, active) == math.floor(0.2 * (1 - step / 100) * active)
    assert plan.replaced(100, active) == 0


def test_the_cosine_schedule_starts_and_ends_as_the_linear_one() -> None:
    plan = schedule(1000, 2, 1, initial_replacement_fraction=0.2, replacement_schedule="cosine")
    counts = [plan.replaced(step, 10_000) for step in plan.reallocations()[1:]]
    assert counts == sorted(counts, reverse=True)
    assert counts[0] == 1999 and 990 < plan.replaced(501, 10_000) < 1000 and counts[-1] == 0


def test_the_learning_rate_rises_to_its_peak_and_falls_linearly() -> None:
    rate = LearningRateSchedule(peak=1.0, total_steps=100, warmup_fraction=0.1)
    rates = [rate.at(step) for step in range(1, 101)]
    assert rates[:10] == pytest.approx([n / 10 for n in range(1, 11)])
    assert max(rates) == 1.0 and min(rates) > 0
    falls = [before - after for before, after in itertools.pairwise(rates[10:])]
    assert falls == pytest.approx([1 / 90] * len(falls))


@pytest.mark.parametrize(("decay", "last"), [("constant", 2.0), ("cosine", 0.0), ("linear", 0.0)])
def test_each_decay_keeps_within_the_peak(decay: str, last: float) -> None:
    rate = LearningRateSchedule(peak=2.0, total_steps=1000, warmup_fraction=0.0, decay=decay)
    rates = [rate.at(step) for step in range(1, 1001)]
    assert rates[0] == 2.0 and rates == sorted(rates, reverse=True)
    assert rates[-1] == pytest.approx(last, abs=0.01) and rates[-1] > 0


@pytest.mark.parametrize(("steps", "warmup"), [(1, 1), (8, 2), (40, 10), (120, 10), (333, 10), (334, 11), (1000, 30)])
def test_short_runs_warm_up_over_ten_steps_or_a_quarter(steps: int, warmup: int) -> None:
    rate = LearningRateSchedule(peak=1.0, total_steps=steps)
    assert rate.warmup_steps == warmup and rate.at(warmup) == 1.0 and 0 < rate.at(1) <= 1 / warmup
    assert LearningRateSchedule(peak=1.0, total_steps=steps, warmup_fraction=0.0).warmup_steps == 0, "as it is told"


def test_a_rate_falls_as_budget_and_depth_grow() -> None:
    assert scaled_rate(0.005, 8, 32) == 0.005, "what it is stated for"
    assert (scaled_rate(0.005, 64, 32), scaled_rate(0.005, 2, 32)) == (0.00088, 0.016)
    assert (scaled_rate(0.005, 8, 8), scaled_rate(0.005, 8, 128)) == (0.01, 0.0025)
    assert scaled_rate(0.005, 0.1, 1) == scaled_rate(0.005, 2, 8), "few entries in a shallow model must not leap"


def test_a_run_of_one_step_has_a_learning_rate() -> None:
    for fraction in (0.0, 0.03, 1.0):
        assert LearningRateSchedule(peak=1.0, total_steps=1, warmup_fraction=fraction).at(1) == 1.0


def test_entries_that_are_chosen_already_are_not_all_replaced_at_the_first_reallocation():
    fresh, chosen = (schedule(100, 20, 5, chosen=value) for value in (False, True))
    assert (fresh.replaced(5, 1000), chosen.replaced(5, 1000)) == (1000, 190), "0.2 * (1 - 5 / 100)"
    assert chosen.reallocations() == fresh.reallocations()
    static = schedule(100, 20, 5, chosen=True, only_first=True)
    assert static.reallocations() == []
    assert all(static.phase(step) is Phase.OFF for step in range(1, 101)), "nothing is proposed or estimated"
