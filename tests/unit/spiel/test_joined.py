"""Drop and grow of many weights at once choose what each weight alone would, to the last index and bit."""

import pytest
import torch
from carriers import NoCarrier
from torch import Tensor

from scale_sft.spiel import indices
from scale_sft.spiel.algorithm import SparseFineTuning
from scale_sft.spiel.deltas import DeltaStore
from scale_sft.spiel.joined_drop_grow import exchange_by_accumulators
from scale_sft.spiel.schedules import Phase, ReallocationSchedule
from scale_sft.spiel.settings import Backends, MethodSettings
from scale_sft.spiel.topk import top_k_magnitude, top_k_of_product

SHAPES = {"a": (9, 11), "one row": (1, 40), "one column": (30, 1), "full": (4, 5), "b": (64, 48), "c": (20, 33)}
ACTIVE = {"a": 13, "one row": 7, "one column": 30, "full": 20, "b": 500, "c": 101}
FRACTIONS = [0.0, 0.2, 1.0]


def numbers(seed: int, count: int, kind: str) -> Tensor:
    """[count] of any sign: all different, with many ties, or of all magnitudes that fp32 has, zero among them."""
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(count, generator=generator)
    if kind == "ties":
        return values.round()
    if kind == "extreme":
        return values * 2.0 ** torch.randint(-149, 66, (count,), generator=generator)
    return values


class BySquares:
    """Another rule of growth: candidates of the largest gradient, ranked by the rarest."""

    def propose(self, name, gradient, count, round_number):
        return top_k_magnitude(gradient.view(-1), count), {}

    def rank(self, name, columns, indices, mean, mean_square, facts, round_number):
        return (len(name) + round_number) / (1 + mean_square + indices % columns)


def trained(
    together: bool, method: str, kind: str, fraction: float, criterion: str, dtype, silent: str, proposals=None
) -> list:
    """Reallocate three times; returns all that can be seen afterwards."""
    schedule = ReallocationSchedule(
        total_steps=1000, update_interval_steps=1, estimation_steps=1, estimates=method == "ag",
        initial_replacement_fraction=fraction, chosen=True,
    )  # fmt: skip
    store = DeltaStore(SHAPES, ACTIVE, keep_reference=criterion == "change", dtype=dtype, cohorts=300)
    settings = MethodSettings(method=method, drop_criterion=criterion, candidate_ratio=0.7)
    tuning = SparseFineTuning(store, settings, schedule, Backends(together=together, proposals=proposals))
    seen: list = []
    for step in range(1, 4):
        store.flat.copy_(numbers(step, store.active, kind))
        if method == "ag":
            tuning.recorder.begin_step(Phase.PROPOSE)
            for number, (name, shape) in enumerate(SHAPES.items()):
                if name != silent:
                    gradient = numbers(10 * step + number, shape[0] * shape[1], kind)
                    tuning.recorder.record(name, gradient.clamp(-1e18, 1e18).view(shape))
            tuning.recorder.end_step()
        else:
            for number, name in enumerate(SHAPES):
                for kept in tuning.optimizer.state_of(name).values():
                    kept.copy_(numbers(10 * step + number, kept.numel(), kind).abs())
        seen.append(tuning.reallocate(step, NoCarrier()))
    return [*seen, *(tensor for name in SHAPES for tensor in tuning.state_of(name).values())]


@pytest.mark.parametrize("fraction", FRACTIONS)
@pytest.mark.parametrize("kind", ["different", "ties", "extreme"])
@pytest.mark.parametrize("method", ["ag", "ma"])
@pytest.mark.parametrize(
    ("criterion", "dtype", "limit"), [("magnitude", torch.float32, 80), ("change", torch.bfloat16, 10**6)]
)
def test_weights_together_reallocate_as_each_alone(method, kind, fraction, criterion, dtype, limit, monkeypatch):
    monkeypatch.setattr(indices, "PIECE_ENTRIES", limit)
    for silent in ("", "one column") if method == "ag" else ("",):
        alone, together = (
            trained(together, method, kind, fraction, criterion, dtype, silent) for together in (False, True)
        )
        for one, other in zip(alone, together, strict=True):
            assert torch.equal(one, other) if isinstance(one, Tensor) else one == other


def test_another_rule_of_growth_ranks_candidates_together_as_alone():
    alone, together, plain = (
        trained(*options, "ag", "different", 0.2, "magnitude", torch.float32, "b", proposals)
        for options, proposals in (([False], BySquares()), ([True], BySquares()), ([True], None))
    )
    same = lambda one, other: torch.equal(one, other) if isinstance(one, Tensor) else one == other
    assert all(map(same, alone, together)) and not all(map(same, together, plain))


@pytest.mark.parametrize("kind", ["different", "ties", "extreme"])
def test_products_are_chosen_as_of_each_weight_alone(kind):
    """Infinite and smallest products, whole rows at the threshold and none wanted are among them."""
    store = DeltaStore(SHAPES, ACTIVE)
    places = store.places
    (part,) = places.groups()
    for seed in range(20):
        row = numbers(seed, places.rows.starts[-1], kind).abs()
        col = numbers(seed + 100, places.rows.first_columns[-1], kind).abs()
        wanted = [(seed * count) // 20 for count in ACTIVE.values()]
        exchange = exchange_by_accumulators(places, part, store.flat.abs(), row, col, wanted)
        joined = exchange.merge(places.joined(part), exchange.grown)
        new = joined[~torch.isin(joined, places.joined(part))]
        expected = []
        for number, (delta, k) in enumerate(zip(store, wanted, strict=True)):
            first_row, first_column = places.rows.starts[number], places.rows.first_columns[number]
            of_rows, of_columns = row[first_row:][: delta.shape[0]], col[first_column:][: delta.shape[1]]
            k = min(k, delta.numel - delta.active) if of_rows.any() else 0  # no gradient has ever reached it
            grown = top_k_of_product(of_rows, of_columns, k, delta.indices)
            expected.append(grown + places.rows.offsets(part.weights)[number])
        assert torch.equal(new, torch.cat(expected)), seed
