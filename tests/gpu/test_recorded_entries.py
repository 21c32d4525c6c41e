"""Recorded entries of a weight gradient, by kernels, against the dense gradient.

On a GPU, or in Triton's interpreter on a CPU: `tests/unit/kernels/test_kernels.py` runs this folder there, in a process of its
own, because TRITON_INTERPRET has to be set before anything imports Triton.
"""

import pytest
import torch
from kernel_tools import DEVICE, INTERPRETED, drawn, marks, rounded, some_entries
from torch import Tensor

pytest.importorskip("triton", reason="Triton is not installed")

from scale_sft.kernels.gpu.picked import picked_entries
from scale_sft.kernels.gpu.sampled import sampled_dots
from scale_sft.kernels.gpu.tiled import TILES, Tile, product_entries
from scale_sft.spiel.indices import Entries
from scale_sft.spiel.recorder import dense_products

pytestmark = marks
SMALL = Tile(16, 32, 16, 4, 2)  # several tiles even of tiny weights
# tokens, rows, columns, entries: odd sizes, one entry, full, many tokens, one row, one column, one token
SHAPES = [
    (33, 17, 45, 60), (33, 17, 45, 1), (20, 9, 11, 99), (150, 5, 40, 30), (16, 1, 50, 50), (16, 70, 1, 20), (1, 8, 8, 9)
]  # fmt: skip


def zeros(entries: Entries, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.zeros(entries.count, dtype=dtype, device=DEVICE)


def gradient_by(path, left: Tensor, right: Tensor, entries: Entries, dtype: torch.dtype = torch.float32) -> Tensor:
    """[K]: what a path adds to zeros."""
    out = zeros(entries, dtype)
    path(left, right, [(entries, out)])
    return out


def dense(left: Tensor, right: Tensor, entries: Entries) -> Tensor:
    """[K] fp64: the recorded entries of the dense gradient."""
    return (left.double().t() @ right.double()).view(-1)[entries.flat().long()]


def small_tiles(left: Tensor, right: Tensor, wanted: list[tuple[Entries, Tensor]]) -> None:
    product_entries(left, right, wanted, SMALL)


PATHS = [sampled_dots, small_tiles, picked_entries]


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize(("tokens", "rows", "width", "count"), SHAPES)
def test_recorded_entries_are_those_of_the_dense_gradient(path, tokens, rows, width, count) -> None:
    left, right, entries = drawn(1, tokens, rows), drawn(2, tokens, width), some_entries((rows, width), count)
    out = gradient_by(path, left, right, entries)
    torch.testing.assert_close(out.double(), dense(left, right, entries), rtol=1e-5, atol=1e-5 * tokens**0.5)


@pytest.mark.parametrize("path", [sampled_dots, small_tiles])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_factors_of_16_bits_are_summed_in_fp32(path, dtype) -> None:
    if INTERPRETED and path is small_tiles and dtype is torch.bfloat16:
        pytest.skip("Triton's interpreter multiplies the bits of bf16 matrices as integers")
    left, right = drawn(1, 100, 19, dtype=dtype), drawn(2, 100, 40, dtype=dtype)
    entries = some_entries((19, 40), 200)
    out = gradient_by(path, left, right, entries)
    torch.testing.assert_close(out.double(), dense(left, right, entries), rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("path", PATHS)
def test_gradients_are_added_to_what_is_there_for_all_that_is_wanted(path) -> None:
    left, right = drawn(1, 24, 18), drawn(2, 24, 35)
    wanted = [(entries, zeros(entries) + 3) for entries in (some_entries((18, 35), n, n) for n in (70, 5, 200))]
    path(left, right, wanted)
    for entries, out in wanted:
        torch.testing.assert_close(out.double(), dense(left, right, entries) + 3, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("path", [sampled_dots, small_tiles])
def test_gradients_of_bf16_are_rounded_once(path) -> None:
    left, right, entries = drawn(1, 24, 18), drawn(2, 24, 35), some_entries((18, 35), 50)
    exact, narrow = (gradient_by(path, left, right, entries, dtype) for dtype in (torch.float32, torch.bfloat16))
    of_torch = path is sampled_dots  # adds its fp32 sums to `out` by torch
    assert torch.equal(narrow, exact.bfloat16() if of_torch else rounded(exact, torch.bfloat16))


def test_picked_entries_have_the_bits_of_the_plain_path() -> None:
    left, right = drawn(1, 100, 19, dtype=torch.bfloat16), drawn(2, 100, 40, dtype=torch.bfloat16)
    entries = some_entries((19, 40), 200)
    assert torch.equal(*(gradient_by(path, left, right, entries) for path in (picked_entries, dense_products)))


@pytest.mark.parametrize("path", [sampled_dots, small_tiles])
def test_the_same_call_gives_the_same_bits(path) -> None:
    left, right, entries = drawn(1, 200, 20), drawn(2, 200, 35), some_entries((20, 35), 300)
    assert torch.equal(*(gradient_by(path, left, right, entries) for _ in range(2)))


@pytest.mark.parametrize("width", [65536, 70000])
def test_columns_of_wide_weights_are_found(width: int) -> None:
    left, right = drawn(1, 4, 2), drawn(2, 4, width)
    flat = torch.tensor([0, 1, 32767, 32768, 65535, width + 40000, 2 * width - 1])
    wide_tile = Tile(16, 8192, 16, 4, 2) if INTERPRETED else None  # few programs: each takes the interpreter long
    for path in (sampled_dots, lambda *given: product_entries(*given, wide_tile)):
        entries = Entries(flat.to(DEVICE), (2, width))
        out = gradient_by(path, left, right, entries)
        torch.testing.assert_close(out.double(), dense(left, right, entries), rtol=1e-5, atol=1e-5)


def test_pieces_of_the_tokens_add_up(monkeypatch) -> None:
    from scale_sft.kernels.gpu import sampled

    monkeypatch.setattr(sampled, "PIECE_BYTES", 1)
    left, right, entries = drawn(1, 300, 6), drawn(2, 300, 9), some_entries((6, 9), 20)
    out = gradient_by(sampled_dots, left, right, entries)
    torch.testing.assert_close(out.double(), dense(left, right, entries), rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("path", [sampled_dots, small_tiles])
def test_factors_that_are_views_are_read_as_they_are(path) -> None:
    left, right, entries = drawn(1, 12, 40)[:, 3:21], drawn(2, 35, 12).t(), some_entries((18, 35), 90)
    out = gradient_by(path, left, right, entries)
    torch.testing.assert_close(out.double(), dense(left, right, entries), rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("path", PATHS)
def test_factors_of_another_weight_are_refused(path) -> None:
    entries = some_entries((18, 35), 90)
    with pytest.raises(ValueError, match="entries of a weight"):
        gradient_by(path, drawn(1, 12, 18), drawn(2, 12, 36), entries)
    with pytest.raises(ValueError, match="of one dtype"):
        gradient_by(path, drawn(1, 12, 18), drawn(2, 12, 35, dtype=torch.float16), entries)


@pytest.mark.skipif(INTERPRETED, reason="large tiles take the interpreter too long")
@pytest.mark.parametrize("tile", TILES)
@pytest.mark.parametrize("shape", [(1000, 512, 640), (777, 1031, 300), (4096, 1024, 4096)])
def test_large_tiles_are_exact_too(tile, shape) -> None:
    tokens, rows, width = shape
    left, right = drawn(1, tokens, rows, dtype=torch.bfloat16), drawn(2, tokens, width, dtype=torch.bfloat16)
    both = [some_entries((rows, width), rows * width // part, part) for part in (20, 50)]
    wanted = [(entries, zeros(entries)) for entries in both]
    product_entries(left, right, wanted, tile)
    for entries, out in wanted:
        torch.testing.assert_close(out.double(), dense(left, right, entries), rtol=1e-4, atol=2e-3)
