"""A SpIEL adapter of PEFT under DistributedDataParallel: the same entries on both ranks, and those of one process."""

import importlib.util

import pytest

from . import worker

pytestmark = [pytest.mark.distributed, pytest.mark.timeout(600)]


@pytest.mark.skipif(importlib.util.find_spec("trl") is None, reason="needs trl")
def test_two_ranks_under_a_trainer_are_one_process(one_and_two_ranks) -> None:
    first, _ = one_and_two_ranks(worker.under_peft)
    assert first["reallocations"] == [3, 6]


def test_shards_of_fsdp2_are_refused_with_the_way_that_works(on_ranks, tmp_path) -> None:
    statuses, text = on_ranks(2, False, worker.peft_in_shards, str(tmp_path))
    assert statuses == [0, 0], text
    for rank in range(2):
        said = (tmp_path / f"{rank}.txt").read_text()
        assert "in shards (FSDP or DeepSpeed ZeRO-3)" in said and "`scale-sft train`" in said
