"""Recorded entries of a weight gradient, by the kernel, against the dense gradient.

On a GPU, or in Triton's interpreter on a CPU: `tests/unit/kernels/test_kernels.py` runs this folder there, in a process
of its own, because TRITON_INTERPRET has to be set before anything imports Triton.
"""

import pytest
import torch
from kernel_tools import DEVICE, INTERPRETED, drawn, marks, some_entries
from torch import Tensor

pytest.importorskip("triton", reason="Triton is not installed")

from scale_sft.kernels.gpu.picked import picked_entries
from scale_sft.spiel.indices import Entries
from scale_sft.spiel.recorder import dense_products

pytestmark = marks
# tokens, rows, columns, entries: odd sizes, one entry, full, many tokens, one row, one column, one token, wide
SHAPES = [
    (33, 17, 45, 60), (33, 17, 45, 1), (20, 9, 11, 99), (150, 5, 40, 30), (16, 1, 50, 50), (16, 70, 1, 20),
    (1, 8, 8, 9), (4, 2, 65536, 300), (4, 2, 70000, 300),
]  # fmt: skip
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def gradients(path, left: Tensor, right: Tensor, wanted: list[Entries], dtype: torch.dtype = torch.float32):
    """What a path adds to threes: one [K] for each."""
    outs = [torch.full((entries.count,), 3.0, dtype=dtype, device=DEVICE) for entries in wanted]
    path(left, right, list(zip(wanted, outs, strict=True)))
    return outs


@pytest.mark.parametrize(("tokens", "rows", "width", "count"), SHAPES)
def test_picked_entries_are_those_of_the_exact_gradient(tokens, rows, width, count) -> None:
    left, right, entries = drawn(1, tokens, rows), drawn(2, tokens, width), some_entries((rows, width), count)
    (out,) = gradients(picked_entries, left, right, [entries])
    exact = (left.double().t() @ right.double()).view(-1)[entries.flat().long()] + 3
    torch.testing.assert_close(out.double(), exact, rtol=1e-5, atol=1e-5 * (1 + tokens**0.5))


@pytest.mark.parametrize("of_gradients", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("dtype", DTYPES)
def test_picked_entries_have_the_bits_of_the_plain_path_for_all_that_is_wanted(dtype, of_gradients) -> None:
    if INTERPRETED and of_gradients is torch.bfloat16:
        pytest.skip("Triton's interpreter cuts bits of bf16 off")
    left, right = drawn(1, 100, 19, dtype=dtype), drawn(2, 100, 40, dtype=dtype)
    wanted = [some_entries((19, 40), count, count) for count in (200, 5, 70)]
    found = [gradients(path, left, right, wanted, of_gradients) for path in (picked_entries, dense_products)]
    assert all(map(torch.equal, *found))


def test_factors_that_are_views_are_read_as_they_are() -> None:
    left, right, entries = drawn(1, 12, 40)[:, 3:21], drawn(2, 35, 12).t(), some_entries((18, 35), 90)
    assert all(
        map(torch.equal, *(gradients(path, left, right, [entries]) for path in (picked_entries, dense_products)))
    )


def test_factors_of_another_weight_are_refused() -> None:
    entries = some_entries((18, 35), 90)
    with pytest.raises(ValueError, match="entries of a weight"):
        gradients(picked_entries, drawn(1, 12, 18), drawn(2, 12, 36), [entries])
    with pytest.raises(ValueError, match="of one dtype"):
        gradients(picked_entries, drawn(1, 12, 18), drawn(2, 12, 35, dtype=torch.float16), [entries])


def test_kernels_can_be_used_here_and_are() -> None:
    if INTERPRETED:
        pytest.skip("needs a GPU")
    from scale_sft.kernels import backends

    assert backends.why_plain(torch.device("cuda"), "auto") is None
    assert backends.products_of(torch.device("cuda"), "auto") is picked_entries
