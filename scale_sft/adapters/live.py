"""Adapters on a model that stays in memory: applied in place, swapped while it serves, undone bit for bit.

    live = scale_sft.load_adapter(model, "run/adapter")
    live.swap("other/adapter")          # from any thread, at any time
    with live.hold():                   # no swap happens inside
        model.generate(...)
    live.undo()                         # the base, bit for bit

Guarantee: every forward pass of the model (`model(...)`, each step of `generate`, pipelines) sees exactly one adapter,
or the base. A swap from another thread waits until the forward passes in flight have ended; those that begin meanwhile
wait for the swap. Several threads may run forward passes at the same time. Not covered: forward passes already under
way at the first `load_adapter` (it installs the hooks that all later ones pass through), inner modules called directly
(`model.model(...)`; put them into `hold`), and backward passes.

Cost: time and memory proportional to K. Only when an adapter's weights are seen for the first time are they read whole
(N entries), to prove that they are the adapter's base.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn

from scale_sft.errors import UserError
from scale_sft.model.exposure import carries_deltas
from scale_sft.model.fingerprints import fingerprints_of
from scale_sft.model.held import Held, parts_held
from scale_sft.model.resident import effective_values, read_entries, write_entries

from .apply import require_base, require_fit
from .format import Adapter

_live: weakref.WeakKeyDictionary[nn.Module, LiveAdapter] = weakref.WeakKeyDictionary()
_registry = threading.Lock()


def load_adapter(model: nn.Module, adapter: str | Path | Adapter) -> LiveAdapter:
    """Apply an adapter to a model's weights, in place. On a model that carries one already, this is a swap.

        model = AutoModelForCausalLM.from_pretrained("meta-llama/Llama-2-7b-hf", dtype="bfloat16")
        with scale_sft.load_adapter(model, "runs/my_run/adapter"):
            model.generate(...)
        # the base again, bit for bit

    Args:
        model: a causal language model of transformers (of a pipeline: `pipe.model`), its weights whole and in the
            dtype that the adapter was trained in.
        adapter: the adapter/ folder of a run, or an adapter read before.

    Raises:
        UserError: the adapter is damaged, or the model is not its base, or has deltas attached; no weight has been
            touched.
    """
    if carries_deltas(model):
        raise UserError(
            "load_adapter: got a model with attached deltas, which are trained. Fix: detach() it first, or use "
            "start_from to train the adapter further"
        )
    with _registry:
        live = _live.get(model)
        if live is None:
            live = LiveAdapter(model)
            ready = live.prepare(adapter)
            live.attach()
            _live[model] = live
            live.swap(ready)
            return live
    live.swap(adapter)
    return live


def carries_adapter(model: nn.Module) -> bool:
    """Return True if `load_adapter` has been called on the model, and `undo` has not."""
    return model in _live


@dataclass(frozen=True)
class Prepared:
    """An adapter checked against a model and laid out for it: what a swap needs, on the devices of the weights."""

    owner: LiveAdapter
    base: str
    weights: dict[str, Held]
    indices: dict[str, Tensor]  # [K]
    deltas: dict[str, Tensor]  # [K] fp32
    values: dict[str, tuple[Tensor, Tensor]] = field(default_factory=dict)  # base and effective [K], once applied

    @property
    def active(self) -> int:
        """K of all weights."""
        return sum(indices.numel() for indices in self.indices.values())


class LiveAdapter:
    """The adapter that a model carries. Made by `load_adapter`; all methods may be called from any thread.

    live                         # <LiveAdapter: 1,234 entries in 14 weights of LlamaForCausalLM, base 'demo'>
    live.swap("other/adapter")   # or an Adapter, or what live.prepare("other/adapter") returned
    live.swap(None)              # the base, but hooks stay
    live.undo()                  # the base, and the model is as it was; `with` does that at its end
    """

    def __init__(self, model: nn.Module):
        self._model = weakref.ref(model)
        self._gate = Gate()
        self._prints: dict[str, tuple[int, int]] = {}  # of base weights seen so far; none of them changes its base
        self._dtypes: dict[str, torch.dtype] = {}
        self._applied: Prepared | None = None
        self._hooks: list = []
        self._swapping = threading.RLock()

    def prepare(self, adapter: str | Path | Adapter) -> Prepared:
        """Read, check and arrange an adapter without applying it, so that a later swap to it touches no file.

        Raises:
            UserError: see `load_adapter`.
        """
        adapter = adapter if isinstance(adapter, Adapter) else Adapter.load(adapter)
        self._gate.require_outside()
        with self._swapping:  # the fingerprints are of the base: nobody may write meanwhile
            return self._prepare(adapter)

    def _prepare(self, adapter: Adapter) -> Prepared:
        model = self._model()
        if model is None:
            raise UserError("adapter: the model is gone")
        weights = require_fit(model, adapter)
        new = {name: weight for name, weight in weights.items() if name not in self._prints}
        self._prints |= fingerprints_of(parts_held(new))  # no adapter has been on them, so they hold the base
        self._dtypes |= {name: weight.dtype for name, weight in new.items()}
        require_base({name: self._prints[name] for name in weights}, adapter)
        return Prepared(
            owner=self,
            base=adapter.info["base"],
            weights=weights,
            indices={name: adapter.indices[name].to(weight.device) for name, weight in weights.items()},
            deltas={name: adapter.deltas[name].to(weight.device, torch.float32) for name, weight in weights.items()},
        )

    def swap(self, adapter: str | Path | Adapter | Prepared | None) -> None:
        """Replace the adapter that the model carries by `adapter`; None: by the base, bit for bit.

        Raises:
            UserError: see `load_adapter`; the model then carries what it carried before.
        """
        self._gate.require_outside()
        with self._swapping:
            ready = adapter if adapter is None or isinstance(adapter, Prepared) else self.prepare(adapter)
            self._require_unchanged(ready)
            with self._gate.alone():
                self._write(ready)

    @property
    def applied(self) -> Prepared | None:
        """The adapter that the model carries, ready for another swap to it; None: the base."""
        return self._applied

    def __repr__(self) -> str:
        model, applied = self._model(), self._applied
        on = type(model).__name__ if model is not None else "a model that is gone"
        if applied is None:
            return f"<LiveAdapter: the base on {on}>" if self._hooks else f"<LiveAdapter: undone on {on}>"
        entries = f"{applied.active:,} entries in {len(applied.weights)} weights"
        return f"<LiveAdapter: {entries} of {on}, base {applied.base!r}>"

    def _require_unchanged(self, ready: Prepared | None) -> None:
        """Raise UserError if a swap cannot be done on the weights as they are now."""
        if ready is not None and ready.owner is not self:
            raise UserError("adapter: it was prepared for another model, or before an undo; prepare it again")
        if ready is not None and not self._hooks:
            raise UserError("adapter: this one was undone; call scale_sft.load_adapter again")
        for one in filter(None, (self._applied, ready)):
            for name, weight in one.weights.items():
                if weight.device != one.indices[name].device or weight.dtype != self._dtypes[name]:
                    raise UserError(
                        f"adapter: '{name}' is {weight.dtype} on {weight.device} now, it was {self._dtypes[name]} on "
                        f"{one.indices[name].device}; undo before the model is moved or converted"
                    )

    @torch.inference_mode()  # weights made under inference mode may be written there only; others anywhere
    def _write(self, ready: Prepared | None) -> None:
        devices = {weight.device for one in (self._applied, ready) if one for weight in one.weights.values()}
        self._wait_for(devices)
        if self._applied is not None:
            for name, (base, _) in self._applied.values.items():
                write_entries(self._applied.weights[name].entries, self._applied.indices[name], base)
        if ready is not None:
            for name, weight in ready.weights.items():
                entries, indices = weight.entries, ready.indices[name]
                if name not in ready.values:
                    base = read_entries(entries, indices)
                    ready.values[name] = base, effective_values(base, ready.deltas[name])
                write_entries(entries, indices, ready.values[name][1])
        self._applied = ready
        self._wait_for(devices)

    @staticmethod
    def _wait_for(devices: set[torch.device]) -> None:
        """Wait for GPUs: forward passes may run on other streams, and a write comes after those under way."""
        for device in devices:
            if device.type == "cuda":
                torch.cuda.synchronize(device)

    @contextmanager
    def hold(self) -> Iterator[None]:
        """Keep swaps out of the `with` block, for example to run a whole `generate` under one adapter."""
        with self._gate.shared():
            yield

    def undo(self) -> None:
        """Give the model its base back, bit for bit, and remove the hooks from it."""
        self._gate.require_outside()
        with _registry:
            self.swap(None)
            for hook in self._hooks:
                hook.remove()
            self._hooks = []
            model = self._model()
            if model is not None:
                _live.pop(model, None)

    def __enter__(self) -> LiveAdapter:
        return self

    def __exit__(self, *_: object) -> None:
        self.undo()

    def attach(self) -> None:
        """Route every forward pass of the model through the gate."""
        model, gate = self._model(), self._gate
        if model is None:
            raise UserError("adapter: the model is gone")
        self._hooks = [
            model.register_forward_pre_hook(lambda module, args: gate.enter(), prepend=True),
            model.register_forward_hook(lambda module, args, output: gate.leave(), always_call=True),
        ]


class Gate:
    """Many threads may be inside together, or one alone.

    Nobody starves: who wants to be alone goes before those who come later, and those who queued meanwhile go before the
    next who wants to be alone. A thread that is inside may enter again (a forward pass within `hold`).
    """

    def __init__(self):
        self._changed = threading.Condition()
        self._inside = 0  # threads
        self._waiting = 0  # threads that want to be alone
        self._queued = 0  # threads that want to be inside
        self._admitted = 0  # of those, how many go before the next that wants to be alone
        self._taken = False  # one thread is alone
        self._own = threading.local()

    def enter(self) -> None:
        depth = getattr(self._own, "depth", 0)
        if not depth:
            with self._changed:
                self._queued += 1
                try:
                    self._changed.wait_for(lambda: not self._taken and (self._admitted or not self._waiting))
                finally:
                    self._queued -= 1
                self._admitted = max(0, self._admitted - 1)
                self._inside += 1
        self._own.depth = depth + 1

    def leave(self) -> None:
        depth = getattr(self._own, "depth", 0)
        if not depth:  # a forward pass that was under way when the hooks were installed
            return
        self._own.depth = depth - 1
        if depth == 1:
            with self._changed:
                self._inside -= 1
                self._changed.notify_all()

    def require_outside(self) -> None:
        """Raise UserError in a thread that is inside: to be alone it would have to wait for itself."""
        if getattr(self._own, "depth", 0):
            raise UserError("adapter: a swap inside hold() or inside a forward pass of the same thread; do it outside")

    @contextmanager
    def shared(self) -> Iterator[None]:
        self.enter()
        try:
            yield
        finally:
            self.leave()

    @contextmanager
    def alone(self) -> Iterator[None]:
        """Run the `with` block with nobody else inside."""
        with self._changed:
            self._waiting += 1
            try:
                self._changed.wait_for(lambda: not (self._inside or self._taken or self._admitted))
            finally:
                self._waiting -= 1
            self._taken = True
        try:
            yield
        finally:
            with self._changed:
                self._taken, self._admitted = False, self._queued
                self._changed.notify_all()
