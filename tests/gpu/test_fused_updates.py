"""Updates in one pass against the plain ones, and weights that they write; where: see test_recorded_entries.py."""

import pytest
import torch
from kernel_tools import DEVICE, INTERPRETED, drawn, marks, rounded, some_entries
from torch import Tensor

pytest.importorskip("triton", reason="Triton is not installed")

from scale_sft.kernels.gpu.updates import BLOCK, Written, adamw_write, sm3_write
from scale_sft.model.resident import effective_values
from scale_sft.spiel.indices import Entries
from scale_sft.spiel.optimizers import adamw_update, sm3_update

pytestmark = marks
SETTINGS = [((0.9, 0.999), 1e-8, 0.1), ((0.0, 0.95), 1e-6, 0.0)]
WEIGHT = (13, 30)


def effective(base: Tensor, deltas: Tensor) -> Tensor:
    """The one rounding rule; see `rounded`."""
    values = rounded(base.float() + deltas.float(), base.dtype)
    assert INTERPRETED or torch.equal(values, effective_values(base, deltas))
    return values


def adamw_tables(seen: list[int], learning_rate: float, betas: tuple[float, float]) -> tuple[Tensor, Tensor]:
    steps = [-learning_rate / (1 - betas[0] ** n) if n else 0.0 for n in seen]
    return torch.tensor(steps, device=DEVICE), torch.tensor([(1 - betas[1] ** n) ** 0.5 for n in seen], device=DEVICE)


def weight_and_base(entries: Entries, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    weight = drawn(9, *entries.shape, dtype=dtype)
    return weight, weight.view(-1)[entries.flat().long()]


def written_into(entries: Entries, dtype: torch.dtype, deltas: Tensor) -> Tensor:
    """What the weight of `weight_and_base` becomes."""
    weight, base = weight_and_base(entries, dtype)
    weight.view(-1)[entries.flat().long()] = effective(base, deltas)
    return weight


@pytest.mark.parametrize(("betas", "eps", "decay"), SETTINGS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("count", [1, 150, 390])
def test_adamw_in_one_pass_is_the_plain_update_and_writes_the_weight(betas, eps, decay, dtype, count) -> None:
    entries = some_entries(WEIGHT, count)
    weight, base = weight_and_base(entries, dtype)
    deltas, gradients, exp_avg = (drawn(seed, count) for seed in (3, 4, 5))
    exp_avg_sq = drawn(6, count).square()
    cohort, seen = (torch.arange(count, device=DEVICE) % 3).to(torch.uint8), [12, 3, 40]
    plain = [tensor.clone() for tensor in (deltas, exp_avg, exp_avg_sq)]
    adamw_update(
        plain[0], gradients, plain[1], plain[2], cohort, seen,
        learning_rate=0.01, betas=betas, eps=eps, weight_decay=decay,
    )  # fmt: skip
    adamw_write(
        deltas, gradients, exp_avg, exp_avg_sq, cohort, *adamw_tables(seen, 0.01, betas),
        decay=1 - 0.01 * decay, betas=betas, eps=eps, entries=entries, written=Written(weight, base),
    )  # fmt: skip
    for actual, expected in zip((deltas, exp_avg, exp_avg_sq), plain, strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-6, atol=3e-7)  # torch fuses some products with sums
    assert torch.equal(weight, written_into(entries, dtype, deltas))


@pytest.mark.parametrize("decay", [0.0, 0.1])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("count", [1, 150, 390])
def test_sm3_in_one_pass_is_the_plain_update_and_writes_the_weight(decay, dtype, count) -> None:
    entries = some_entries(WEIGHT, count)
    weight, base = weight_and_base(entries, dtype)
    deltas, gradients = drawn(3, count), drawn(4, count)
    row, col = drawn(5, WEIGHT[0]).square(), drawn(6, WEIGHT[1]).square()
    plain = [tensor.clone() for tensor in (deltas, row, col)]
    settings = {"learning_rate": 0.05, "eps": 1e-8}
    sm3_update(plain[0], gradients, entries, plain[1], plain[2], weight_decay=decay, **settings)
    sm3_write(
        deltas, gradients, row, col, decay=1 - 0.05 * decay, entries=entries, written=Written(weight, base),
        **settings,
    )  # fmt: skip
    for actual, expected in zip((deltas, row, col), plain, strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-6, atol=3e-7)  # torch fuses some products with sums
    assert torch.equal(weight, written_into(entries, dtype, deltas))


def one_step(update: str, entries: Entries, deltas: Tensor, exp_avg: Tensor, written: Written | None) -> list[Tensor]:
    """One update in place of `deltas` and, by AdamW, `exp_avg`; gives SM3's accumulators, which begin at 0."""
    gradients = drawn(4, deltas.numel())
    common = {"decay": 0.99, "eps": 1e-8, "entries": entries, "written": written}
    if update == "sm3":
        accumulators = [torch.zeros(n, device=DEVICE) for n in entries.shape]
        sm3_write(deltas, gradients, *accumulators, learning_rate=0.01, **common)
        return accumulators
    exp_avg_sq = drawn(6, deltas.numel()).square()
    cohort, betas = torch.zeros(deltas.numel(), dtype=torch.int16, device=DEVICE), (0.9, 0.99)
    tables = adamw_tables([4], 0.01, betas)
    adamw_write(deltas, gradients, exp_avg, exp_avg_sq, cohort, *tables, betas=betas, **common)
    return []


@pytest.mark.parametrize("update", ["adamw", "sm3"])
def test_rows_longer_than_a_block_and_many_blocks_are_updated_whole(update: str) -> None:
    entries = some_entries((3, BLOCK + 90), 2 * BLOCK + 7)
    weight, base = weight_and_base(entries)
    deltas = drawn(3, entries.count)
    accumulators = one_step(update, entries, deltas, drawn(5, entries.count), Written(weight, base))
    assert torch.equal(weight, written_into(entries, torch.float32, deltas))
    assert not torch.isclose(deltas, drawn(3, entries.count), rtol=1e-4, atol=0).all()
    if update == "sm3":
        squares = torch.zeros(weight.shape, device=DEVICE)
        squares.view(-1)[entries.flat().long()] = drawn(4, entries.count).square()
        assert torch.equal(accumulators[0], squares.amax(1)) and torch.equal(accumulators[1], squares.amax(0))


@pytest.mark.parametrize("update", ["adamw", "sm3"])
def test_state_of_bf16_is_rounded_once_and_the_weight_gets_the_stored_delta(update: str) -> None:
    entries, results = some_entries(WEIGHT, 100), []
    for dtype in (torch.float32, torch.bfloat16):
        weight, base = weight_and_base(entries, torch.bfloat16)
        deltas, exp_avg = (drawn(seed, 100).bfloat16().to(dtype) for seed in (3, 5))
        one_step(update, entries, deltas, exp_avg, Written(weight, base))
        results.append((deltas, exp_avg, weight))
    (exact, exact_avg, _), (moved, moved_avg, weight) = results
    assert torch.equal(moved, rounded(exact, torch.bfloat16))
    assert torch.equal(moved_avg, rounded(exact_avg, torch.bfloat16))
    assert torch.equal(weight, written_into(entries, torch.bfloat16, moved))


@pytest.mark.parametrize("update", ["adamw", "sm3"])
@pytest.mark.parametrize(("start", "stop"), [(0, 390), (100, 200), (0, 7), (383, 390), (200, 200)])
def test_a_part_of_a_sharded_weight_is_written_and_all_entries_are_updated(update: str, start: int, stop: int) -> None:
    entries, results = some_entries(WEIGHT, 120), []
    flat = entries.flat()
    whole, base = weight_and_base(entries)
    first, last = (int((flat < bound).sum()) for bound in (start, stop))
    part = whole.view(-1)[start:stop].clone()
    for written in (None, Written(whole, base), Written(part, base[first:last], start, first)):
        results.append(drawn(3, 120))
        one_step(update, entries, results[-1], drawn(5, 120), written)
    assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])
    assert not torch.equal(results[0], drawn(3, 120))
    assert torch.equal(part, whole.view(-1)[start:stop])


@pytest.mark.parametrize("update", ["adamw", "sm3"])
def test_base_values_that_cannot_be_those_of_the_part_are_refused(update: str) -> None:
    entries = some_entries(WEIGHT, 120)
    weight, base = weight_and_base(entries)
    for written, reason in (
        (Written(weight, base.bfloat16()), "dtype of its base values"),
        (Written(weight.t(), base), "contiguous"),
        (Written(weight, base, 0, 1), "120 from entry 1 on"),
    ):
        with pytest.raises(ValueError, match=reason):
            one_step(update, entries, drawn(3, 120), drawn(5, 120), written)
