"""Kernels against the dense gradient and the plain updates: on a GPU, or in Triton's interpreter on a CPU.

`tests/unit/test_kernels.py` runs this file in the interpreter, in a process of its own: TRITON_INTERPRET has to be set
before anything imports Triton.
"""

import os

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton", reason="Triton is not installed")

from scale_sft.base_weight import effective_values
from scale_sft.kernels.layout import IndexSet, flat_indices, plain_entries
from scale_sft.kernels.picked import picked_entries
from scale_sft.kernels.sampled import sampled_dots
from scale_sft.kernels.tiles import TILES, Tile, product_entries
from scale_sft.kernels.updates import BLOCK, Written, adamw_write, sm3_write
from scale_sft.spiel.optimizer import adamw_update, sm3_update

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cpu" if INTERPRETED else "cuda"
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not INTERPRETED and not torch.cuda.is_available(), reason="needs a GPU, or TRITON_INTERPRET=1"),
]
SMALL = Tile(16, 32, 16, 4, 2)  # several tiles even of tiny weights
# tokens, rows, columns, entries: odd sizes, one entry, full, more than a block of tokens, one row, one column, one token
SHAPES = [
    (33, 17, 45, 60), (33, 17, 45, 1), (20, 9, 11, 99), (150, 5, 40, 30), (16, 1, 50, 50), (16, 70, 1, 20), (1, 8, 8, 9)
]  # fmt: skip


def drawn(seed: int, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE, dtype)


def index_set(shape: tuple[int, int], entries: int, seed: int = 0, wide: bool = False, dtype=torch.float32) -> IndexSet:
    """Random entries, more of them in the first rows, so that some rows are full and others empty."""
    rows, width = shape
    weight = torch.rand(rows, width, generator=torch.Generator().manual_seed(seed))
    flat = (weight / (1 + torch.arange(rows))[:, None]).view(-1).topk(entries).indices.sort().values
    starts = torch.searchsorted(flat, torch.arange(rows + 1) * width).int()
    columns = (flat % width).to(torch.int32 if wide else torch.int16)
    return IndexSet(starts.to(DEVICE), columns.to(DEVICE), torch.zeros(entries, dtype=dtype, device=DEVICE))


def rounded(values: Tensor, dtype: torch.dtype) -> Tensor:
    """`values` fp32 to the nearest in `dtype`, as a GPU rounds; Triton's interpreter cuts bits of bf16 off instead."""
    if INTERPRETED and dtype is torch.bfloat16:
        values = (values.view(torch.int32) & ~0xFFFF).view(torch.float32)
    return values.to(dtype)


def effective(base: Tensor, deltas: Tensor) -> Tensor:
    """The one rounding rule; see `rounded`."""
    values = rounded(base.float() + deltas.float(), base.dtype)
    assert INTERPRETED or torch.equal(values, effective_values(base, deltas))
    return values


def dense(left: Tensor, right: Tensor, to: IndexSet) -> Tensor:
    """[K] fp64: the recorded entries of the dense gradient."""
    product = left.double().t() @ right.double()
    return product.view(-1)[flat_indices(to.row_starts, to.columns, right.shape[1])]


def small_tiles(left: Tensor, right: Tensor, index_sets: list[IndexSet]) -> None:
    product_entries(left, right, index_sets, SMALL)


PATHS = [sampled_dots, small_tiles, picked_entries, plain_entries]


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("tokens, rows, width, entries", SHAPES)
def test_recorded_entries_are_those_of_the_dense_gradient(path, tokens, rows, width, entries) -> None:
    left, right = drawn(1, tokens, rows), drawn(2, tokens, width)
    to = index_set((rows, width), entries)
    path(left, right, [to])
    torch.testing.assert_close(to.out.double(), dense(left, right, to), rtol=1e-5, atol=1e-5 * tokens**0.5)


@pytest.mark.parametrize("path", [sampled_dots, small_tiles])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_factors_of_16_bits_are_summed_in_fp32(path, dtype) -> None:
    if INTERPRETED and path is small_tiles and dtype is torch.bfloat16:
        pytest.skip("Triton's interpreter multiplies the bits of bf16 matrices as integers")
    left, right = drawn(1, 100, 19, dtype=dtype), drawn(2, 100, 40, dtype=dtype)
    to = index_set((19, 40), 200)
    path(left, right, [to])
    torch.testing.assert_close(to.out.double(), dense(left, right, to), rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("path", PATHS)
def test_gradients_are_added_to_what_is_there_for_every_index_set(path) -> None:
    left, right = drawn(1, 24, 18), drawn(2, 24, 35)
    sets = [index_set((18, 35), entries, seed, wide=True) for seed, entries in enumerate((70, 5, 200))]
    for to in sets:
        to.out.fill_(3)
    path(left, right, sets)
    for to in sets:
        torch.testing.assert_close(to.out.double(), dense(left, right, to) + 3, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("path", [sampled_dots, small_tiles])
def test_gradients_of_bf16_are_rounded_once(path) -> None:
    left, right = drawn(1, 24, 18), drawn(2, 24, 35)
    narrow, exact = (index_set((18, 35), 50, dtype=dtype) for dtype in (torch.bfloat16, torch.float32))
    path(left, right, [narrow])
    path(left, right, [exact])
    of_torch = path is sampled_dots  # adds its fp32 sums to `out` by torch
    assert torch.equal(narrow.out, exact.out.bfloat16() if of_torch else rounded(exact.out, torch.bfloat16))


def test_picked_entries_have_the_bits_of_the_plain_path() -> None:
    left, right = drawn(1, 100, 19, dtype=torch.bfloat16), drawn(2, 100, 40, dtype=torch.bfloat16)
    picked, plain = index_set((19, 40), 200), index_set((19, 40), 200)
    for _ in range(2):
        picked_entries(left, right, [picked])
        plain_entries(left, right, [plain])
    assert torch.equal(picked.out, plain.out)


@pytest.mark.parametrize("path", [sampled_dots, small_tiles])
def test_the_same_call_gives_the_same_bits(path) -> None:
    left, right = drawn(1, 200, 20), drawn(2, 200, 35)
    once, again = index_set((20, 35), 300), index_set((20, 35), 300)
    path(left, right, [once])
    path(left, right, [again])
    assert torch.equal(once.out, again.out)


def test_columns_beyond_32767_are_not_negative() -> None:
    left, right = drawn(1, 4, 2), drawn(2, 4, 65536)
    flat = torch.tensor([0, 32767, 32768, 65535, 65536 + 40000])
    starts, columns = torch.tensor([0, 4, 5]).int(), (flat % 65536).to(torch.int16)
    wide_tile = Tile(16, 8192, 16, 4, 2) if INTERPRETED else None  # few programs: each takes the interpreter long
    for path in (sampled_dots, lambda *given: product_entries(*given, wide_tile)):
        to = IndexSet(starts.to(DEVICE), columns.to(DEVICE), torch.zeros(5, device=DEVICE))
        path(left, right, [to])
        torch.testing.assert_close(to.out.double(), dense(left, right, to), rtol=1e-5, atol=1e-5)


def test_pieces_of_the_tokens_add_up(monkeypatch) -> None:
    from scale_sft.kernels import sampled

    monkeypatch.setattr(sampled, "PIECE_BYTES", 1)
    left, right = drawn(1, 300, 6), drawn(2, 300, 9)
    to = index_set((6, 9), 20)
    sampled_dots(left, right, [to])
    torch.testing.assert_close(to.out.double(), dense(left, right, to), rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("path", [sampled_dots, small_tiles])
def test_factors_that_are_views_are_read_in_place(path) -> None:
    left, right = drawn(1, 12, 40)[:, 3:21], drawn(2, 35, 12).t()
    to = index_set((18, 35), 90)
    path(left, right, [to])
    torch.testing.assert_close(to.out.double(), dense(left, right, to), rtol=1e-5, atol=1e-4)


@pytest.mark.skipif(INTERPRETED, reason="large tiles take the interpreter too long")
@pytest.mark.parametrize("tile", TILES)
@pytest.mark.parametrize("shape", [(1000, 512, 640), (777, 1031, 300), (4096, 1024, 4096)])
def test_large_tiles_are_exact_too(tile, shape) -> None:
    tokens, rows, width = shape
    left, right = drawn(1, tokens, rows, dtype=torch.bfloat16), drawn(2, tokens, width, dtype=torch.bfloat16)
    sets = [index_set((rows, width), rows * width // part, part) for part in (20, 50)]
    product_entries(left, right, sets, tile)
    for to in sets:
        torch.testing.assert_close(to.out.double(), dense(left, right, to), rtol=1e-4, atol=2e-3)


# --- updates ------------------------------------------------------------------------------------------------------

SETTINGS = [((0.9, 0.999), 1e-8, 0.1), ((0.0, 0.95), 1e-6, 0.0)]
WEIGHT = (13, 30)


def adamw_tables(seen: list[int], learning_rate: float, betas: tuple[float, float]) -> tuple[Tensor, Tensor]:
    steps = [-learning_rate / (1 - betas[0] ** n) if n else 0.0 for n in seen]
    return torch.tensor(steps, device=DEVICE), torch.tensor([(1 - betas[1] ** n) ** 0.5 for n in seen], device=DEVICE)


def weight_and_base(to: IndexSet, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    weight = drawn(9, *WEIGHT, dtype=dtype)
    return weight, weight.view(-1)[flat_indices(to.row_starts, to.columns, WEIGHT[1])]


@pytest.mark.parametrize("betas, eps, decay", SETTINGS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("entries", [1, 150, 390])
def test_adamw_in_one_pass_is_the_plain_update_and_writes_the_weight(betas, eps, decay, dtype, entries) -> None:
    to = index_set(WEIGHT, entries)
    weight, base = weight_and_base(to, dtype)
    deltas, gradients, exp_avg = (drawn(seed, entries) for seed in (3, 4, 5))
    exp_avg_sq, scale = drawn(6, entries).square(), torch.tensor(0.37, device=DEVICE)
    cohort, seen = (torch.arange(entries, device=DEVICE) % 3).to(torch.uint8), [12, 3, 40]
    plain = [tensor.clone() for tensor in (deltas, exp_avg, exp_avg_sq)]
    adamw_update(
        plain[0], gradients * scale, plain[1], plain[2], cohort, seen,
        learning_rate=0.01, betas=betas, eps=eps, weight_decay=decay,
    )  # fmt: skip
    adamw_write(
        deltas, gradients, exp_avg, exp_avg_sq, cohort, *adamw_tables(seen, 0.01, betas),
        decay=1 - 0.01 * decay, betas=betas, eps=eps, row_starts=to.row_starts, columns=to.columns, width=WEIGHT[1],
        scale=scale, written=Written(weight, base),
    )  # fmt: skip
    for actual, expected in zip((deltas, exp_avg, exp_avg_sq), plain, strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-6, atol=3e-7)  # torch fuses some products with sums
    expected, _ = weight_and_base(to, dtype)
    expected.view(-1)[flat_indices(to.row_starts, to.columns, WEIGHT[1])] = effective(base, deltas)
    assert torch.equal(weight, expected)


@pytest.mark.parametrize("decay", [0.0, 0.1])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("entries", [1, 150, 390])
def test_sm3_in_one_pass_is_the_plain_update_and_writes_the_weight(decay, dtype, entries) -> None:
    to = index_set(WEIGHT, entries)
    weight, base = weight_and_base(to, dtype)
    deltas, gradients = drawn(3, entries), drawn(4, entries)
    row, col, scale = drawn(5, WEIGHT[0]).square(), drawn(6, WEIGHT[1]).square(), torch.tensor(0.6, device=DEVICE)
    flat = flat_indices(to.row_starts, to.columns, WEIGHT[1])
    plain = [tensor.clone() for tensor in (deltas, row, col)]
    sm3_update(plain[0], gradients * scale, flat, plain[1], plain[2], learning_rate=0.05, eps=1e-8, weight_decay=decay)
    sm3_write(
        deltas, gradients, row, col, learning_rate=0.05, decay=1 - 0.05 * decay, eps=1e-8, row_starts=to.row_starts,
        columns=to.columns, scale=scale, written=Written(weight, base),
    )  # fmt: skip
    for actual, expected in zip((deltas, row, col), plain, strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-6, atol=3e-7)  # torch fuses some products with sums
    expected, _ = weight_and_base(to, dtype)
    expected.view(-1)[flat] = effective(base, deltas)
    assert torch.equal(weight, expected)


def test_rows_longer_than_a_block_and_many_blocks_are_updated_whole() -> None:
    rows, width = 3, BLOCK + 90
    to = index_set((rows, width), 2 * BLOCK + 7, wide=True)
    flat = flat_indices(to.row_starts, to.columns, width)
    weight = drawn(9, rows, width)
    for update in ("adamw", "sm3"):
        deltas, base = drawn(3, flat.numel()), weight.view(-1)[flat]
        common = {"decay": 1.0, "eps": 1e-8, "row_starts": to.row_starts, "columns": to.columns}
        written = Written(weight, base)
        if update == "adamw":
            zeros, cohort = torch.zeros_like(deltas), torch.zeros(flat.numel(), dtype=torch.int16, device=DEVICE)
            tables = adamw_tables([1], 0.1, (0.9, 0.99))
            adamw_write(
                deltas, drawn(4, flat.numel()), zeros, zeros.clone(), cohort, *tables,
                betas=(0.9, 0.99), width=width, written=written, **common,
            )  # fmt: skip
        else:
            row, col = torch.zeros(rows, device=DEVICE), torch.zeros(width, device=DEVICE)
            gradients = drawn(4, flat.numel())
            sm3_write(deltas, gradients, row, col, learning_rate=0.1, written=written, **common)
            dense_square = torch.zeros(rows * width, device=DEVICE).index_put_((flat,), gradients**2).view(rows, width)
            assert torch.equal(row, dense_square.amax(1)) and torch.equal(col, dense_square.amax(0))
        assert torch.equal(weight.view(-1)[flat], base + deltas)


def one_step(update: str, to: IndexSet, deltas: Tensor, exp_avg: Tensor, written: Written | None) -> None:
    """One update of some state in place; `exp_avg` is used by AdamW alone."""
    gradients = drawn(4, deltas.numel())
    common = {"decay": 0.99, "eps": 1e-8, "row_starts": to.row_starts, "columns": to.columns, "written": written}
    if update == "sm3":
        sm3_write(deltas, gradients, drawn(5, 13).square(), drawn(6, 30).square(), learning_rate=0.01, **common)
        return
    exp_avg_sq = drawn(6, deltas.numel()).square()
    cohort, betas = torch.zeros(deltas.numel(), dtype=torch.uint8, device=DEVICE), (0.9, 0.99)
    tables = adamw_tables([4], 0.01, betas)
    adamw_write(deltas, gradients, exp_avg, exp_avg_sq, cohort, *tables, betas=betas, width=WEIGHT[1], **common)


@pytest.mark.parametrize("update", ["adamw", "sm3"])
def test_state_of_bf16_is_rounded_once_and_the_weight_gets_the_stored_delta(update) -> None:
    to, results = index_set(WEIGHT, 100), []
    _, base = weight_and_base(to, torch.bfloat16)
    for dtype in (torch.float32, torch.bfloat16):
        weight, _ = weight_and_base(to, torch.bfloat16)
        deltas, exp_avg = (drawn(seed, 100).bfloat16().to(dtype) for seed in (3, 5))
        one_step(update, to, deltas, exp_avg, Written(weight, base))
        results.append((deltas, exp_avg, weight))
    (exact, exact_avg, _), (moved, moved_avg, weight) = results
    assert torch.equal(moved, rounded(exact, torch.bfloat16))
    assert torch.equal(moved_avg, rounded(exact_avg, torch.bfloat16))
    flat = flat_indices(to.row_starts, to.columns, WEIGHT[1])
    assert torch.equal(weight.view(-1)[flat], effective(base, moved))


@pytest.mark.parametrize("update", ["adamw", "sm3"])
@pytest.mark.parametrize("start, stop", [(0, 390), (100, 200), (0, 7), (383, 390), (200, 200)])
def test_a_part_of_a_sharded_weight_is_written_and_all_entries_are_updated(update, start, stop) -> None:
    to, deltas, results = index_set(WEIGHT, 120), drawn(3, 120), []
    flat = flat_indices(to.row_starts, to.columns, WEIGHT[1])
    whole, base = weight_and_base(to, torch.float32)
    first, last = (int((flat < bound).sum()) for bound in (start, stop))
    part = whole.view(-1)[start:stop].clone()
    for written in (None, Written(whole, base), Written(part, base[first:last], start, first)):
        results.append(deltas.clone())
        one_step(update, to, results[-1], drawn(5, 120), written)
    assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])
    assert not torch.equal(results[0], deltas)
    assert torch.equal(part, whole.view(-1)[start:stop])
