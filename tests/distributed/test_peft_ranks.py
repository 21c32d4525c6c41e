"""A SpIEL adapter of PEFT under DistributedDataParallel: the same entries on both ranks, and those of one process."""

import importlib.util

import pytest
import torch

from . import worker

pytestmark = [pytest.mark.distributed, pytest.mark.timeout(600)]


@pytest.mark.parametrize("library", ["trainer", "sft"])
def test_two_ranks_under_a_trainer_are_one_process(on_ranks, tmp_path, library) -> None:
    if library == "sft" and importlib.util.find_spec("trl") is None:
        pytest.skip("needs trl")
    for ranks in (1, 2):
        statuses, text = on_ranks(ranks, False, worker.under_peft, library, str(tmp_path))
        assert statuses == [0] * ranks, text
    alone, first, second = (torch.load(tmp_path / f"{name}.pt") for name in ("0of1", "0of2", "1of2"))
    assert first["reallocations"] == [3, 6]
    for name, deltas in first["deltas"].items():
        assert torch.equal(deltas, second["deltas"][name])
        assert torch.equal(first["indices"][name], second["indices"][name])
        assert torch.equal(first["indices"][name], alone["indices"][name])
        torch.testing.assert_close(deltas, alone["deltas"][name], rtol=0, atol=1e-4)
