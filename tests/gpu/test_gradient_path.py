"""On a GPU: the measured path is never slower than the plain one, right at real sizes, and waits for nothing."""

import statistics
from collections.abc import Callable

import pytest
import torch
from kernel_tools import INTERPRETED, no_waiting
from torch import Tensor

from scale_sft.kernels.autotune import GradientPath, _EventTimer, _spread_evenly
from scale_sft.spiel.indices import Entries
from scale_sft.spiel.recorder import dense_products

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(INTERPRETED or not torch.cuda.is_available(), reason="needs a GPU, and no interpreter"),
]
TOKENS = 4096
CASES = [  # rows, columns, counts of entries that are wanted at once
    (4096, 4096, [4096 * 4096 // 1000]),
    (4096, 4096, [4096 * 4096 // 50]),
    (11008, 4096, [11008 * 4096 // 50] * 2),
    (4096, 11008, [11008 * 4096 // 10]),
    (1000, 777, [1000 * 777 // 30]),
]


@pytest.fixture(scope="module")
def path() -> GradientPath:
    pytest.importorskip("triton", reason="Triton is not installed")
    return GradientPath("cuda")


def a_case(rows: int, width: int, counts: list[int]) -> tuple[Tensor, Tensor, list[tuple[Entries, Tensor]]]:
    generator = torch.Generator("cuda").manual_seed(7)
    left, right = (
        torch.randn(TOKENS, n, generator=generator, device="cuda", dtype=torch.bfloat16) for n in (rows, width)
    )
    spread = [_spread_evenly(rows, width, k, generator) for k in counts]
    return left, right, [(entries, torch.zeros(entries.count, device="cuda")) for entries in spread]


def seconds_of(*works: Callable[[], None]) -> list[float]:
    """Medians, alternating, so that a noisy machine is noisy for all."""
    timer, trials = _EventTimer(torch.device("cuda")), [[] for _ in works]
    for _ in range(25):
        for work, times in zip(works, trials, strict=True):
            times.append(timer(work))
    return [statistics.median(times[5:]) for times in trials]


@pytest.mark.parametrize(("rows", "width", "counts"), CASES)
def test_no_path_is_refused_and_the_chosen_one_is_never_slower_than_the_plain_one(path, rows, width, counts) -> None:
    measurement = path.measure(rows, width, TOKENS, counts, torch.bfloat16)
    print(rows, width, counts, measurement)
    assert not measurement.refused
    arguments = a_case(rows, width, counts)
    chosen, plain = seconds_of(lambda: path.products(*arguments), lambda: dense_products(*arguments))
    assert chosen <= 1.05 * plain, measurement


@pytest.mark.parametrize(("rows", "width", "counts"), CASES)
def test_every_path_is_exact_gives_the_same_bits_again_and_waits_for_nothing(path, rows, width, counts) -> None:
    left, right, wanted = a_case(rows, width, counts)
    product = (left.double().t() @ right.double()).view(-1)
    expected = [product[entries.flat().long()] for entries, _ in wanted]
    for name, entries_of in path.paths.items():
        entries_of(left, right, wanted)  # compiled before waiting is forbidden
        results = []
        for _ in range(2):
            for _, out in wanted:
                out.zero_()
            with no_waiting():
                entries_of(left, right, wanted)
            results.append([out.clone() for _, out in wanted])
        rounding = 2**-8 if name in ("plain", "picked") else 1e-4  # these round dW to bf16
        for once, again, exact in zip(*results, expected, strict=True):
            assert torch.equal(once, again), name
            torch.testing.assert_close(once.double(), exact, rtol=rounding, atol=1e-2, msg=name)


def test_fused_adamw_is_faster_than_the_plain_update_and_write() -> None:
    pytest.importorskip("triton", reason="Triton is not installed")
    from scale_sft.kernels.gpu.updates import Written, adamw_write
    from scale_sft.model.resident import effective_values, write_entries
    from scale_sft.spiel.optimizers import adamw_update

    rows, width, count = 4096, 11008, 4096 * 11008 // 50
    entries = _spread_evenly(rows, width, count, torch.Generator("cuda").manual_seed(0))
    weight = torch.randn(rows, width, device="cuda", dtype=torch.bfloat16)
    base = weight.view(-1)[entries.flat()]
    deltas, gradients, exp_avg = (torch.randn(count, device="cuda") for _ in range(3))
    exp_avg_sq, cohort = exp_avg.square(), torch.zeros(count, dtype=torch.uint8, device="cuda")
    tables = torch.tensor([-0.01], device="cuda"), torch.tensor([0.5], device="cuda")

    def plain() -> None:
        adamw_update(
            deltas, gradients, exp_avg, exp_avg_sq, cohort, [5, 5],
            learning_rate=1e-3, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.1,
        )  # fmt: skip
        write_entries(weight.view(-1), entries.flat(), effective_values(base, deltas))

    def fused() -> None:
        adamw_write(
            deltas, gradients, exp_avg, exp_avg_sq, cohort, *tables, decay=0.9999, betas=(0.9, 0.999), eps=1e-8,
            entries=entries, written=Written(weight, base),
        )  # fmt: skip

    fused()
    with no_waiting():
        fused()
    seconds = seconds_of(fused, plain)
    print(seconds)
    assert seconds[0] < seconds[1]
