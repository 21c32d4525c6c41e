"""On a GPU at real sizes: kernels have the bits of plain torch, are no slower, and wait for nothing."""

import statistics
from collections.abc import Callable

import pytest
import torch
from kernel_tools import INTERPRETED, no_waiting

from scale_sft.spiel.indices import Entries
from scale_sft.spiel.recorder import dense_products

pytest.importorskip("triton", reason="Triton is not installed")

from scale_sft.kernels.gpu.picked import picked_entries

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
FLUSH_BYTES = 256 << 20  # more than any second-level cache
LARGEST_SHARE = 1.05  # of the plain path's time


def spread_entries(rows: int, width: int, count: int) -> Entries:
    """`count` random entries of a weight, on the GPU."""
    generator = torch.Generator("cuda").manual_seed(0)
    chosen = torch.randperm(rows * width, generator=generator, device="cuda")[:count]
    return Entries(chosen.sort().values, (rows, width))


def seconds_of(*works: Callable[[], object]) -> list[float]:
    """Medians with a cold cache, alternating, so that a noisy machine is noisy for all."""
    flush, trials = torch.empty(FLUSH_BYTES, dtype=torch.uint8, device="cuda"), [[] for _ in works]
    for _ in range(25):
        for work, times in zip(works, trials, strict=True):
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            flush.zero_()
            start.record()
            work()
            end.record()
            end.synchronize()
            times.append(start.elapsed_time(end) / 1000)
    return [statistics.median(times[5:]) for times in trials]


@pytest.mark.parametrize(("rows", "width", "counts"), CASES)
def test_picking_has_the_plain_bits_is_no_slower_and_waits_for_nothing(rows, width, counts) -> None:
    left, right = (torch.randn(TOKENS, n, device="cuda", dtype=torch.bfloat16) for n in (rows, width))
    wanted = [(spread_entries(rows, width, count), torch.zeros(count, device="cuda")) for count in counts]
    results = []
    for path in (dense_products, picked_entries, picked_entries):
        for _, out in wanted:
            out.zero_()
        path(left, right, wanted)
        results.append([out.clone() for _, out in wanted])
    assert all(map(torch.equal, results[0], results[1])) and all(map(torch.equal, results[1], results[2]))
    with no_waiting():
        picked_entries(left, right, wanted)
    picked, plain = seconds_of(*(lambda p=path: p(left, right, wanted) for path in (picked_entries, dense_products)))
    print(rows, width, counts, picked, plain)
    assert picked <= LARGEST_SHARE * plain


def test_fused_adamw_is_faster_than_the_plain_update_and_write() -> None:
    from scale_sft.kernels.gpu.updates import Written, adamw_write
    from scale_sft.model.resident import effective_values, write_entries
    from scale_sft.spiel.optimizers import adamw_update

    rows, width, count = 4096, 11008, 4096 * 11008 // 50
    entries = spread_entries(rows, width, count)
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
