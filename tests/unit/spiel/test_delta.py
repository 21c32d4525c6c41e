import pytest
import torch

from scale_sft.spiel.budgets import budget, equivalent_rank
from scale_sft.spiel.deltas import DeltaStore

SHAPES = {"a": (8, 16), "b": (5, 7), "c": (64, 32)}


def test_deltas_start_at_zero_in_views_of_one_buffer() -> None:
    store = DeltaStore(SHAPES, {"a": 3, "b": 2, "c": 5})
    assert store.active == 10 and store.names == ["a", "b", "c"] and len(store) == 3
    store.flat.copy_(torch.arange(10.0))
    assert [delta.deltas.tolist() for delta in store] == [[0, 1, 2], [3, 4], [5, 6, 7, 8, 9]]
    assert all(delta.indices.dtype is torch.int32 for delta in store)


def test_a_weight_beyond_two_billion_entries_gets_wide_indices_and_no_dense_tensor() -> None:
    store = DeltaStore({"huge": (70_000, 70_000)}, {"huge": 10})
    assert store["huge"].indices.dtype is torch.int64 and store["huge"].numel == 4_900_000_000


def test_cohorts_are_counted() -> None:
    store = DeltaStore(SHAPES, {"a": 3, "b": 2, "c": 5})
    store["c"].cohort[:2] = 2
    assert store.cohort_counts(3) == [8, 0, 2]
    assert DeltaStore(SHAPES, {"a": 3, "b": 2, "c": 5}, cohorts=300)["a"].cohort.dtype is torch.int16


def test_density_is_uniform_over_weights() -> None:
    assert budget(SHAPES, density=0.25) == {"a": 32, "b": 8, "c": 512}
    assert budget(SHAPES, density=1.0) == {"a": 128, "b": 35, "c": 2048}
    assert budget(SHAPES, density=1e-6) == {"a": 1, "b": 1, "c": 1}


@pytest.mark.parametrize("total", [3, 10, 100, 999, 2211])
def test_a_total_is_spread_to_the_last_entry(total: int) -> None:
    shares = budget(SHAPES, tunable_weights=total)
    assert sum(shares.values()) == total or total < 20  # every weight keeps at least one entry
    assert all(1 <= shares[name] <= o * i for name, (o, i) in SHAPES.items())


def test_rank_equivalent_is_the_parameter_count_of_lora() -> None:
    assert budget(SHAPES, rank_equivalent=2) == {"a": 48, "b": 24, "c": 192}
    assert budget(SHAPES, rank_equivalent=100) == {"a": 128, "b": 35, "c": 2048}


def test_the_equivalent_rank_of_a_budget_is_the_rank_that_has_as_many_parameters() -> None:
    for rank in (1, 2):
        assert equivalent_rank(sum(budget(SHAPES, rank_equivalent=rank).values()), SHAPES.values()) == rank
    assert equivalent_rank(8 * 16, [(8, 16)]) == 8 * 16 / (8 + 16), "all of a weight"


@pytest.mark.parametrize("given", [{}, {"density": 0.1, "tunable_weights": 5}])
def test_none_or_two_budgets_are_refused(given: dict) -> None:
    with pytest.raises(ValueError, match="exactly one"):
        budget(SHAPES, **given)
