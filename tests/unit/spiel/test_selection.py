"""Scores, draws, quotas and shares: which entries are chosen, and that how a weight is cut does not show."""

import math
from contextlib import nullcontext

import pytest
import torch
from torch import Tensor

from scale_sft.distributed import candidates
from scale_sft.spiel.selection import scores
from scale_sft.spiel.selection.draws import sample_keys, stream
from scale_sft.spiel.selection.evidence import margins_of
from scale_sft.spiel.selection.parts import WholeParts
from scale_sft.spiel.selection.quotas import choose_within
from scale_sft.spiel.selection.rule import SelectionRule
from scale_sft.spiel.selection.shares import global_shares
from scale_sft.spiel.selection.survey import Survey
from scale_sft.spiel.topk import top_k_magnitude
from tests.thread_ranks import ThreadRanks, on_threads

SHAPES = {"a": (7, 13), "b": (20, 5), "c": (1, 9)}
COUNTS = {"a": 20, "b": 30, "c": 2}
BUILT_IN = ("gradient", "snr", "balanced", "weight", "gradient_weight", "random")


class PartsOfRanks:
    """The parts of a selection over ranks, as a run has them."""

    def __init__(self, ranks: ThreadRanks):
        self.ranks = ranks

    def range_of(self, n: int) -> slice:
        return candidates.range_of_rank(self.ranks, n)

    def own_part(self, gradient: Tensor) -> Tensor:
        return candidates.sum_own_part(self.ranks, gradient)

    def sum_(self, flat: Tensor, purpose: str = "gradients") -> None:
        self.ranks.sum_(flat)

    def choose(self, keys: Tensor, n: int, count: int) -> Tensor:
        return candidates.select_largest(self.ranks, keys, n, count)

    def join(self, keys: Tensor, n: int) -> Tensor:
        return candidates.join_parts(self.ranks, keys, n)


def factors(batch: int, name: str) -> tuple[Tensor, Tensor]:
    """Factors of a gradient that are whole numbers, so that sums over ranks are exact."""
    rows, columns = SHAPES[name]
    generator = torch.Generator().manual_seed(31 * batch + len(name) + rows)
    whole = lambda width: torch.randint(-4, 5, (8, width), generator=generator).float()
    return whole(rows), whole(columns)


def weights() -> dict[str, Tensor]:
    return {
        name: torch.randn(shape, generator=torch.Generator().manual_seed(shape[0])) for name, shape in SHAPES.items()
    }


def surveyed(
    rule: SelectionRule, parts, rank: int = 0, world: int = 1, batches: int = 3, pools=None, **choice
) -> dict[str, Tensor]:
    """Choose from `batches` batches, whose tokens are dealt out to the ranks."""
    survey = Survey(SHAPES, rule, parts, lambda name: nullcontext(weights()[name]), pool_sizes=pools)
    for batch in range(batches):
        for name in SHAPES:
            left, right = factors(batch, name)
            survey.record(name, left[rank::world], right[rank::world])
        survey.end_batch()
    return survey.choose(COUNTS, **choice)


def mean_gradient(name: str, batches: int = 3) -> Tensor:
    return sum(left.t() @ right for left, right in (factors(batch, name) for batch in range(batches))) / batches


# --- scores ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("score", BUILT_IN[:-1])
def test_the_best_by_a_score_are_those_of_the_dense_formula(score: str) -> None:
    chosen = surveyed(SelectionRule(score=score), WholeParts())
    for name, weight in weights().items():
        mean = mean_gradient(name)
        squares = sum((left.t() @ right).square() for left, right in (factors(b, name) for b in range(3))) / 3
        rms = lambda dim: mean.square().mean(dim, keepdim=True).sqrt()  # noqa: B023
        expected = {
            "gradient": mean.abs(),
            "snr": (mean.abs() / squares.sqrt()).nan_to_num(0),
            "balanced": (mean.abs() / (rms(0) * rms(1)).sqrt()).nan_to_num(0),
            "weight": weight.abs(),
            "gradient_weight": (mean * weight).abs(),
        }[score].view(-1)
        found = chosen[name]
        others = torch.ones(expected.shape, dtype=torch.bool)
        others[found] = False
        assert torch.equal(found, found.sort().values) and found.unique().numel() == COUNTS[name]
        assert expected[found].min() >= expected[others].max() * (1 - 1e-6)


def test_one_batch_has_no_noise_to_measure_so_snr_falls_back_to_the_gradient() -> None:
    by_noise, by_size = (surveyed(SelectionRule(score=score), WholeParts(), batches=1) for score in ("snr", "gradient"))
    assert all(torch.equal(by_noise[name], by_size[name]) for name in SHAPES)


def test_a_score_of_ones_own_is_used_by_its_name(monkeypatch) -> None:
    monkeypatch.setattr(scores, "_SCORES", dict(scores._SCORES))
    scores.register("smallest", reads={"gradient"})(lambda evidence: 1 / (1 + evidence.mean.abs()))
    chosen = surveyed(SelectionRule(score="smallest"), WholeParts())
    assert all(mean_gradient(name).abs().view(-1)[chosen[name]].max() < 10 for name in ("a", "b"))
    with pytest.raises(ValueError, match="got 'smallest' twice"):
        scores.register("smallest", reads=())


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: SelectionRule(score="gradeint"), "did you mean 'gradient'?"),
        (lambda: SelectionRule(temperature=-1), "temperature: got -1, expected a number of at least 0"),
        (lambda: SelectionRule(temperature=math.nan), "temperature: got nan"),
        (lambda: scores.register("new", reads={"loss"}), "got loss, expected some of gradient"),
    ],
)
def test_a_rule_that_cannot_work_is_refused(make, message: str) -> None:
    with pytest.raises(ValueError, match=message.replace("?", r"\?")):
        make()


@pytest.mark.parametrize("temperature", [math.inf, 1.0])
@pytest.mark.parametrize("value", [math.nan, -1.0])
def test_a_score_that_is_not_a_number_of_at_least_0_names_its_weight(value, temperature, monkeypatch) -> None:
    monkeypatch.setattr(scores, "_SCORES", dict(scores._SCORES))
    scores.register("broken", reads={"gradient"})(lambda e: torch.where(e.mean == e.mean.max(), value, e.mean.abs()))
    with pytest.raises(ValueError, match=r"score 'broken': got NaN or a negative number for \d+ entries of 'a'"):
        surveyed(SelectionRule(score="broken", temperature=temperature), WholeParts())


# --- draws ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("temperature", [0.0, 0.5, 1.0, 2.0])
def test_an_entry_is_drawn_first_in_proportion_to_a_power_of_its_score(temperature: float) -> None:
    values = torch.tensor([1.0, 2.0, 3.0, 0.0, 4.0])
    places, draws = torch.arange(5), 6000
    firsts = torch.zeros(5)
    for number in range(draws):
        firsts[sample_keys(values, places, temperature, stream(0, "w", number)).argmax()] += 1
    wanted = torch.where(values > 0, values**temperature, 0)
    wanted = wanted / wanted.sum()
    assert firsts[3] == 0
    assert (firsts / draws - wanted).abs().max() < 4 * (0.25 / draws) ** 0.5


def test_scores_of_0_are_drawn_last_and_each_of_them_as_often() -> None:
    values, counts = torch.tensor([0.0, 1e-30, 0.0, 0.0]), torch.zeros(4)
    for number in range(900):
        keys = sample_keys(values, torch.arange(4), 3.0, stream(1, "w", number))
        counts[top_k_magnitude(keys, 2)] += 1
    assert counts[1] == 900
    assert (counts[[0, 2, 3]] - 300).abs().max() < 75


def test_temperatures_lead_from_chance_to_the_best() -> None:
    values = torch.rand(4000, generator=torch.Generator().manual_seed(0))
    best = set(top_k_magnitude(values, 400).tolist())
    shared = []
    for temperature in (0.0, 1.0, 8.0, 1e5):
        keys = sample_keys(values, torch.arange(4000), temperature, stream(0, "w", 0))
        shared.append(len(best & set(top_k_magnitude(keys, 400).tolist())))
    assert 20 < shared[0] < 60 and shared == sorted(shared) and shared[-1] >= 398


def test_noise_depends_on_seed_weight_and_round_and_on_nothing_else() -> None:
    values, places = torch.ones(1000), torch.arange(1000) + (1 << 33)
    keys = lambda *which: sample_keys(values, places, 1.0, stream(*which))
    first = keys(0, "w", 0)
    assert torch.equal(first, keys(0, "w", 0))
    assert torch.equal(first[300:700], sample_keys(values[:400], places[300:700], 1.0, stream(0, "w", 0)))
    for other in (keys(1, "w", 0), keys(0, "v", 0), keys(0, "w", 1)):
        ranks = torch.stack((first.argsort().argsort(), other.argsort().argsort())).float()
        assert abs(float(torch.corrcoef(ranks)[0, 1])) < 0.15


# --- parts ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("world", [2, 3])
@pytest.mark.parametrize("temperature", [math.inf, 1.0])
@pytest.mark.parametrize("score", BUILT_IN)
def test_any_number_of_ranks_chooses_what_one_does(score: str, temperature: float, world: int) -> None:
    rule = SelectionRule(score=score, temperature=temperature)
    alone = surveyed(rule, WholeParts())
    for found in on_threads(world, lambda ranks: surveyed(rule, PartsOfRanks(ranks), ranks.rank, world)):
        assert all(torch.equal(found[name], alone[name]) for name in SHAPES)


@pytest.mark.parametrize("choice", [{"floor_fraction": 0.2}, {}])
def test_any_number_of_ranks_makes_the_same_shares_and_keeps_the_same_quotas(choice) -> None:
    rule = SelectionRule(score="balanced", temperature=1.0, row_quota=2.0, column_quota=2.0)
    alone = surveyed(rule, WholeParts(), **choice)
    for found in on_threads(3, lambda ranks: surveyed(rule, PartsOfRanks(ranks), ranks.rank, 3, **choice)):
        assert all(torch.equal(found[name], alone[name]) for name in SHAPES)


@pytest.mark.parametrize("cut", [0, 3, 13, 14, 40, 91])
def test_margins_do_not_depend_on_where_a_weight_is_cut(cut: int) -> None:
    gradient = torch.randn(7, 13, generator=torch.Generator().manual_seed(2))
    halves = []

    def keep(sums: Tensor) -> None:
        halves.append(sums.clone())

    flat = gradient.view(-1)
    margins_of(flat[:cut], 0, (7, 13), keep)
    margins_of(flat[cut:], cut, (7, 13), keep)
    sums = halves[0] + halves[1]
    torch.testing.assert_close(sums[:7], gradient.double().square().sum(1))
    torch.testing.assert_close(sums[7:], gradient.double().square().sum(0))


# --- quotas and shares ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("in_row", "in_column"), [(3, 100), (100, 4), (4, 5), (3, 3)])
def test_no_row_and_no_column_gets_more_than_its_quota(in_row: int, in_column: int) -> None:
    keys = torch.rand(30, 20, generator=torch.Generator().manual_seed(3)) * torch.linspace(0.1, 9, 30)[:, None]
    chosen = choose_within(keys, 50, in_row, in_column)
    assert chosen.unique().numel() == 50
    assert torch.bincount(chosen // 20).max() <= in_row and torch.bincount(chosen % 20).max() <= in_column


def test_with_a_cap_for_rows_alone_the_choice_is_the_best_possible() -> None:
    keys = torch.rand(30, 20, generator=torch.Generator().manual_seed(4)) * torch.linspace(0.1, 9, 30)[:, None]
    best_of_rows = keys.topk(3, dim=1).values.flatten().topk(50).values
    assert torch.equal(keys.view(-1)[choose_within(keys, 50, 3, 30)].sort(descending=True).values, best_of_rows)


def test_a_loose_quota_changes_nothing_and_a_tight_one_is_refused() -> None:
    keys = torch.rand(6, 6, generator=torch.Generator().manual_seed(5)).round(decimals=1)  # with ties
    assert torch.equal(choose_within(keys, 9, 6, 6), top_k_magnitude(keys.view(-1), 9))
    with pytest.raises(ValueError, match="which hold 12 of 13 entries"):
        choose_within(keys, 13, 2, 6)


def test_a_global_ranking_takes_the_best_of_all_and_keeps_floors() -> None:
    generator = torch.Generator().manual_seed(6)
    keys = {"low": torch.rand(50, generator=generator), "high": torch.rand(80, generator=generator) + 1}
    sizes = {"low": 50, "high": 80}
    leave = lambda flat: None
    assert global_shares(keys, sizes, {"low": 1, "high": 1}, 60, leave) == {"low": 1, "high": 59}
    assert global_shares(keys, sizes, {"low": 7, "high": 1}, 60, leave) == {"low": 7, "high": 53}
    assert global_shares(keys, sizes, {"low": 1, "high": 1}, 130, leave) == sizes
    free = torch.cat([keys["low"], keys["high"] - 1])
    shares = global_shares({"low": keys["low"], "high": keys["high"] - 1}, sizes, {"low": 0, "high": 0}, 40, leave)
    assert shares["low"] == int((top_k_magnitude(free, 40) < 50).sum()) and sum(shares.values()) == 40


def test_without_gradients_keys_are_made_where_the_processes_can_exchange_them() -> None:
    class Elsewhere(WholeParts):
        def sum_(self, flat, purpose):
            raise LookupError(flat.device.type)

    rule = SelectionRule(score="random", temperature=1.0)
    survey = Survey(SHAPES, rule, Elsewhere(), lambda name: nullcontext(), torch.device("meta"))
    with pytest.raises(LookupError, match="meta"):
        survey.choose(dict.fromkeys(SHAPES, 3))
