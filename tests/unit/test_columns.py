"""Dot products of sampled columns give the entries that the whole product would give."""

import pytest
import torch

from scale_sft.bench.peak import peak_of
from scale_sft.spiel import columns
from scale_sft.spiel.columns import column_products, sampling_is_cheaper
from scale_sft.spiel.delta import DeltaStore
from scale_sft.spiel.entries import Entries
from scale_sft.spiel.sampling import GradientRecorder, pick
from scale_sft.spiel.schedule import Phase


@pytest.fixture
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def factors(
    tokens: int, rows: int, width: int, dtype: torch.dtype = torch.float32
) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(tokens)
    return tuple(torch.randn(tokens, n, generator=generator).to(dtype) for n in (rows, width))


def some(rows: int, width: int, count: int, seed: int = 0) -> Entries:
    chosen = torch.randperm(rows * width, generator=torch.Generator().manual_seed(seed))[:count]
    return Entries(chosen.sort().values, (rows, width))


def exact(left: torch.Tensor, right: torch.Tensor, entries: Entries) -> torch.Tensor:
    return (left.double().t() @ right.double()).view(-1)[entries.flat().long()]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    "tokens, rows, width, count", [(1, 3, 5, 1), (37, 9, 40, 11), (300, 64, 48, 3072), (5, 400, 2, 7)]
)
def test_entries_are_those_of_the_exact_product(dtype, tokens, rows, width, count, monkeypatch):
    monkeypatch.setattr(columns, "CACHE_BYTES", 4 * width * 24)  # several pieces, the last of them a short one
    left, right = factors(tokens, rows, width, dtype)
    entries = some(rows, width, count)
    out = torch.ones(count)
    column_products(left, right, [(entries, out)])
    torch.testing.assert_close(out.double() - 1, exact(left, right, entries), rtol=2e-5, atol=2e-5)


def test_all_that_is_wanted_is_added_to_what_is_there_in_its_own_dtype():
    left, right = factors(64, 32, 16)
    active, candidates = some(32, 16, 30), some(32, 16, 50, seed=1)
    out = torch.full((30,), 2.0), torch.full((50,), 3.0, dtype=torch.bfloat16)
    column_products(left, right, [(active, out[0]), (candidates, out[1])])
    torch.testing.assert_close(out[0], (2 + exact(left, right, active)).float(), rtol=1e-5, atol=1e-5)
    assert torch.equal(out[1], (3 + exact(left, right, candidates)).bfloat16())


def test_factors_may_lie_in_memory_as_they_like():
    left, right = factors(48, 20, 24)
    entries = some(20, 24, 60)
    apart = torch.stack((left, left), dim=2)[..., 0]
    strided, plain = torch.zeros(60), torch.zeros(60)
    column_products(apart, right.t().contiguous().t(), [(entries, strided)])
    column_products(left, right, [(entries, plain)])
    assert torch.equal(strided, plain)
    ones = torch.ones(1, 1).expand(48, 20)  # what autograd gives for the gradient of a sum
    column_products(ones, right, [(entries, plain.zero_())])
    torch.testing.assert_close(plain, right.sum(0)[entries.flat().long() % 24])


def test_the_result_is_the_same_bit_for_bit_for_any_number_of_threads():
    left, right = factors(512, 256, 256, torch.bfloat16)
    entries, before = some(256, 256, 3000), torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append(torch.zeros(3000))
            column_products(left, right, [(entries, results[-1])])
    finally:
        torch.set_num_threads(before)
    assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])


def test_nothing_of_the_size_of_the_weight_is_made(one_thread):
    left, right = factors(64, 4096, 4096)
    entries, out = some(4096, 4096, 2000), torch.zeros(2000)
    small = [(some(64, 64, 9), torch.zeros(9))]
    column_products(*factors(64, 64, 64), small)  # what is loaded at the first call does not count
    peak = peak_of(lambda: column_products(left, right, [(entries, out)]), torch.device("cpu"))
    assert peak.added < 4096 * 4096  # bytes; the product has four times as many


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_few_entries_of_a_large_weight_are_sampled_and_many_are_not(dtype, monkeypatch, one_thread):
    monkeypatch.setattr(columns, "_has_matrix_units", lambda: False)
    left, right = factors(512, 512, 512, dtype)
    few, many = 512 * 512 // 100, 512 * 512 // 4
    assert sampling_is_cheaper(left, right, few) and not sampling_is_cheaper(left, right, many)
    assert not sampling_is_cheaper(left[:8], right[:8], 1)
    assert not sampling_is_cheaper(left.to("meta"), right.to("meta"), 1)
    assert not sampling_is_cheaper(left.double(), right.double(), 1)
    long = torch.empty((), dtype=dtype).expand(8192, 512)
    assert sampling_is_cheaper(long, long, few)
    torch.set_num_threads(16)  # the whole product has use for them, laying out columns has not
    assert not sampling_is_cheaper(long, long, few)
    torch.set_num_threads(1)
    monkeypatch.setattr(columns, "_has_matrix_units", lambda: True)
    assert sampling_is_cheaper(left, right, few) is (dtype is torch.float32)


def test_the_recorder_forms_the_whole_product_only_where_all_of_it_is_looked_at(monkeypatch, one_thread):
    store = DeltaStore({"w": (256, 512)}, {"w": 900}, seed=0)
    recorder = GradientRecorder(store, {"w": 700}, estimation_steps=1)
    left, right = factors(512, 256, 512)
    whole = []
    form = GradientRecorder._product
    monkeypatch.setattr(GradientRecorder, "_product", lambda *args: whole.append(1) or form(*args))

    def record(phase: Phase) -> bool:
        recorder.begin_step(phase)
        whole.clear()
        recorder.record_product("w", left, right)
        recorder.end_step()
        torch.testing.assert_close(
            recorder.gradients.double(), exact(left, right, store["w"].entries), rtol=1e-4, atol=1e-4
        )
        return bool(whole)

    assert record(Phase.OFF)  # the first step looks for dead gradients
    assert not record(Phase.OFF)
    assert record(Phase.PROPOSE)
    proposed = recorder.candidates["w"].mean.clone()
    dense = torch.zeros(700)
    pick(left.t() @ right, [(recorder.candidates["w"].entries, dense)])
    torch.testing.assert_close(proposed, dense)
    assert not record(Phase.ESTIMATE)
    torch.testing.assert_close(recorder.candidates["w"].mean, 2 * dense, rtol=1e-4, atol=1e-4)
