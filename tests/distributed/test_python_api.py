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
    shared = torch.cat([torch.isin(alone["indices"][n], first["indices"][n]) for n in first["indices"]])
    assert shared.float().mean() > 0.999
    for name, indices in alone["indices"].items():
        same = torch.isin(indices, first["indices"][name])
        here = first["deltas"][name][torch.isin(first["indices"][name], indices)]
        torch.testing.assert_close(here, alone["deltas"][name][same], rtol=1e-2, atol=1e-4)
    assert first["saved"] == second["saved"]
