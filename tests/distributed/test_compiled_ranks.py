"""Option compile on two ranks whose batches need different graphs: the same run as without it, bit for bit."""

import pytest

from tests.faults.comparing import losses, reallocations

from . import worker
from .conftest import COMMON

pytestmark = [pytest.mark.distributed, pytest.mark.timeout(600)]


def test_compiled_blocks_change_no_bit_of_a_run_on_two_ranks(on_ranks, tmp_path):
    """Micro-batches of two: some have padding and a mask, on one rank or on both, and others have none."""
    options = COMMON | {"base_placement": "replicate", "steps": 6, "micro_batch_size": 2}
    plan = [options | {"output_dir": str(tmp_path / choice), "compile": choice} for choice in ("off", "blocks")]
    statuses, text = on_ranks(2, False, worker.run_all_with_their_own_operations, plan, False)
    assert statuses == [0, 0], text[-9000:]
    plain, compiled = (tmp_path / choice for choice in ("off", "blocks"))
    assert losses(plain) == losses(compiled) and reallocations(plain) == reallocations(compiled) != []
    name = "adapter/adapter_model.safetensors"
    assert (plain / name).read_bytes() == (compiled / name).read_bytes()
