"""Drop and grow in C finds what plain torch finds, ties and all."""

import random

import pytest
import torch

from scale_sft.kernels.cpu import drop_grow as exchange
from scale_sft.spiel import drop_grow as reallocate

pytestmark = pytest.mark.usefixtures("c_kernels")


@pytest.fixture
def generator():
    return torch.Generator().manual_seed(0)


def some(count, n, generator):
    return torch.randperm(n, generator=generator)[:count].sort().values.int()


def assert_same(function, *asked):
    found, expected = (getattr(where, function)(*asked) for where in (exchange, reallocate))
    assert torch.equal(found.kept, expected.kept) and torch.equal(found.grown, expected.grown)
    assert torch.equal(found.order, expected.order) and found.grown.dtype is expected.grown.dtype
    if expected.grown_candidates is None:
        assert found.grown_candidates is None
    else:
        assert torch.equal(found.grown_candidates, expected.grown_candidates)


@pytest.mark.parametrize("seed", range(40))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_small_weights_full_of_ties(seed, dtype):
    rng, generator = random.Random(seed), torch.Generator().manual_seed(seed)
    rows, width = rng.randint(1, 9), rng.randint(1, 90)
    n = rows * width
    indices, candidates = (some(rng.randint(1, n), n, generator) for _ in range(2))
    scores = torch.randint(4, indices.shape, generator=generator).to(dtype)
    mean = torch.randint(-3, 4, candidates.shape, generator=generator).float()
    row, col = (torch.randint(4, (size,), generator=generator).float() / 3 for size in (rows, width))
    for k in {0, 1, len(indices) // 2, len(indices)}:
        asked = indices, scores, candidates, mean, k
        assert_same("exchange_by_gradient", *asked)
        asked = indices, scores, row, col, k
        assert_same("exchange_by_accumulators", *asked)


@pytest.mark.parametrize("spread", [1.0, 30.0])  # products from about the same size to where they overflow and vanish
def test_weights_of_a_model(generator, spread):
    rows, width = 300, 517
    n = rows * width
    indices, candidates = some(9000, n, generator), some(12000, n, generator)
    scores, mean = torch.randn(9000, generator=generator).abs(), torch.randn(12000, generator=generator)
    row, col = (torch.randn(size, generator=generator).mul(spread).exp() for size in (rows, width))
    row[::7] = 0
    for k in (1, 900, 9000):
        few = slice(0, 12000, 5)  # candidates: not enough of them for all that could be dropped
        asked = indices, scores, candidates[few].contiguous(), mean[few].contiguous(), k
        assert_same("exchange_by_gradient", *asked)
        asked = indices, scores, candidates, mean, k
        assert_same("exchange_by_gradient", *asked)
        asked = indices, scores, row, col, k
        assert_same("exchange_by_accumulators", *asked)


def test_wide_indices_are_left_to_torch(generator):
    indices = some(50, 400, generator)
    scores, mean = torch.rand(50, generator=generator), torch.rand(50, generator=generator)
    asked = indices.long(), scores, indices.long(), mean, 20
    assert_same("exchange_by_gradient", *asked)
    asked = indices.long(), scores, torch.rand(20, generator=generator), torch.rand(20, generator=generator), 20
    assert_same("exchange_by_accumulators", *asked)


def test_products_that_are_no_number_grow_last():
    row, col = torch.tensor([torch.inf, 0.0, 1.0]), torch.tensor([torch.inf, 0.0, 2.0])
    indices = torch.tensor([0, 8], dtype=torch.int32)
    found = exchange.exchange_by_accumulators(indices, torch.ones(2), row, col, 2)
    assert found.grown.tolist() == [2, 6]  # inf * 2 and 1 * inf; inf * 0 and 0 * inf are not


def test_more_than_all_is_left_to_torch(generator):
    indices = some(5, 40, generator)
    scores, mean = torch.rand(5, generator=generator), torch.rand(5, generator=generator)
    asked = indices, scores, indices, mean, 6
    assert_same("exchange_by_gradient", *asked)
    with pytest.raises(RuntimeError, match="out of range"):
        exchange.exchange_by_accumulators(indices, scores, torch.rand(5), torch.rand(8), 6)
