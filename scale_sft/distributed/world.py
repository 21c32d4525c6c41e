"""What the launcher says, before any process group exists."""

from __future__ import annotations

import os
from dataclasses import dataclass

import torch

from scale_sft.errors import UserError


@dataclass(frozen=True)
class World:
    """What the launcher says, before any process group exists."""

    rank: int
    size: int
    local_rank: int
    local_size: int

    @classmethod
    def from_environment(cls) -> World:
        """As `accelerate launch` (torchrun) or DeepSpeed's launcher sets it; one process where nothing is set."""
        read = lambda name, default: int(os.environ.get(name, default))
        local_size = read("LOCAL_WORLD_SIZE", read("LOCAL_SIZE", 1))  # the latter: DeepSpeed's launcher
        return cls(read("RANK", 0), read("WORLD_SIZE", 1), read("LOCAL_RANK", 0), local_size)

    def device(self) -> torch.device:
        """The GPU of this process, or the CPU."""
        return torch.device("cuda", self.local_rank) if torch.cuda.is_available() else torch.device("cpu")

    def device_memory_bytes(self) -> int:
        """Memory of this process's GPU, or its share of the machine's.

        All of it, not what happens to be free: what is decided from it must come out alike on every rank.
        """
        if torch.cuda.is_available():
            return torch.cuda.get_device_properties(self.local_rank).total_memory
        import psutil

        return psutil.virtual_memory().total // self.local_size


def refuse_lonely_launchers() -> None:
    """Refuse a launcher that starts less than it was asked for, so that each part would train alone without a word.

    Raises:
        UserError: Accelerate left several machines to DeepSpeed's own launcher, which found one; or was asked for
            several processes and started one; or Slurm started this step on more nodes than the launcher's world has.
    """
    world = World.from_environment()
    by_accelerate = "ACCELERATE_MIXED_PRECISION" in os.environ
    if by_accelerate and os.environ.get("CROSS_SIZE") == "1":  # set by DeepSpeed's launcher: its number of machines
        raise UserError(
            "world: accelerate was asked for several machines and left them to DeepSpeed's own launcher (pdsh), which "
            "found only this one: each machine would train alone. Add --deepspeed_multinode_launcher standard"
        )
    if by_accelerate and "MASTER_ADDR" in os.environ and "WORLD_SIZE" not in os.environ:
        raise UserError(
            "world: accelerate was asked for several processes or machines, but started this process alone (so it does "
            "with --cpu). Launch with one of launch/*.yaml; for a run of one process unset MASTER_ADDR"
        )
    nodes = int(os.environ.get("SLURM_STEP_NUM_NODES", 1))
    spanned = -(-world.size // max(1, world.local_size))
    if spanned < nodes:
        raise UserError(
            f"world: this job step runs on {nodes} nodes, but the launcher's world spans {spanned}: each node would "
            "train alone. Give accelerate launch --num_machines, --machine_rank and --main_process_ip, and with "
            "DeepSpeed --deepspeed_multinode_launcher standard, as launch/slurm_multinode.sbatch does"
        )
