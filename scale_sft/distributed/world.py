"""The launcher's word, before any process group exists: how many processes there are, and which one this is."""

from __future__ import annotations

import os
import random
import socket
from contextlib import suppress
from dataclasses import dataclass

import torch

from scale_sft.errors import UserError


@dataclass(frozen=True)
class World:
    """The processes that the launcher says it has started, and this one's place among them."""

    rank: int
    size: int
    local_rank: int
    local_size: int

    @classmethod
    def from_environment(cls) -> World:
        """Read what `accelerate launch` (torchrun) or DeepSpeed's launcher sets; one process where nothing is set."""
        local_size = _read("LOCAL_WORLD_SIZE", _read("LOCAL_SIZE", 1))  # the latter: DeepSpeed's launcher
        return cls(_read("RANK", 0), _read("WORLD_SIZE", 1), _read("LOCAL_RANK", 0), local_size)

    def device(self) -> torch.device:
        """Return the GPU of this process, or the CPU."""
        return torch.device("cuda", self.local_rank) if torch.cuda.is_available() else torch.device("cpu")

    def device_memory_bytes(self) -> int:
        """Return the memory of this process's GPU, or its share of the machine's.

        All of it, not what happens to be free: every rank must decide the same from it.
        """
        if torch.cuda.is_available():
            return torch.cuda.get_device_properties(self.local_rank).total_memory
        import psutil

        return psutil.virtual_memory().total // self.local_size


def environments_of(count: int) -> list[dict[str, str]]:
    """Return what a launcher would tell each of `count` processes on this machine."""
    common = {"WORLD_SIZE": count, "LOCAL_WORLD_SIZE": count, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": _free_port()}
    each = [common | {"RANK": rank, "LOCAL_RANK": rank} for rank in range(count)]
    return [{name: str(value) for name, value in names.items()} for names in each]


def _free_port() -> int:
    """Find a port for rank 0, below those that systems hand out: no connection takes it before that rank listens."""
    while True:
        port = random.SystemRandom().randrange(20_000, 32_000)
        with socket.socket() as found, suppress(OSError):
            found.bind(("127.0.0.1", port))
            return port


def _read(name: str, default: int) -> int:
    """Return a whole number from the environment."""
    return int(os.environ.get(name, default))


def refuse_lonely_launchers() -> None:
    """Refuse a launcher that started fewer processes than it was asked for: each would train alone without a word.

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
            "world: accelerate was asked for several processes or machines, but started this process alone (as it "
            "does with --cpu). Launch with one of launch/*.yaml; for a run of one process unset MASTER_ADDR"
        )
    nodes = int(os.environ.get("SLURM_STEP_NUM_NODES", 1))
    spanned = -(-world.size // max(1, world.local_size))
    if spanned < nodes:
        raise UserError(
            f"world: this job step runs on {nodes} nodes, but the launcher's world spans {spanned}: each node would "
            "train alone. Give accelerate launch --num_machines, --machine_rank and --main_process_ip, and with "
            "DeepSpeed --deepspeed_multinode_launcher standard, as launch/slurm_multinode.sbatch does"
        )
