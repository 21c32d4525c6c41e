"""A plain loop on two ranks: the same deltas on both, and those of one process with the whole batch."""

import pytest

from . import worker

pytestmark = [pytest.mark.distributed, pytest.mark.timeout(600)]


@pytest.mark.parametrize("method", ["ag", "ma"])
def test_a_plain_loop_on_two_ranks_is_that_of_one(one_and_two_ranks, method) -> None:
    first, second = one_and_two_ranks(worker.plain_loop, method)
    assert first["saved"] == second["saved"]


@pytest.mark.parametrize("late", [False, True], ids=["attached after", "attached before"])
@pytest.mark.parametrize("library", ["torch", "accelerate", "trainer"])
def test_two_ranks_of_other_libraries_train_together_whenever_they_meet(one_and_two_ranks, library, late) -> None:
    one_and_two_ranks(worker.under_library, library, late)
