"""Entries chosen before the first update, and growth by other rules than the gradient, in a model with deltas."""

import math

import pytest
import torch
from tiny_loop import SCHEDULE, batch, same, train

import scale_sft
from scale_sft.errors import UserError
from scale_sft.spiel.schedules import Phase
from scale_sft.spiel.seeding import random_indices
from scale_sft.spiel.selection import scores
from scale_sft.spiel.topk import top_k_magnitude
from tests.methods import ESTIMATED


def indices(sparse) -> dict:
    return {delta.name: delta.indices for delta in sparse.tuning.store}


def test_the_first_steps_choose_the_entries_of_the_largest_mean_gradient_and_move_nothing(load) -> None:
    dense, means = load(), {}
    for number in (1, 2):
        dense(**batch(number)).loss.backward()  # adds up
    model = load()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    sparse = scale_sft.attach(model, **SCHEDULE | ESTIMATED | {"selection_batches": 2, "selection_pool": "none"})
    optimizer = sparse.optimizer(lr=1e-2)
    train(model, optimizer, 1, 2)
    assert optimizer.steps == 0 and same(before, model.state_dict())
    for name, weight in dense.named_parameters():
        means[name] = weight.grad
    for delta in sparse.tuning.store:
        assert torch.equal(delta.indices.long(), top_k_magnitude(means[delta.name].view(-1), delta.active))
    chosen = indices(sparse)
    train(model, optimizer, 3, 9)
    assert optimizer.steps == 7 and not optimizer.turnovers and same(chosen, indices(sparse))
    assert bool(sparse.tuning.store.flat.any())


def test_after_a_first_choice_ag_replaces_a_part_and_not_all(load) -> None:
    model = load()
    sparse = scale_sft.attach(model, selection_batches=1, **SCHEDULE)
    optimizer = sparse.optimizer(lr=1e-2)
    train(model, optimizer, 1, 4)
    assert [turnover.step for turnover in optimizer.turnovers] == [2]
    assert 0 < optimizer.turnovers[0].replaced < 0.2 * sparse.tuning.store.active


def test_random_entries_come_from_the_seed_alone_and_no_step_makes_candidates(load) -> None:
    model = load()
    sparse = scale_sft.attach(model, seed=5, **SCHEDULE | {"method": "random"})
    optimizer, recorder = sparse.optimizer(lr=1e-2), sparse.tuning.recorder
    for number in range(1, 10):
        train(model, optimizer, number, number)
        assert recorder.phase is Phase.OFF and not recorder.candidates
        assert recorder.flat.numel() == sparse.tuning.store.active
    assert not optimizer.turnovers
    for delta in sparse.tuning.store:
        assert torch.equal(delta.indices, random_indices(delta.shape, delta.active, 5, delta.name))


GROWTH = {
    "balanced, sampled": {"score": "balanced", "draw": "sample"},
    "weight": {"score": "weight"},
    "gradient_weight, sampled": {"score": "gradient_weight", "draw": "sample", "temperature": 2.0},
    "snr": {"score": "snr"},
    "random": {"score": "random"},
    "gradient, sampled": {"draw": "sample", "temperature": 0.5},
    "all that grown entries can do": {
        "score": "balanced",
        "draw": "sample",
        "seed_moments": False,
        "growth_warmup_steps": 2,
        "drop_criterion": "age",
        "exchange_if_better": True,
        "rate_scaling": "counts",
    },
}


@pytest.mark.parametrize("stop", [1, 4])  # in an estimation phase; before one ends
@pytest.mark.parametrize("rule", GROWTH)
def test_growth_by_any_rule_resumes_bit_for_bit(load, rule, stop) -> None:
    straight = load()
    whole = scale_sft.attach(straight, **SCHEDULE, **GROWTH[rule])
    optimizer = whole.optimizer(lr=1e-2)
    train(straight, optimizer, 1, 6)
    assert len(optimizer.turnovers) == 2 and all(turnover.replaced for turnover in optimizer.turnovers)

    first = load()
    before = scale_sft.attach(first, **SCHEDULE, **GROWTH[rule]).optimizer(lr=1e-2)
    train(first, before, 1, stop)
    second = load()
    sparse = scale_sft.attach(second, **SCHEDULE, **GROWTH[rule])
    after = sparse.optimizer(lr=1e-2)
    after.load_state_dict(before.state_dict())
    train(second, after, stop + 1, 6)
    assert sparse.tuning.digests() == whole.tuning.digests()


def test_the_best_by_gradient_drawn_at_the_highest_temperature_are_the_papers(load) -> None:
    found = []
    for options in ({}, {"draw": "sample", "temperature": 1e6}):
        model = load()
        sparse = scale_sft.attach(model, **SCHEDULE, **options)
        train(model, sparse.optimizer(lr=1e-2), 1, 3)
        found.append({name: set(chosen.tolist()) for name, chosen in indices(sparse).items()})
    total = sum(map(len, found[0].values()))
    assert sum(len(found[0][name] & found[1][name]) for name in found[0]) > 0.99 * total


@pytest.mark.parametrize("budget", ["weight", "global"])
def test_a_resumed_optimizer_does_not_choose_again(load, budget) -> None:
    model, choice = load(), SCHEDULE | ESTIMATED | {"selection_batches": 2, "budget": budget}
    sparse = scale_sft.attach(model, **choice)
    optimizer = sparse.optimizer(lr=1e-2)
    train(model, optimizer, 1, 1)
    with pytest.raises(UserError, match="expected selection_batches steps before"):
        optimizer.state_dict()
    train(model, optimizer, 2, 4)
    other = load()
    again = scale_sft.attach(other, **choice)
    resumed = again.optimizer(lr=1e-2)
    resumed.load_state_dict(optimizer.state_dict())
    train(model, optimizer, 5, 6)
    train(other, resumed, 5, 6)
    assert again.tuning.digests() == sparse.tuning.digests() and resumed.steps == 4


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"score": "balance"}, "score: got 'balance', expected one of .* did you mean 'balanced'"),
        ({"draw": "sample", "temperature": -1}, "temperature: got -1.0, must be in"),
        ({"method": "random", "score": "snr"}, "score: got snr with method random"),
        ({"method": "ma", "draw": "sample"}, "draw: got sample with method ma, .* selection_batches of at least 1"),
        ({"row_quota": 2}, "row_quota: got a quota without selection_batches"),
        ({"row_quota": 0.5, "selection_batches": 1}, "row_quota: got 0.5, must be at least 1"),
        ({"row_quota": 1.5, "column_quota": 2, "selection_batches": 1}, "may not hold the budget, expected at least 2"),
        (
            {"method": "ma", "growth_warmup_steps": 3},
            "growth_warmup_steps: got 3 with method ma, expected ag or static",
        ),
        ({"exchange_if_better": True, "score": "weight"}, "exchange_if_better: got it with score weight"),
        ({"budget": "global"}, "budget: got global without selection_batches"),
    ],
)
def test_options_that_cannot_work_are_refused_before_anything_is_attached(load, options, message) -> None:
    model = load()
    with pytest.raises(UserError, match=message):
        scale_sft.attach(model, **SCHEDULE | options)
    assert all(weight.requires_grad for weight in model.parameters())


@pytest.mark.parametrize(("when", "step"), [({"selection_batches": 1}, 1), ({}, 2)])
def test_a_score_that_is_nan_stops_the_step_that_chooses_and_names_the_weight(load, when, step, monkeypatch) -> None:
    monkeypatch.setattr(scores, "_SCORES", dict(scores._SCORES))
    scores.register("broken", reads={"gradient"})(lambda evidence: evidence.mean.abs() * math.nan)
    model = load()
    sparse = scale_sft.attach(model, score="broken", **SCHEDULE, **when)
    optimizer = sparse.optimizer(lr=1e-2)
    train(model, optimizer, 1, step - 1)
    model(**batch(step)).loss.backward()
    with pytest.raises(UserError, match=r"score 'broken': got NaN or a negative number for [\d,]+ .*'model.layers.0"):
        optimizer.step()
