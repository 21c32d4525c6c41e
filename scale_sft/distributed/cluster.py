"""Ranks: the one module that knows them, and the only importer of accelerate, deepspeed and torch.distributed.

Reduce inputs, then decide: only gradients are summed over ranks, every decision that follows is deterministic and
therefore the same everywhere; digests prove it.
Shapes: W ranks; N entries of a weight, cut into W flat parts; C candidates.
"""

from __future__ import annotations

import os
import re
import socket
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from types import TracebackType
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from scale_sft.errors import UserError
from scale_sft.kernels.cpu.topk import top_k_magnitude
from scale_sft.model.fingerprints import fingerprint
from scale_sft.model.resident import WeightPart
from scale_sft.spiel.indices import pieces
from scale_sft.spiel.topk import top_k_sorted

from .heartbeat import Heartbeat, end_stalled
from .sharding import _deepspeed_plugin, _forget_launchers_deepspeed
from .signals import Interrupted, Interruption
from .world import World

PROPOSAL_ENTRIES = 1 << 22
"""Of a gradient, summed over the ranks at a time while candidates are proposed."""

_GRACE_SECONDS = 60
"""By so much a collective's own time-out comes later than the heartbeat's, which knows whom to name."""


@dataclass
class Cluster:
    """The ranks of a run and what they do together. Made by `start`; `close` must be called at the end."""

    joined: ClassVar[bool] = False
    """This process has joined a process group, if only one of its own."""

    accelerator: Any
    sharded: bool
    device: torch.device
    traffic_bytes: Counter = field(default_factory=Counter)  # payload this rank contributed, by purpose, since asked
    engine: Any = None
    interruption: Interruption = field(default_factory=Interruption)
    heartbeat: Heartbeat | None = None  # None: there is but one rank
    stopping: bool = False  # all ranks know that a signal has reached one of them

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

        `timeout_seconds`: how long other ranks wait for one that makes no progress, before they end with an error.

        Raises:
            UserError: the launcher's world and the one that came about differ, or sharding is impossible here.
        """
        from accelerate import Accelerator, InitProcessGroupKwargs

        world = World.from_environment()
        gpu = torch.cuda.is_available()
        timeout = timedelta(seconds=timeout_seconds + _GRACE_SECONDS)
        group = InitProcessGroupKwargs(backend="nccl" if gpu else "gloo", timeout=timeout)
        arguments: dict[str, Any] = {"log_with": tracker, "project_dir": logging_dir}
        if world.size > 1 or (sharded and "LOCAL_RANK" in os.environ):
            arguments["kwargs_handlers"] = [group]
        launcher_config = _forget_launchers_deepspeed()
        if sharded:
            arguments["deepspeed_plugin"] = _deepspeed_plugin(ds_config or launcher_config, dtype)
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
            why = "ACCELERATE_USE_CPU is set, which switches DeepSpeed off: unset it"
            raise UserError(
                f"base_placement: shard was asked for, but accelerate runs {found}, not DeepSpeed"
                + (f"; {why}" if "ACCELERATE_USE_CPU" in os.environ else "")
            )
        cluster = cls(
            accelerator=accelerator,
            sharded=sharded,
            device=accelerator.device,
            interruption=interruption or Interruption(),
        )
        cls.joined |= torch.distributed.is_initialized()
        if cluster.size > 1:
            store = torch.distributed.PrefixStore("heartbeat", _own_store())
            heartbeat = Heartbeat(store, cluster.rank, cluster.size, timeout_seconds)
            cluster.barrier()
            heartbeat.start()
            cluster.heartbeat = heartbeat
        return cluster

    def __enter__(self) -> Cluster:
        return self

    def __exit__(self, kind: Any, error: BaseException | None, trace: TracebackType | None) -> None:
        """Leave the process group. After a collective has failed, say which rank is to blame, and end the process."""
        if error is not None and self.heartbeat and _connection_lost(error):
            with self.interruption.deferred():  # the launcher ends us too: say why before it does
                end_stalled(f"{self.heartbeat.verdict()}; noticed by rank {self.rank}: {error}")
        self._stop_heartbeat(f"{kind.__name__}: {error}" if error else "")
        alone = error is not None and not isinstance(error, Interrupted)
        if alone and self.size > 1 and self.device.type == "cuda":
            return  # NCCL would wait here for collectives that the other ranks may never join: speak and leave instead
        self.close()

    @property
    def rank(self) -> int:
        return self.accelerator.process_index

    @property
    def size(self) -> int:
        return self.accelerator.num_processes

    @property
    def is_main(self) -> bool:
        return self.accelerator.is_main_process

    def introduce(self, placement: str) -> list[str]:
        """One line per rank: who is here, where, with what."""
        line = (
            f"rank {self.rank} of {self.size}  host {socket.gethostname()}  device {_device_name(self.device)}  "
            f"base {placement}"
        )
        return self.gather_objects(line)

    # --- the base model -----------------------------------------------------------------------------------------

    @property
    def load_device(self) -> torch.device | None:
        """Where a freshly loaded model goes; None: loading has already put it into shards."""
        return None if self.sharded else self.device

    @contextmanager
    def loading_whole(self) -> Iterator[None]:
        """Inside the block transformers loads a model whole on every rank, also where the run shards it afterwards.

        A quantised base cannot be loaded into shards, and transformers would refuse to say where it goes.
        """
        if not self.sharded:
            yield
            return
        from transformers.integrations import deepspeed as integration

        integration.unset_hf_deepspeed_config()
        try:
            yield
        finally:
            integration.set_hf_deepspeed_config(self.accelerator.state.deepspeed_plugin.dschf)

    def prepare(self, model: nn.Module) -> nn.Module:
        """Hand the frozen model to DeepSpeed where it is sharded; returns what forward passes go through."""
        if not self.sharded:
            return model
        if not all(hasattr(weight, "ds_id") for weight in model.parameters()):
            self._cut(model)
        self.engine = self.accelerator.prepare(model)
        return self.engine.module

    def _cut(self, model: nn.Module) -> None:
        """Cut a model that was loaded whole into shards, weight by weight: the engine would first move all of it
        to the device, where it need not fit.
        """
        import deepspeed

        deepspeed.zero.Init(module=model, config_dict_or_path=self.accelerator.state.deepspeed_plugin.dschf.config)
        for module in model.modules():
            for name, buffer in module.named_buffers(recurse=False):
                setattr(module, name, buffer.to(self.device))

    @contextmanager
    def materialize(self, weight: nn.Parameter) -> Iterator[Tensor]:
        """The whole weight inside a backward pass: ZeRO-3 may have partitioned it again since the forward pass."""
        absent = self.sharded and weight.ds_status.name == "NOT_AVAILABLE"
        if absent:
            weight.all_gather()
        try:
            yield weight.detach()
        finally:
            if absent:
                weight.partition()

    def part_of(self, weight: nn.Parameter) -> WeightPart:
        """The part of a weight that this rank holds: rank r of a ZeRO-3 shard has [r * size, (r + 1) * size)."""
        if not self.sharded:
            return WeightPart.whole(weight)
        size = weight.ds_tensor.ds_numel
        start = min(self.rank * size, weight.ds_numel)
        stop = min(start + size, weight.ds_numel)
        return WeightPart(lambda: weight.ds_tensor.data.view(-1)[: stop - start], start, stop)

    def settle(self) -> None:
        """Bring every sharded weight back to its shards: a write into the shard of a gathered weight is lost."""
        if self.engine is None:
            return
        self.engine.optimizer.partition_all_parameters()

    def written(self) -> None:
        """Wait until what was written into shards is there: DeepSpeed gathers them on a CUDA stream of its own, which
        does not wait for this one.
        """
        if self.engine is not None and self.device.type == "cuda":
            torch.cuda.current_stream(self.device).synchronize()

    def fingerprints(self, parts: Mapping[str, WeightPart]) -> dict[str, tuple[int, int]]:
        """Fingerprint of each whole weight, whatever parts of it lie here."""
        self.settle()
        own = {name: fingerprint(part) for name, part in parts.items()}
        if not self.sharded:
            return own
        mask = (1 << 64) - 1
        everyone = self.gather_objects(own)
        return {name: tuple(sum(prints[name][n] for prints in everyone) & mask for n in (0, 1)) for name in own}

    # --- stopping and stalling ----------------------------------------------------------------------------------

    @contextmanager
    def in_steps(self) -> Iterator[None]:
        """The training loop: signals wait for the end of a step, a rank without progress ends the run."""
        with self.interruption.deferred():
            if self.heartbeat:
                self.heartbeat.mark()
                self.heartbeat.watched = True
            try:
                yield
            finally:
                if self.heartbeat:
                    self.heartbeat.watched = False

    def sum_and_agree(self, *values: float) -> list[float]:
        """Sums of numbers over the ranks; in the same collective they agree on whether a signal has reached any."""
        *totals, asked = self.sum_floats(*values, float(self.interruption.asked is not None))
        self.stopping = self.stopping or asked > 0
        return totals

    def agree_to_stop(self) -> None:
        """Raises Interrupted, on all ranks, if a signal has reached any: between the batches of an evaluation."""
        self.sum_and_agree()
        self.raise_if_stopping()

    def raise_if_stopping(self) -> None:
        """Raises Interrupted, on all ranks, once they have agreed to stop."""
        if self.stopping:
            raise Interrupted(self.interruption.asked or "a signal to another rank")

    def _mark(self) -> None:
        if self.heartbeat:
            self.heartbeat.mark()

    # --- gradients ----------------------------------------------------------------------------------------------

    def sum_(self, flat: Tensor, purpose: str = "gradients") -> None:
        """Sum a tensor over the ranks, in place: one flat all-reduce."""
        if self.size == 1:
            return
        self._mark()
        self.traffic_bytes[purpose] += flat.numel() * flat.element_size()
        torch.distributed.all_reduce(flat)

    def sum_floats(self, *values: float) -> list[float]:
        """Sums of a few numbers over the ranks, in double precision."""
        if self.size == 1:
            return list(values)
        tensor = torch.tensor(values, dtype=torch.float64, device=self.device)
        self.sum_(tensor, "scalars")
        return tensor.tolist()

    def select_candidates(self, gradient: Tensor, count: int) -> Tensor:
        """The `count` entries of largest magnitude of a gradient [N] summed over the ranks: [C] sorted int64.

        Each rank gets its share of the sum (reduce-scatter, piece by piece, so that no fp32 copy of the whole is made),
        takes the top of it, and the top of those tops is the top of the whole. Exact, and the same on every rank
        because all decide on the same gathered values.
        """
        if self.size == 1:
            return top_k_magnitude(gradient, count)
        n, world = gradient.numel(), self.size
        part = -(-n // world)
        scores = torch.empty(0, dtype=torch.float32, device=gradient.device)
        indices = torch.empty(0, dtype=torch.int64, device=gradient.device)
        for piece in pieces(part, max(1, PROPOSAL_ENTRIES // world)):
            size = piece.stop - piece.start
            held = gradient[piece.start * world : piece.stop * world]
            padded = torch.zeros(size * world, dtype=torch.float32, device=gradient.device)
            padded[: held.numel()] = held
            total = torch.empty(size, dtype=torch.float32, device=gradient.device)
            self._mark()
            _reduce_scatter(total, padded)
            first = piece.start * world + self.rank * size
            total = total[: max(0, min(size, n - first))]
            top = top_k_magnitude(total, min(count, total.numel()))
            found = total[top].abs().nan_to_num(nan=-0.5, posinf=torch.inf)  # below any number, above the padding
            scores, indices = torch.cat((scores, found)), torch.cat((indices, top + first))
            if scores.numel() > count:
                kept = top_k_sorted(scores, count)
                scores, indices = scores[kept], indices[kept]
        length = min(count, part)
        self.traffic_bytes["proposal"] += 4 * part * world + 12 * length
        scores, indices = self._gather(_extended(scores, length, -1.0)), self._gather(_extended(indices, length, 0))
        order = indices.argsort(stable=True)
        return indices[order[top_k_sorted(scores[order], count)]]

    def _gather(self, tensor: Tensor) -> Tensor:
        """All ranks' tensors [n], one after the other: [W * n]."""
        self._mark()
        pieces = [torch.empty_like(tensor) for _ in range(self.size)]
        torch.distributed.all_gather(pieces, tensor)
        return torch.cat(pieces)

    # --- agreement ----------------------------------------------------------------------------------------------

    def gather_objects(self, value: Any) -> list[Any]:
        """A small Python object of every rank, in the order of ranks."""
        if self.size == 1:
            return [value]
        self._mark()
        values: list[Any] = [None] * self.size
        torch.distributed.all_gather_object(values, value)
        return values

    def check_identical(self, take_digests: Callable[[], Mapping[str, str]], what: str) -> None:
        """Stop the run if ranks differ in any of the named digests (hex SHA-256); a single rank takes none.

        Raises:
            UserError: names the first weight (or item) and the ranks that differ from the majority.
        """
        if self.size == 1:
            return
        digests = take_digests()
        own = bytearray(b"".join(bytes.fromhex(value) for value in digests.values()))
        tensor = torch.frombuffer(own, dtype=torch.uint8).to(self.device)
        rows = self._gather(tensor).view(self.size, len(digests), -1).cpu()
        for n, name in enumerate(digests):
            kinds = Counter(bytes(rows[rank, n].tolist()) for rank in range(self.size))
            if len(kinds) > 1:
                usual = kinds.most_common(1)[0][0]
                odd = [rank for rank in range(self.size) if bytes(rows[rank, n].tolist()) != usual]
                raise UserError(f"ranks disagree on {what}: {name} differs on rank {', '.join(map(str, odd))}")

    def barrier(self) -> None:
        """Wait for all ranks."""
        self.accelerator.wait_for_everyone()

    def on_main(self, work: Callable[[], Any]) -> Any:
        """Let the main rank do `work` (files); the others wait and get its small result. A failure ends all ranks."""
        failure = result = None
        if self.is_main:
            try:
                result = work()
            except Exception as error:  # must reach the other ranks, or they would wait for ever
                failure = error
        reason = None if failure is None else f"{type(failure).__name__}: {failure}"
        main_reason, result = self.gather_objects((reason, result))[0]
        if failure is not None:
            raise failure
        if main_reason is not None:
            raise UserError(f"rank 0 could not go on: {main_reason}")
        return result

    def share(
        self, layout: Mapping[str, tuple[tuple[int, ...], torch.dtype]], own: Mapping[str, Tensor]
    ) -> dict[str, Tensor]:
        """The main rank's tensors of a layout (shape, dtype by name) on every rank; `own` counts there only."""
        shared = {}
        for name, (shape, dtype) in layout.items():
            tensor = own[name].to(self.device) if self.is_main else torch.empty(shape, dtype=dtype, device=self.device)
            if self.size > 1:
                self._mark()
                tensor = tensor.contiguous()
                torch.distributed.broadcast(tensor.view(-1).view(torch.uint8), 0)  # no backend sends every dtype
            shared[name] = tensor
        return shared

    def tracking(self, name: str, settings: Mapping[str, Any]) -> Callable[[dict[str, float | str], int], None] | None:
        """The logging function of the tracker that the run was started with, on the main rank."""
        if not self.accelerator.log_with:
            return None
        flat = {
            key: value if isinstance(value, (int, float, str, bool)) else str(value) for key, value in settings.items()
        }
        self.accelerator.init_trackers(name, config=flat)
        return lambda values, step: self.accelerator.log(values, step=step)

    def close(self) -> None:
        """Leave the process group; without it some runs abort after they have finished."""
        self._stop_heartbeat()
        self.accelerator.end_training()

    def _stop_heartbeat(self, last_words: str = "") -> None:
        """Once, before the interpreter ends: a thread that is inside the store then aborts the process."""
        if self.heartbeat:
            self.heartbeat.close(last_words)
            self.heartbeat = None


def _own_store() -> Any:
    """The store that the ranks met at, over a connection of its own where it can have one."""
    store = torch.distributed.distributed_c10d._get_default_store()
    return store.clone() if hasattr(store, "clone") else store


def _connection_lost(error: BaseException) -> bool:
    """Whether an error came from a collective: another rank has gone, or kept this one waiting for too long."""
    signs = r"gloo|nccl|connection (closed|reset|refused)|broken pipe|timed out"
    return isinstance(error, RuntimeError) and re.search(signs, str(error), re.IGNORECASE) is not None


def _device_name(device: torch.device) -> str:
    return f"{device} ({torch.cuda.get_device_name(device)})" if device.type == "cuda" else str(device)


def _extended(tensor: Tensor, length: int, value: float) -> Tensor:
    """Tensor [n], n <= length, with `value` behind it: [length]."""
    return torch.cat((tensor, tensor.new_full((length - tensor.numel(),), value)))


def _reduce_scatter(output: Tensor, flat: Tensor) -> None:
    """Sum `flat` [W * n] over the ranks; rank r gets part r [n]. Newer torch has renamed the call."""
    call = getattr(torch.distributed, "reduce_scatter_single", None) or torch.distributed.reduce_scatter_tensor
    call(output, flat)
