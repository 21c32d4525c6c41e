import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from scale_sft.kernels.cpu import topk as select
from scale_sft.spiel import topk
from scale_sft.spiel.topk import bottom_k_sorted, in_sorted, top_k_of_product, top_k_sorted


class LargestTensor(TorchDispatchMode):
    """Remembers how many entries the largest tensor made under it has."""

    entries = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        made = [leaf.numel() for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]
        self.entries = max([self.entries, *made])
        return result


def best(scores: list[float], k: int, allowed: range | list[int] | None = None) -> list[int]:
    """The k positions of the largest scores by sorting, ties to the smaller position."""
    positions = range(len(scores)) if allowed is None else allowed
    return sorted(sorted(positions, key=lambda n: (-scores[n], n))[:k])


def random_values(seed: int, n: int, levels: int | None) -> Tensor:
    """[n] fp32; with `levels` only so many magnitudes, so that ties abound."""
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(n, generator=generator)
    return values if levels is None else (values * levels).round() / levels


@pytest.fixture(params=["torch", "c"])
def top_k_magnitude(request):
    if request.param == "torch":
        return topk.top_k_magnitude
    request.getfixturevalue("c_kernels")
    return select.top_k_magnitude


@pytest.mark.parametrize("levels", [None, 1, 4])
@pytest.mark.parametrize("seed", range(4))
def test_top_k_magnitude_is_that_of_a_stable_sort(seed: int, levels: int | None, top_k_magnitude) -> None:
    values = random_values(seed, 257, levels)
    for k in (0, 1, 7, 100, 256, 257):
        assert top_k_magnitude(values, k).tolist() == best(values.abs().tolist(), k)


@pytest.mark.parametrize("levels", [None, 2])
@pytest.mark.parametrize("seed", range(3))
def test_chunks_and_the_guessed_floor_change_nothing(seed: int, levels: int | None, monkeypatch) -> None:
    top_k_magnitude = topk.top_k_magnitude
    monkeypatch.setattr(topk, "CHUNK_ENTRIES", 64)
    monkeypatch.setattr(topk, "SAMPLE_ENTRIES", 128)
    values = random_values(seed, 1000, levels)
    values[::5] *= 100  # what a strided sample sees is not what there is
    for k in (1, 10, 333, 1000):
        assert top_k_magnitude(values, k).tolist() == best(values.abs().tolist(), k)


def test_bfloat16_ties_go_to_the_smaller_index(top_k_magnitude) -> None:
    values = random_values(0, 300, None).bfloat16()
    assert top_k_magnitude(values, 40).tolist() == best(values.abs().tolist(), 40)


@pytest.mark.parametrize("k", [-1, 6])
def test_a_k_out_of_range_is_refused(k: int, top_k_magnitude) -> None:
    with pytest.raises(ValueError, match=r"k must be in \[0, 5\], got"):
        top_k_magnitude(torch.ones(5), k)
    with pytest.raises(ValueError, match=r"k must be in \[0, 5\], got"):
        top_k_of_product(torch.ones(2), torch.ones(3), k, torch.tensor([4]))


def test_entries_that_are_no_number_are_chosen_last(top_k_magnitude) -> None:
    nan = float("nan")
    values = torch.tensor([1.0, nan, nan, 3.0, float("inf")])
    assert top_k_magnitude(values, 3).tolist() == [0, 3, 4]
    assert top_k_magnitude(values, 4).tolist() == [0, 1, 3, 4]
    assert top_k_magnitude(torch.full((5,), nan), 2).tolist() == [0, 1]


@pytest.mark.usefixtures("c_kernels")
@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ["normal", "few magnitudes", "all alike", "the sample lies", "broken", "tiny"])
def test_in_c_and_in_torch_the_same_entries_are_chosen(
    kind: str, dtype: torch.dtype, threads: int, set_threads
) -> None:
    n = 70_001
    values = random_values(3, n, 2 if kind == "few magnitudes" else None)
    if kind == "all alike":
        values.fill_(-2.5)
    elif kind == "the sample lies":
        values[:: n // 8192 | 1] *= 1000  # what the floor is guessed from
    elif kind == "broken":
        values[::3], values[1::7], values[2::11] = torch.nan, torch.inf, 0.0
    elif kind == "tiny":
        values *= 1e-40  # no normal floats
    values = values.to(dtype)
    set_threads(threads)
    for k in (1, 2, 700, 8193, 50_000, n - 1, n):
        assert torch.equal(select.top_k_magnitude(values, k), topk.top_k_magnitude(values, k)), k


def test_what_is_not_for_c_is_left_to_torch(monkeypatch) -> None:
    """Other dtypes, views with gaps, and machines without a compiler."""
    monkeypatch.setattr(select, "library", lambda: pytest.fail("called"))
    values = random_values(0, 400, None)
    for other in (values.double(), values.half(), values[::2]):
        assert torch.equal(select.top_k_magnitude(other, 30), topk.top_k_magnitude(other, 30))
    monkeypatch.setattr(select, "why_not", lambda: "no compiler")
    assert torch.equal(select.top_k_magnitude(values, 30), topk.top_k_magnitude(values, 30))


@pytest.mark.parametrize("seed", range(5))
def test_sorted_top_and_bottom_are_those_of_a_stable_sort(seed: int) -> None:
    scores = random_values(seed, 50, 2)
    for k in (0, 1, 20, 50):
        assert top_k_sorted(scores, k).tolist() == best(scores.tolist(), k)
        assert bottom_k_sorted(scores, k).tolist() == best((-scores).tolist(), k)


def test_membership_in_a_sorted_list_holds_at_both_ends() -> None:
    haystack = torch.tensor([2, 5, 9], dtype=torch.int32)
    assert in_sorted(torch.tensor([0, 2, 3, 9, 10]), haystack).tolist() == [False, True, False, True, False]
    assert in_sorted(torch.tensor([1]), haystack[:0]).tolist() == [False]


def accumulators(seed: int, kind: str) -> tuple[Tensor, Tensor]:
    """row [13], col [9]: plain, with ties as SM3 makes them, with zeros, or so small that products underflow."""
    generator = torch.Generator().manual_seed(seed)
    row, col = torch.rand(13, generator=generator), torch.rand(9, generator=generator)
    if kind == "ties":
        return (row * 3).round(), (col * 3).round()
    if kind == "zeros":
        return row * (row > 0.6), col * (col > 0.4)
    if kind == "tiny":
        return row * 1e-22, col * 1e-22
    return row, col


@pytest.mark.parametrize("kind", ["plain", "ties", "zeros", "tiny"])
@pytest.mark.parametrize("seed", range(4))
def test_top_k_of_a_product_is_that_of_the_dense_product(seed: int, kind: str) -> None:
    row, col = accumulators(seed, kind)
    excluded = torch.randperm(117, generator=torch.Generator().manual_seed(seed))[:30].sort().values
    free = sorted(set(range(117)) - set(excluded.tolist()))
    dense = torch.outer(row, col).flatten().tolist()
    for k in (0, 1, 5, 50, 86, 87):
        assert top_k_of_product(row, col, k, excluded.int()).tolist() == best(dense, k, free)


def test_all_entries_excluded_leave_nothing_to_choose() -> None:
    assert top_k_of_product(torch.ones(3), torch.ones(4), 0, torch.arange(12)).tolist() == []


@pytest.mark.parametrize("kind", ["random", "equal"])
def test_top_k_of_a_product_makes_no_tensor_of_the_weights_size(kind: str) -> None:
    rows, columns, k = 512, 768, 40
    row, col = torch.rand(rows), torch.rand(columns)
    if kind == "equal":
        row, col = torch.ones(rows), torch.ones(columns)
    excluded = torch.arange(0, rows * columns, 5000)
    with LargestTensor() as largest:
        top_k_of_product(row, col, k, excluded)
    assert 0 < largest.entries <= 4 * (rows + columns)  # of 393,216


def by_columns(seed: int, rows: int, width: int) -> Tensor:
    """[rows * width] as gradients are: columns differ far more than rows do."""
    generator = torch.Generator().manual_seed(seed)
    columns = torch.randn(width, generator=generator).mul_(2).exp_()
    return (torch.randn(rows, width, generator=generator) * columns).flatten()


@pytest.mark.parametrize("density", [0.001, 0.02, 0.2])
@pytest.mark.parametrize("shape", [(512, 512), (512, 1376), (300, 1000)])
def test_the_guessed_floor_is_near_where_columns_differ_and_widths_are_powers_of_two(shape, density) -> None:
    values, k = by_columns(0, *shape), int(density * shape[0] * shape[1])
    reach = int((values.abs() >= topk._sampled_floor(values, k)).sum())
    assert k <= reach <= 2.5 * k + 64


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ["by columns", "mostly zero", "equal", "no numbers"])
def test_top_k_magnitude_makes_no_tensor_of_the_vectors_size(kind: str, dtype: torch.dtype, monkeypatch) -> None:
    monkeypatch.setattr(topk, "CHUNK_ENTRIES", 4096)
    monkeypatch.setattr(topk, "SAMPLE_ENTRIES", 4096)
    values, k = by_columns(1, 256, 1024).to(dtype), 500
    if kind == "mostly zero":
        values[torch.rand(values.shape, generator=torch.Generator().manual_seed(0)) > 0.001] = 0
    elif kind == "equal":
        values.fill_(-2.0)
    elif kind == "no numbers":
        values.fill_(torch.nan)
    expected = torch.sort(values.abs().nan_to_num(nan=-1.0), stable=True, descending=True).indices[:k].sort().values
    with LargestTensor() as largest:
        chosen = topk.top_k_magnitude(values, k)
    assert torch.equal(chosen, expected)
    assert largest.entries <= 4 * 4096  # of 262,144
