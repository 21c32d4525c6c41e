"""The ranks of a process group that the caller has started: for the Python API under somebody else's launcher."""

from __future__ import annotations

import torch

from .cluster import Cluster
from .sharding import Replicated


def existing_ranks(device: torch.device) -> Cluster | None:
    """Join the ranks of this process's group, each with the whole base; returns None if there is only one.

    Args:
        device: of this rank's model.
    """
    if not torch.distributed.is_available() or not torch.distributed.is_initialized():
        return None
    rank, size = torch.distributed.get_rank(), torch.distributed.get_world_size()
    if size == 1:
        return None
    return Cluster(rank=rank, size=size, device=device, accelerator=None, sharding=Replicated(device))
