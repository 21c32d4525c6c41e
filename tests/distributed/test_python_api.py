"""A plain loop on two ranks: the same deltas on both, and those of one process with the whole batch."""

import pytest
import torch

from . import worker

pytestmark = [pytest.mark.distributed, pytest.mark.timeout(600)]


@pytest.mark.parametrize("method", ["ag", "ma"])
def test_a_plain_loop_on_two_ranks_is_that_of_one(on_ranks, tmp_path, method) -> None:
    for ranks in (1, 2):
        statuses, text = on_ranks(ranks, False, worker.plain_loop, method, str(tmp_path))
        assert statuses == [0] * ranks, text
    alone, first, second = (torch.load(tmp_path / f"{name}.pt") for name in ("0of1", "0of2", "1of2"))
    for name, deltas in first["deltas"].items():
        assert torch.equal(deltas, second["deltas"][name])
        assert torch.equal(first["indices"][name], second["indices"][name])
        assert torch.equal(first["indices"][name], alone["indices"][name])
        torch.testing.assert_close(deltas, alone["deltas"][name], rtol=0, atol=1e-4)
    assert first["saved"] == second["saved"]


@pytest.mark.parametrize("late", [False, True], ids=["attached after", "attached before"])
@pytest.mark.parametrize("library", ["torch", "accelerate", "trainer"])
def test_two_ranks_of_other_libraries_train_together_whenever_they_meet(on_ranks, tmp_path, library, late) -> None:
    for ranks in (1, 2):
        statuses, text = on_ranks(ranks, False, worker.under_library, library, late, str(tmp_path))
        assert statuses == [0] * ranks, text
    alone, first, second = (torch.load(tmp_path / f"{name}.pt") for name in ("0of1", "0of2", "1of2"))
    for name, deltas in first["deltas"].items():
        assert torch.equal(deltas, second["deltas"][name])
        assert torch.equal(first["indices"][name], second["indices"][name])
        assert torch.equal(first["indices"][name], alone["indices"][name])
        torch.testing.assert_close(deltas, alone["deltas"][name], rtol=0, atol=1e-4)
