"""The ranks of one run: joined, watched, asked to stop, and left together."""

from __future__ import annotations

import os
import re
import socket
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from types import TracebackType
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from scale_sft.errors import UserError
from scale_sft.model.fingerprints import fingerprints_of
from scale_sft.model.resident import WeightPart

from .agreement import Ranks
from .candidates import join_parts, range_of_rank, select_candidates, select_largest, sum_own_part
from .heartbeat import Heartbeat, end_stalled
from .sharding import Fingerprints, Replicated, Sharding, ZeroShards, deepspeed_plugin, forget_launchers_deepspeed
from .signals import Interrupted, Interruption
from .tracking import Log, open_tracker, refuse_unknown_tracker
from .world import World

_GRACE_SECONDS = 60
"""A collective's own time-out comes this much later than the heartbeat's, which knows whom to name."""


@dataclass(kw_only=True)
class Cluster(Ranks):
    """The ranks of a run, with the base that they hold. Made by `start`; `close` must be called at the end."""

    joined: ClassVar[bool] = False
    """Whether this process has joined a process group, if only one of its own."""

    accelerator: Any
    sharding: Sharding
    interruption: Interruption = field(default_factory=Interruption)
    stopping: bool = field(default=False, init=False)
    """Whether all ranks know that a signal has reached one of them."""

    @classmethod
    def start(
        cls,
        *,
        sharded: bool,
        dtype: torch.dtype,
        ds_config: str | None = None,
        tracker: str | None = None,
        logging_dir: Path | None = None,
        timeout_seconds: float = 1800,
        interruption: Interruption | None = None,
    ) -> Cluster:
        """Join the process group that the launcher describes.

        Args:
            sharded: cut the base into ZeRO-3 shards.
            dtype: of the base and of the computation.
            ds_config: DeepSpeed's configuration; default: the launcher's, or the one that ships.
            tracker: experiment tracker, by Accelerate's name for it.
            logging_dir: where a tracker that writes files writes them.
            timeout_seconds: how long other ranks wait for one that makes no progress before they end with an error.
            interruption: receives the signals that ask the run to stop.

        Raises:
            UserError: the ranks are not those that the launcher started, the base cannot be sharded here, or the
                tracker is unknown or not installed.
        """
        refuse_unknown_tracker(tracker)
        timeout = timedelta(seconds=timeout_seconds + _GRACE_SECONDS)
        accelerator = _accelerator(sharded, dtype, ds_config, timeout, log_with=tracker, project_dir=logging_dir)
        rank, device = accelerator.process_index, accelerator.device
        cluster = cls(
            rank=rank,
            size=accelerator.num_processes,
            device=device,
            accelerator=accelerator,
            sharding=ZeroShards(accelerator, rank, device) if sharded else Replicated(device),
            interruption=interruption or Interruption(),
        )
        cls.joined |= torch.distributed.is_initialized()
        if cluster.size > 1:
            store = torch.distributed.PrefixStore("heartbeat", _own_store())
            heartbeat = Heartbeat(store, rank, cluster.size, timeout_seconds)
            accelerator.wait_for_everyone()
            heartbeat.start()
            cluster.heartbeat = heartbeat
        return cluster

    def __enter__(self) -> Cluster:
        return self

    def __exit__(self, kind: Any, error: BaseException | None, trace: TracebackType | None) -> None:
        """Leave the process group. After a collective has failed, say which rank is to blame, and end the process."""
        if error is not None and self.heartbeat and _connection_lost(error):
            with self.interruption.deferred():  # the launcher ends this process too: say why before it does
                end_stalled(f"{self.heartbeat.verdict()}; noticed by rank {self.rank}: {error}")
        self._stop_heartbeat(f"{kind.__name__}: {error}" if error else "")
        alone = error is not None and not isinstance(error, Interrupted)
        if alone and self.size > 1 and self.device.type == "cuda":
            return  # NCCL would wait here for collectives that the other ranks may never join
        self.close()

    def close(self) -> None:
        """Leave the process group; without it some runs abort after they have finished."""
        self._stop_heartbeat()
        self.accelerator.end_training()

    def _stop_heartbeat(self, last_words: str = "") -> None:
        """Stop the heartbeat before the interpreter ends: a thread still inside the store would abort the process."""
        if self.heartbeat:
            self.heartbeat.close(last_words)
            self.heartbeat = None

    def introduce(self, placement: str) -> list[str]:
        """Describe every rank in one line: its number, host, device, and how it holds the base."""
        line = (
            f"rank {self.rank} of {self.size}  host {socket.gethostname()}  device {_device_name(self.device)}  "
            f"base {placement}"
        )
        return self.gather_objects(line)

    def select_candidates(self, gradient: Tensor, count: int) -> Tensor:
        """Choose candidates from a gradient [N] summed over the ranks: see `candidates.select_candidates`."""
        return select_candidates(self, gradient, count)

    def range_of(self, n: int) -> slice:
        """Return the entries of a weight of `n` whose gradient this rank sums in `own_part`."""
        return range_of_rank(self, n)

    def own_part(self, gradient: Tensor) -> Tensor:
        """Sum a gradient [N] over the ranks; returns this rank's part of it."""
        return sum_own_part(self, gradient)

    def choose(self, keys: Tensor, n: int, count: int) -> Tensor:
        """Choose the largest keys of all ranks' parts of `n` entries: see `candidates.select_largest`."""
        return select_largest(self, keys, n, count)

    def join(self, keys: Tensor, n: int) -> Tensor:
        """Put all ranks' parts of `n` entries together: [n]."""
        return join_parts(self, keys, n)

    def tracking(self, name: str, settings: Mapping[str, Any]) -> Log | None:
        """Return the logging function of the tracker that the run was started with; only for the main rank."""
        return open_tracker(self.accelerator, name, settings)

    # --- the base model: see `sharding` -------------------------------------------------------------------------

    @property
    def sharded(self) -> bool:
        """True if the base is cut into shards."""
        return self.sharding.sharded

    @property
    def load_device(self) -> torch.device | None:
        """The device for a freshly loaded model; None: loading has put it into shards already."""
        return self.sharding.load_device

    def loading_whole(self) -> AbstractContextManager[None]:
        """Let transformers load a model whole on every rank inside the block, even where the run shards it later."""
        return self.sharding.loading_whole()

    def prepare(self, model: nn.Module) -> nn.Module:
        """Place the frozen model; returns what forward passes go through."""
        return self.sharding.prepare(model)

    def materialize(self, weight: Any) -> AbstractContextManager[Tensor]:
        """Give the whole weight inside a backward pass."""
        return self.sharding.materialize(weight)

    def part_of(self, weight: Any) -> WeightPart:
        """Describe the part of a weight that this rank holds."""
        return self.sharding.part_of(weight)

    def settle(self) -> None:
        """Make weights safe to write, before a write."""
        self.sharding.settle()

    def written(self) -> None:
        """Make writes visible to every reader, after a write."""
        self.sharding.written()

    def fingerprints(self, parts: Mapping[str, WeightPart]) -> Fingerprints:
        """Fingerprint each whole weight, whatever parts of it this rank holds."""
        self.settle()
        return self.sharding.whole(fingerprints_of(parts), self.gather_objects)

    # --- stopping and stalling ----------------------------------------------------------------------------------

    @contextmanager
    def in_steps(self) -> Iterator[None]:
        """Hold signals back until the end of a step, and end the run if a rank makes no progress: the training loop."""
        watching = self.heartbeat.watching() if self.heartbeat else nullcontext()
        with self.interruption.deferred(), watching:
            yield

    def sum_and_agree(self, *values: float) -> list[float]:
        """Sum numbers over the ranks; the same collective spreads the word that a signal has reached one of them."""
        *totals, asked = self.sum_floats(*values, float(self.interruption.asked is not None))
        self.stopping = self.stopping or asked > 0
        return totals

    def agree_to_stop(self) -> None:
        """Raise Interrupted on all ranks if a signal has reached any: between the batches of an evaluation."""
        self.sum_and_agree()
        self.raise_if_stopping()

    def raise_if_stopping(self) -> None:
        """Raise Interrupted on all ranks once they have agreed to stop."""
        if self.stopping:
            raise Interrupted(self.interruption.asked or "a signal to another rank")


def forget_parents_ranks() -> None:
    """Let a process that was forked become a rank: Accelerate keeps what its parent was, and would not look again."""
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state(reset_partial_state=True)


def _accelerator(sharded: bool, dtype: torch.dtype, ds_config: str | None, timeout: timedelta, **arguments: Any) -> Any:
    """Make Accelerate's accelerator, and prove that it is what the launcher and `sharded` ask for.

    Raises:
        UserError: it sees another number of processes, or runs without DeepSpeed.
    """
    from accelerate import Accelerator, InitProcessGroupKwargs

    world, gpu = World.from_environment(), torch.cuda.is_available()
    if world.size > 1 or (sharded and "LOCAL_RANK" in os.environ):
        arguments["kwargs_handlers"] = [InitProcessGroupKwargs(backend="nccl" if gpu else "gloo", timeout=timeout)]
    launcher_config = forget_launchers_deepspeed()
    if sharded:
        arguments["deepspeed_plugin"] = deepspeed_plugin(ds_config or launcher_config, dtype)
    else:
        arguments["cpu"] = not gpu
    accelerator = Accelerator(**arguments)
    found = str(accelerator.distributed_type).rsplit(".", 1)[-1]
    if accelerator.num_processes != world.size:
        raise UserError(
            f"world: the launcher started {world.size} processes, accelerate sees {accelerator.num_processes} "
            f"({found}); gradients would not be shared. Launch with one of launch/*.yaml"
        )
    if sharded and found != "DEEPSPEED":
        why = "; ACCELERATE_USE_CPU is set, which switches DeepSpeed off: unset it"
        raise UserError(
            f"base_placement: shard was asked for, but accelerate runs {found}, not DeepSpeed"
            + (why if "ACCELERATE_USE_CPU" in os.environ else "")
        )
    return accelerator


def _own_store() -> Any:
    """Connect again to the store that the ranks met at, where it can be; otherwise share its connection."""
    store = torch.distributed.distributed_c10d._get_default_store()
    return store.clone() if hasattr(store, "clone") else store


def _connection_lost(error: BaseException) -> bool:
    """Tell whether an error came from a collective: another rank has gone, or kept this one waiting for too long."""
    signs = r"gloo|nccl|connection (closed|reset|refused)|broken pipe|timed out"
    return isinstance(error, RuntimeError) and re.search(signs, str(error), re.IGNORECASE) is not None


def _device_name(device: torch.device) -> str:
    return f"{device} ({torch.cuda.get_device_name(device)})" if device.type == "cuda" else str(device)
