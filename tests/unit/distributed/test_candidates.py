"""Candidates of a gradient that no rank holds whole: the choice of one rank with the sum, and what it costs."""

import math

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from scale_sft.distributed import candidates
from scale_sft.distributed.agreement import Ranks
from scale_sft.distributed.candidates import proposal_cost, select_candidates
from scale_sft.planning.meta_trace import LiveBytes
from scale_sft.spiel.topk import largest_magnitudes
from tests.candidate_cases import KINDS, gathered_candidates, summands
from tests.thread_ranks import ThreadRanks, on_threads


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("world", "dtype"), [(2, torch.bfloat16), (3, torch.float32), (8, torch.bfloat16)])
def test_the_choice_is_that_of_one_rank_with_the_sum_and_of_ranks_that_gather_all(world, kind, dtype, monkeypatch):
    for n, count, piece in [
        (1, 1, 4), (world - 1, 1, 64), (world + 1, world, 5), (1000, 7, 10**6), (1000, 1, 64), (1001, 900, 50),
        (997, 997, 130), (640, 200, 64), (513, 0, 64),
    ]:  # fmt: skip
        monkeypatch.setattr(candidates, "PROPOSAL_ENTRIES", piece)
        monkeypatch.setattr(candidates, "_CHUNK_ENTRIES", max(2, piece // 3))
        parts = summands(kind, world, n, dtype)

        def both(ranks: Ranks, parts=parts, count=count, piece=piece) -> list[Tensor]:
            mine = parts[ranks.rank]
            return [select_candidates(ranks, mine, count), gathered_candidates(ranks, mine, count, piece)]

        total = parts.float().sum(0)
        expected = largest_magnitudes(total, count)
        for rank, (chosen, gathered) in enumerate(on_threads(world, both)):
            assert chosen.dtype == torch.int64
            assert torch.equal(chosen, expected), (rank, n, count)
            assert torch.equal(chosen, gathered if total.any() else gathered[:0]), (rank, n, count)


@pytest.mark.parametrize("count", [-1, 11])
def test_a_number_of_candidates_that_is_no_part_of_the_gradient_is_refused(count) -> None:
    with pytest.raises(ValueError, match=f"got {count}"):
        on_threads(2, lambda ranks: select_candidates(ranks, torch.ones(10), count))


class Waits(TorchDispatchMode):
    """Counts operations for which the host waits for a device."""

    WAITING = ("nonzero", "_local_scalar_dense", "masked_select", "unique", "is_nonzero", "equal")

    def __init__(self):
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        indexed = func.overloadpacket.__name__.startswith("index") and any(
            isinstance(index, Tensor) and index.dtype == torch.bool
            for listed in args if isinstance(listed, (list, tuple)) for index in listed
        )  # fmt: skip
        if indexed or func.overloadpacket.__name__ in self.WAITING:
            self.seen.append(str(func))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("kind", ["spread", "all equal", "in one part"])
@pytest.mark.parametrize("world", [2, 8, 64])
def test_a_choice_costs_what_is_planned_for_it(world: int, kind: str, monkeypatch) -> None:
    """Memory at most 16 bytes for each entry of a part and each candidate, besides one piece, and one wait."""
    n, count, piece = 600_001, 12_000, 1 << 18
    monkeypatch.setattr(candidates, "PROPOSAL_ENTRIES", piece)
    monkeypatch.setattr(candidates, "_CHUNK_ENTRIES", 1 << 16)
    parts = [summands(kind, 1, n, torch.bfloat16)[0]] * world

    def measured(ranks: ThreadRanks) -> tuple[int, int, int, list[str]]:
        given = nn.Module()
        given.register_buffer("gradient", parts[ranks.rank])
        with LiveBytes(given) as live:
            select_candidates(ranks, parts[ranks.rank], count)
        with Waits() as waits:
            select_candidates(ranks, parts[ranks.rank], count)
        return live.peak, ranks.calls // 2, ranks.traffic_bytes["proposal"] // 2, waits.seen

    planned = proposal_cost(n, count, world)
    histograms = 64 * 2**11 + 24 * 513 * world
    for peak, calls, payload, waits in on_threads(world, measured):
        assert waits == ["aten.nonzero.default"]
        assert (calls, payload) == (planned.calls, planned.payload)
        assert 0.8 * planned.temporaries < peak <= planned.temporaries
        assert peak <= 16 * (math.ceil(n / world) + count) + 4 * piece + histograms


def test_the_largest_llama_takes_few_collectives_and_little_more_than_one_reduce_scatter() -> None:
    """70B: 1 % of the seven weights of each of 80 blocks, over 64 ranks. The figures of docs/plan.md."""
    wide, narrow, long, blocks, world = 8192 * 8192, 8192 * 1024, 8192 * 28672, 80, 64
    sizes = [wide, wide, narrow, narrow, long, long, long] * blocks
    costs = [proposal_cost(n, n // 100, world) for n in sizes]
    assert sum(cost.calls for cost in costs) == 16 * blocks + 4 * len(sizes) == 3520  # reduce-scatters, small ones
    reduce_scatter, candidates_ring = 4 * sum(sizes) * 63 / 64, 8 * sum(n // 100 for n in sizes)
    histograms = len(sizes) * (2 * 2 * 4 * 2**11 + 63 * 4 * 513)
    assert reduce_scatter < sum(cost.sent(world) for cost in costs) < reduce_scatter + candidates_ring + histograms
    assert max(cost.temporaries for cost in costs) < 272 * 2**20
