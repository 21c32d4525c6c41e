import pytest
import torch
from torch import Tensor

from scale_sft.spiel import indices as entries
from scale_sft.spiel import optimizers as optimizer
from scale_sft.spiel.deltas import DeltaStore
from scale_sft.spiel.drop_grow import apply_exchange, exchange_by_gradient
from scale_sft.spiel.indices import Entries
from scale_sft.spiel.optimizers import SM3, AdamW, adamw_update, sm3_update
from scale_sft.spiel.recorder import Candidates

SHAPES = {"a": (9, 11), "b": (6, 4), "c": (20, 33)}
ACTIVE = {"a": 13, "b": 24, "c": 101}


def gradients(seed: int, count: int, n: int) -> Tensor:
    """[count, n] of very different sizes, some exactly zero."""
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(count, n, generator=generator) * 10 ** (torch.rand(n, generator=generator) * 8 - 6)
    return values * (torch.rand(count, n, generator=generator) > 0.1)


@pytest.mark.parametrize(
    ("learning_rate", "betas", "eps", "weight_decay"),
    [(1e-3, (0.9, 0.999), 1e-8, 0.0), (1e-2, (0.9, 0.95), 1e-6, 0.1), (0.5, (0.0, 0.99), 1e-8, 0.3)],
)
def test_with_equal_ages_adamw_is_that_of_torch_bit_for_bit(learning_rate, betas, eps, weight_decay) -> None:
    store = DeltaStore(SHAPES, ACTIVE)
    store.flat.copy_(gradients(9, 1, store.active)[0])
    parameter = torch.nn.Parameter(store.flat.clone())
    own = AdamW(store, betas=betas, eps=eps, weight_decay=weight_decay)
    stock = torch.optim.AdamW([parameter], lr=learning_rate, betas=betas, eps=eps, weight_decay=weight_decay)
    for step, gradient in enumerate(gradients(0, 60, store.active)):
        stock.param_groups[0]["lr"] = learning_rate * (1 - step / 100)
        own.step(gradient, learning_rate * (1 - step / 100))
        parameter.grad = gradient.clone()
        stock.step()
        assert torch.equal(store.flat, parameter.data), step


def test_equal_ages_are_bit_for_bit_those_of_torch_in_two_cohorts_too() -> None:
    """After the first reallocation, deltas that stayed and deltas that were grown have all seen G gradients."""
    store = DeltaStore(SHAPES, ACTIVE)
    own = AdamW(store, weight_decay=0.1, estimation_steps=5)
    parameter = torch.nn.Parameter(store.flat.clone())
    stock = torch.optim.AdamW([parameter], lr=0.01, weight_decay=0.1)
    for step, gradient in enumerate(gradients(1, 20, store.active)):
        if step == 5:
            own.begin_cohort()
            for delta in store:
                delta.cohort[::2] = 1
        own.step(gradient, 0.01)
        parameter.grad = gradient.clone()
        stock.step()
        assert torch.equal(store.flat, parameter.data), step


def test_every_delta_is_corrected_by_its_own_age() -> None:
    """Each cohort of a mixed update moves as torch.optim.AdamW would move it alone, at that age."""
    n, ages = 30, [12, 3, 40]
    draws = gradients(2, 4, n)
    cohort = torch.arange(n, dtype=torch.uint8) % 3
    deltas, exp_avg, exp_avg_sq, gradient = draws[0].clone(), draws[1].clone(), draws[2].square(), draws[3]
    expected = deltas.clone()
    for number, age in enumerate(ages):
        members = cohort == number
        parameter = torch.nn.Parameter(deltas[members].clone())
        stock = torch.optim.AdamW([parameter], lr=0.01, weight_decay=0.2)
        parameter.grad = gradient[members].clone()
        stock.state[parameter] = {
            "step": torch.tensor(float(age - 1)),
            "exp_avg": exp_avg[members].clone(),
            "exp_avg_sq": exp_avg_sq[members].clone(),
        }
        stock.step()
        expected[members] = parameter.data
    settings = {"learning_rate": 0.01, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.2}
    adamw_update(deltas, gradient, exp_avg, exp_avg_sq, cohort, ages, **settings)
    torch.testing.assert_close(deltas, expected, rtol=1e-6, atol=1e-9)


def test_pieces_of_a_large_model_are_updated_as_the_whole(monkeypatch) -> None:
    results = []
    for chunk in (1 << 22, 10):
        monkeypatch.setattr(entries, "PIECE_ENTRIES", chunk)
        store = DeltaStore(SHAPES, ACTIVE)
        own = AdamW(store)
        own.begin_cohort()
        store["c"].cohort[::3] = 1
        for gradient in gradients(3, 5, store.active):
            own.step(gradient, 0.01)
        results.append(store.flat.clone())
    assert torch.equal(*results)


def test_corrections_by_cohort_go_to_the_device_once_a_step(monkeypatch) -> None:
    """Per weight and piece, a GPU would be waited for as often; numbers are those of updates that make their own."""
    monkeypatch.setattr(entries, "PIECE_ENTRIES", 10)
    made, make = [], optimizer.correction_table
    monkeypatch.setattr(optimizer, "correction_table", lambda *a: made.append(make(*a)) or made[-1])
    store = DeltaStore(SHAPES, ACTIVE)
    own = AdamW(store, weight_decay=0.1)
    own.begin_cohort()
    for delta in store:
        delta.cohort[::3] = 1
    apart = {
        delta.name: [delta.deltas.clone(), *(t.clone() for t in own.state_of(delta.name).values())] for delta in store
    }
    settings = {"learning_rate": 0.01, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.1}
    for step, gradient in enumerate(gradients(3, 5, store.active), start=1):
        made.clear()
        own.step(gradient, 0.01)
        assert len(made) == 1
        for delta, part in zip(store, gradient.split(list(ACTIVE.values())), strict=True):
            deltas, *moments = apart[delta.name]
            adamw_update(deltas, part, *moments, delta.cohort, [step, 5 + step], **settings)
            assert torch.equal(delta.deltas, deltas)


def test_grown_deltas_start_at_zero_with_seeded_moments_that_have_seen_g_gradients() -> None:
    store = DeltaStore({"w": (4, 5)}, {"w": torch.tensor([1, 3, 8, 19])})
    own = AdamW(store, betas=(0.9, 0.99), estimation_steps=3)
    for gradient in gradients(4, 3, 4):
        own.step(gradient, 0.01)
    before = {name: tensor.clone() for name, tensor in own.state_of("w").items()}
    store["w"].deltas.copy_(torch.tensor([0.5, 0.1, -0.4, 0.2]))
    places = Entries(torch.tensor([2, 3, 10]), (4, 5))
    candidates = Candidates(places, torch.tensor([1.0, -5.0, 3.0]), torch.tensor([2.0, 30.0, 10.0]))
    exchange = exchange_by_gradient(store["w"].indices, store["w"].deltas.abs(), candidates.indices, candidates.mean, 2)
    own.begin_cohort()
    own.follow(store.places.part_of(slice(0, 1)), exchange, (candidates.mean, candidates.mean_square))
    apply_exchange(store["w"], exchange, 1)
    assert store["w"].indices.tolist() == [1, 3, 8, 10]  # 3 is dropped and grown: it stays; 19 gives way to 10
    assert store["w"].deltas.tolist() == pytest.approx([0.5, 0.1, -0.4, 0.0])
    assert store["w"].cohort.tolist() == [0, 0, 0, 1]
    after = own.state_of("w")
    for name in after:
        assert torch.equal(after[name][:3], before[name][:3])
    assert float(after["exp_avg"][3]) == pytest.approx((1 - 0.9**3) * 3.0)
    assert float(after["exp_avg_sq"][3]) == pytest.approx((1 - 0.99**3) * 10.0)
    assert own.gradients_seen == [3, 3]


@pytest.mark.parametrize("limit", [10, 40, 10**6])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_all_weights_at_once_are_updated_as_each_alone_bit_for_bit(limit, dtype, monkeypatch) -> None:
    monkeypatch.setattr(entries, "PIECE_ENTRIES", limit)
    settings = {"learning_rate": 0.05, "eps": 1e-8, "weight_decay": 0.1}
    store = DeltaStore(SHAPES, ACTIVE, dtype=dtype)
    own = SM3(store, eps=1e-8, weight_decay=0.1)
    alone = {
        delta.name: [delta.deltas.clone(), *(t.clone() for t in own.state_of(delta.name).values())] for delta in store
    }
    for gradient in gradients(6, 8, store.active):
        own.step(gradient.to(dtype), 0.05)
        for delta, part in zip(store, gradient.to(dtype).split(list(ACTIVE.values())), strict=True):
            deltas, row, col = alone[delta.name]
            sm3_update(deltas, part, delta.entries, row, col, **settings)
            assert all(map(torch.equal, (delta.deltas, *own.state_of(delta.name).values()), (deltas, row, col)))


def dense_sm3(weight: Tensor, gradient: Tensor, row: Tensor, col: Tensor, lr: float, eps: float, decay: float) -> None:
    """SM3-II on a dense [O, I] weight, entry by entry as the paper writes it, in place."""
    nu = torch.minimum(row[:, None], col[None, :]) + gradient**2
    row.copy_(torch.maximum(row, nu.amax(1)))
    col.copy_(torch.maximum(col, nu.amax(0)))
    weight.mul_(1 - lr * decay).sub_(lr * gradient / (nu + eps).sqrt())


@pytest.mark.parametrize("decay", [0.0, 0.1])
@pytest.mark.parametrize(("shape", "active"), [((9, 11), 20), ((9, 11), 99), ((1, 30), 7), ((30, 1), 30)])
def test_sm3_is_dense_sm3_restricted_to_the_active_entries(shape, active: int, decay: float) -> None:
    store = DeltaStore({"w": shape}, {"w": active})
    own, delta = SM3(store, eps=1e-8, weight_decay=decay), store["w"]
    weight, row, col = torch.zeros(shape), torch.zeros(shape[0]), torch.zeros(shape[1])
    for gradient in gradients(5, 20, active):
        own.step(gradient, 0.05)
        dense = torch.zeros(shape)
        dense.view(-1)[delta.indices.long()] = gradient
        dense_sm3(weight, dense, row, col, 0.05, 1e-8, decay)
        torch.testing.assert_close(delta.deltas, weight.view(-1)[delta.indices.long()], rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(own.state_of("w")["row"], row, rtol=1e-6, atol=0)
    torch.testing.assert_close(own.state_of("w")["col"], col, rtol=1e-6, atol=0)


def test_sm3_accumulators_of_rows_and_columns_without_active_entries_stay_zero() -> None:
    row, col, deltas = torch.zeros(3), torch.zeros(4), torch.zeros(2)
    settings = {"learning_rate": 0.1, "eps": 1e-8, "weight_decay": 0.0}
    sm3_update(deltas, torch.tensor([2.0, 1.0]), Entries(torch.tensor([1, 9]), (3, 4)), row, col, **settings)
    assert row.tolist() == [4.0, 0.0, 1.0] and col.tolist() == [0.0, 4.0, 0.0, 0.0]
    assert deltas.tolist() == pytest.approx([-0.1, -0.1])
