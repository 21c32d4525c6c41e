"""What the tests of evaluation share."""

from collections.abc import Iterator

import pytest
import torch

from scale_sft.distributed.cluster import Cluster


@pytest.fixture
def cluster() -> Iterator[Cluster]:
    """This process alone, in float32."""
    started = Cluster.start(sharded=False, dtype=torch.float32)
    yield started
    started.close()
