"""The pool of a survey: a random sample of the entries, from which the first choice is made in little memory."""

from contextlib import nullcontext

import pytest
import torch

from scale_sft.spiel.selection.parts import WholeParts
from scale_sft.spiel.selection.pool import Pool
from scale_sft.spiel.selection.rule import SelectionRule
from scale_sft.spiel.selection.survey import Survey
from scale_sft.spiel.topk import top_k_magnitude
from tests.thread_ranks import on_threads
from tests.unit.spiel.test_selection import COUNTS, SHAPES, PartsOfRanks, mean_gradient, surveyed

POOLS = {"a": 40, "b": 60, "c": 9}


@pytest.mark.parametrize(("entries", "count"), [(91, 40), (100, 100), (100, 1), (7, 3), (1 << 33, 1000), (10**6, 999)])
def test_a_pool_has_one_entry_in_each_run_of_equal_length(entries: int, count: int) -> None:
    places = Pool(entries, count, 3, "w").places(torch.arange(count))
    runs = torch.arange(count + 1).double() * entries / count
    assert torch.equal(places, places.unique()) and places.numel() == count
    assert (places >= runs[:-1].floor()).all() and (places < runs[1:].ceil()).all()


def test_each_entry_of_a_run_is_as_often_in_the_pool() -> None:
    hits = torch.zeros(30)
    for seed in range(3000):
        hits[Pool(30, 10, seed, "w").places(torch.arange(10))] += 1
    assert (hits / 3000 - 1 / 3).abs().max() < 4 * 0.0086


def test_the_best_of_a_pool_are_chosen_and_nothing_outside_of_it() -> None:
    found = surveyed(SelectionRule(), WholeParts(), pools=POOLS)
    for name, (rows, columns) in SHAPES.items():
        gradient, count = mean_gradient(name).view(-1), POOLS[name]
        if count < rows * columns:
            members = Pool(rows * columns, count, 0, name).places(torch.arange(count))
        else:
            members = torch.arange(rows * columns)
        best = members[top_k_magnitude(gradient[members].abs(), COUNTS[name])]
        assert torch.equal(found[name], best)


@pytest.mark.parametrize("floor", [None, 0.3])
@pytest.mark.parametrize("score", ["gradient", "snr", "balanced", "gradient_weight"])
def test_how_many_ranks_judge_a_pool_does_not_show(score: str, floor: float | None) -> None:
    rule = SelectionRule(score=score, temperature=0.5)
    alone = surveyed(rule, WholeParts(), pools=POOLS, floor_fraction=floor)
    for world in (2, 3):
        found = on_threads(
            world,
            lambda ranks: surveyed(
                rule, PartsOfRanks(ranks), ranks.rank, ranks.size, pools=POOLS, floor_fraction=floor
            ),
        )
        assert all(torch.equal(alone[name], one[name]) for one in found for name in SHAPES)


def test_a_pool_of_all_entries_chooses_as_no_pool_does() -> None:
    rule = SelectionRule(score="balanced", temperature=0.5)
    everything = {name: rows * columns for name, (rows, columns) in SHAPES.items()}
    with_pool, without = surveyed(rule, WholeParts(), pools=everything), surveyed(rule, WholeParts())
    assert all(torch.equal(with_pool[name], without[name]) for name in SHAPES)


def test_a_survey_keeps_the_sums_of_its_pool_alone() -> None:
    survey = Survey({"w": (40, 50)}, SelectionRule(), WholeParts(), lambda _: nullcontext(), pool_sizes={"w": 160})
    survey.record("w", torch.ones(3, 40), torch.ones(3, 50))
    assert survey._sums["w"].numel() == 160 and survey._sums["w"].untyped_storage().nbytes() == 640


def test_a_score_without_gradients_looks_at_all_entries() -> None:
    rule = SelectionRule(score="weight")
    with_pool, without = (surveyed(rule, WholeParts(), pools=pools) for pools in (POOLS, None))
    assert all(torch.equal(with_pool[name], without[name]) for name in SHAPES)


def test_the_rms_of_rows_and_columns_is_estimated_from_the_pool() -> None:
    from scale_sft.spiel.selection.evidence import margins_among, margins_of

    gradient = torch.randn(200, 300, generator=torch.Generator().manual_seed(1))
    gradient *= torch.linspace(1, 3, 200)[:, None] * torch.linspace(2, 1, 300)
    places = Pool(60000, 30000, 0, "w").places(torch.arange(30000))
    exact = margins_of(gradient.view(-1), 0, (200, 300), lambda _: None)
    found = margins_among(gradient.view(-1)[places], places, (200, 300), lambda _: None)
    for estimate, truth in ((found.rows, exact.rows), (found.columns, exact.columns)):
        assert (estimate / truth - 1).abs().max() < 0.25 and abs((estimate / truth).mean() - 1) < 0.01
