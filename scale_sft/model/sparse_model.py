"""A frozen model whose target weights carry sparse deltas, shared by the trainer, the benchmarks and the Python API.

Shapes: O rows, I columns of a weight; K active entries.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor, nn

from scale_sft.errors import UserError
from scale_sft.spiel.schedules import LearningRateSchedule
from scale_sft.spiel.taps import Bounds
from scale_sft.spiel.taps import detach as remove_tap

from . import fused_step
from .dropout import DropoutOff
from .exposure import Exposure
from .fingerprints import combine_fingerprints
from .first_choice import FirstChoice, weight_reader
from .group import Group
from .method import make_method
from .packed_weights import PackedWeight
from .resident import ResidentDeltas
from .sparse_optimizer import SparseOptimizer
from .sparse_settings import SparseSettings
from .stepped import Choosing
from .targets import attach_taps, parts_of, targets_of
from .transient import TransientDeltas, attach_transient_taps, weights_used

Save = Callable[["SparseModel", Path], None]
"""Writes the deltas of a sparse model into an adapter folder."""

Join = Callable[[], Group | None]
"""Returns the processes that torch.distributed has now; None if there is one only."""


class SparseModel:
    """A frozen transformers model whose target weights carry sparse deltas.

        >>> sparse = scale_sft.attach(model, density=0.01, total_steps=1000)
        >>> optimizer = sparse.optimizer(lr=1e-2)
        >>> for batch in batches:
        ...     model(**batch).loss.backward()
        ...     optimizer.step()
        >>> sparse.save("adapter")

    `scale_sft.attach` makes one. Weights of a plain base hold the deltas (effective = base + delta, rounded once), so
    the model is used as before; a base in 4 or 8 bits adds them to each dequantised weight.

    Args:
        model: with its weights; everything in it is frozen.
        settings: the method, its budget and its targets.
        group: the processes that train it, and how they hold the base.
        save: writes adapter folders; None: `save` is not available.
        join: finds processes that come together after this; None: `group` is final.

    Raises:
        UserError: there is no target, the budget does not fit the targets, or a layer cannot carry a delta; the model
            is unchanged.
    """

    def __init__(
        self,
        model: nn.Module,
        settings: SparseSettings,
        group: Group,
        save: Save | None = None,
        join: Join | None = None,
    ):
        self.settings, self.group, self._save, self._find_ranks = settings, group, save, join
        self.targets = targets_of(model, settings.sparse)
        self.shapes = {target.name: target.shape for target in self.targets}
        self.tuning = make_method(settings, self.targets, lambda: self.group, weight_reader(self))
        self.choosing: Choosing | None = None
        """While the entries are chosen, before the first update."""
        self._exposure: Exposure | None = None
        self._dropout: DropoutOff | None = None
        self._optimizer: SparseOptimizer | None = None
        self._away = False  # inside `base`
        self.overwritten = False
        """Whether the model has loaded weights other than the base's with these deltas."""
        self._trained = [weight for weight in model.parameters() if weight.requires_grad]
        packed = weights_used(model, self.targets, settings.dtype, group.device) if settings.quantization else None
        tapped = [one.module for one in packed.values()] if packed else []
        tapped += [module for target in self.targets for module in target.modules]
        self._tapped: list[nn.Module] = list({id(module): module for module in tapped}.values())
        self._packed_weights = [one for one in packed.values() if isinstance(one, PackedWeight)] if packed else []
        model.requires_grad_(False)
        try:
            self.carrier = self._wire(model, packed)
            self.fused = all(group.gather_objects(self._fuses()))  # or ranks would differ in the last bits
            self.parameter = self._make_parameter()
        except BaseException:
            self._untap()
            self._thaw()
            raise

    # --- made once ----------------------------------------------------------------------------------------------

    def _wire(self, model: nn.Module, packed: dict | None) -> ResidentDeltas | TransientDeltas:
        """Tap the layers, place the model, take its fingerprints, and put the deltas into it."""
        store, group = self.tuning.store, self.group
        transient, needed = None, None if self.settings.sparse.trains_whole == "entry" else self._needed
        if packed is None:
            attach_taps(self.targets, self._record, group.materialize, needed, self._record_many)
        else:
            transient = TransientDeltas(store, packed, group.materialize)
            attach_transient_taps(transient, store.names, self._record, needed, self._record_many)
        self.model = group.prepare(model)
        self.parts = parts_of(self.targets, group.part_of)
        self.prints = self.fingerprints(transient)
        return transient or ResidentDeltas(store, self.parts, group.settle, group.written)

    def _fuses(self) -> bool:
        wanted = fused_step.wanted(self.settings.kernels, self.group.device)
        return wanted and fused_step.why_not(self.tuning, self.carrier) is None

    def _make_parameter(self) -> nn.Parameter:
        """Make a parameter of all deltas: themselves, or one without memory if gradients have another dtype."""
        flat, dtype = self.tuning.store.flat, self.tuning.recorder.dtype
        if flat.dtype is not dtype:  # torch requires a gradient to have its parameter's dtype
            flat = torch.zeros((), dtype=dtype, device=flat.device).expand(flat.shape)
        return nn.Parameter(flat)

    # --- the base -----------------------------------------------------------------------------------------------

    def fingerprints(self, transient: TransientDeltas | None = None) -> dict[str, tuple[int, int]]:
        """Fingerprint each target weight as it is now; for quantised ones, the packed bytes and the scales."""
        prints = self.group.fingerprints(self.parts)
        return transient.with_states(prints) if transient else prints

    @property
    def base_hash(self) -> str:
        """64 hex digits over the target weights of the base."""
        return combine_fingerprints(self.prints, self.shapes)

    def check_base(self, what: str) -> None:
        """Raise UserError, with `what` and two hashes, unless the weights without their deltas are the base's."""
        transient = self.carrier if isinstance(self.carrier, TransientDeltas) else None
        found = combine_fingerprints(self.fingerprints(transient), self.shapes)
        if found != self.base_hash:
            raise UserError(f"{what}: got hash {found[:16]}..., expected {self.base_hash[:16]}...")

    # --- one step -----------------------------------------------------------------------------------------------

    def optimizer(self, lr: float | None = None) -> SparseOptimizer:
        """Make the optimizer of the deltas, one per model.

        Args:
            lr: learning rate, which you or a torch scheduler may change; None: set for each step by the options
                learning_rate, warmup_fraction and lr_schedule.

        Raises:
            UserError: there is one already, or the model was detached.
        """
        self.require_attached("optimizer")
        if self._optimizer is not None:
            raise UserError(
                "optimizer: got a second call, expected one per attached model. Fix: keep the first optimizer, or "
                "detach() and attach the model again"
            )
        self._optimizer = SparseOptimizer(self, self.learning_rates if lr is None else lr)
        return self._optimizer

    @cached_property
    def learning_rates(self) -> LearningRateSchedule:
        """The schedule by the options learning_rate, warmup_fraction and lr_schedule."""
        return self.settings.learning_rates(self.tuning.store.active, self.shapes)

    def _record(self, name: str, left: Tensor, right: Tensor, *, more: bool = False) -> None:
        """Receive the factors of one weight's gradient in a backward pass: see `Record`."""
        self._receive()
        if self.choosing is not None:
            self.choosing.record(name, left, right, more=more)
        else:
            self.tuning.recorder.record_product(name, left, right, more=more)

    def _record_many(self, names: Sequence[str], left: Tensor, right: Tensor, bounds: Bounds) -> None:
        """Receive the factors of several weights' gradients: see `RecordMany`."""
        self._receive()
        if self.choosing is None:
            self.tuning.recorder.record_many(names, left, right, bounds)
        else:
            for name, (start, stop) in zip(names, bounds, strict=True):
                self.choosing.record(name, left[start:stop], right[start:stop])

    def _receive(self) -> None:
        """Check that deltas are trained, and open a step where steps open automatically."""
        if self._away:
            raise UserError("backward: got a call inside sparse.base(), expected it outside: deltas are trained")
        if self.choosing is None and self.exposed:
            if self._optimizer is None:
                raise UserError("backward: got no optimizer. Fix: call sparse.optimizer(lr=...) before the first step")
            self._optimizer.receive()

    def _needed(self, name: str, factor: Tensor, left: bool) -> Tensor:
        """Return the columns of a factor that the backward pass needs: see `Needed`."""
        one = self._optimizer
        step = 1 if one is None else one.number or one.steps + 1
        return factor if self.choosing is not None else self.tuning.needed(name, factor, step, left=left)

    def load_state(
        self,
        step: int,
        states: Iterable[tuple[str, Mapping[str, Tensor]]],
        counters: Mapping[str, list[int]],
        base: Mapping[str, Tensor] | None = None,
    ) -> None:
        """Resume after `step` from `tuning.state_of` and `tuning.counters`.

        Args:
            step: completed optimizer steps.
            states: (name, tensors) of each weight.
            counters: the part of the state that is not tensors.
            base: base values at the indices of `states` by name, [K] in its dtype, if the weights may hold deltas
                other than the attached ones.
        """
        carrier, store = self.carrier, self.tuning.store
        carrier.settle()
        carrier.release(*store)
        self.tuning.load_state(step, states, counters)
        if base:
            for delta in store:
                carrier.overwrite(delta, base[delta.name])
        carrier.adopt(*store)
        carrier.write()

    def rebuild(self, active: Mapping[str, Tensor] | Mapping[str, int]) -> None:
        """Start with other entries before the first step: indices by name, or counts at random; the same total."""
        self.carrier.restore()
        self.tuning = make_method(self.settings, self.targets, lambda: self.group, weight_reader(self), active)
        store = self.tuning.store
        if isinstance(self.carrier, TransientDeltas):
            self.carrier.follow(store)
        else:
            self.carrier = ResidentDeltas(store, self.parts, self.group.settle, self.group.written)
        if self.parameter.dtype is store.flat.dtype:  # else it is without memory
            self.parameter.data = store.flat

    def begin_with(self, entries: Iterable[tuple[str, Tensor, Tensor]]) -> None:
        """Make the deltas of an adapter the initial state, before the first step; optimizer state stays fresh.

        Args:
            entries: (name, indices, deltas) of each weight: [K] flat, sorted, unique; [K] of a dtype that fits in the
                deltas' own. K is that of `settings.start`.
        """
        tuning = self.tuning

        def states() -> Iterator[tuple[str, Mapping[str, Tensor]]]:
            for name, indices, deltas in entries:
                state = {**tuning.state_of(name), "indices": indices.to(tuning.store[name].entries.dtype)}
                yield name, {**state, **{kind: deltas for kind in state if kind in ("deltas", "reference")}}

        self.load_state(0, states(), tuning.counters())

    # --- the Python API -----------------------------------------------------------------------------------------

    @property
    def exposed(self) -> bool:
        """True if the model lists the deltas among its parameters, and steps open automatically."""
        return self._exposure is not None

    def expose(self) -> None:
        """List the deltas among the model's parameters, switch dropout off, and open steps automatically."""
        self._exposure = Exposure(self.model, self.parameter, self._tapped, self._note_load)
        self._dropout = DropoutOff(self.model)
        if self.settings.sparse.selection_batches:
            self.choosing = FirstChoice(self)

    def join(self) -> None:
        """Train with the processes that torch.distributed has now, if it had none before. Called as a step opens.

        Raises:
            UserError: their bases or their deltas differ.
        """
        if found := self._newcomers():
            found.check_identical(lambda: {"base": self.base_hash}, "the base model")
            found.check_identical(self.tuning.digests, "the deltas")
            self.fused = all(found.gather_objects(self.fused))
            self.group = found

    def require_joined(self) -> None:
        """Raise UserError if other processes have appeared since the step opened: they would train apart."""
        if self._newcomers():
            raise UserError(
                "step: torch.distributed was initialised between a backward pass and its step. Fix: initialise it "
                "before the first backward pass"
            )

    def _newcomers(self) -> Group | None:
        return self._find_ranks() if self._find_ranks and self.group.size == 1 else None

    def _note_load(self) -> None:
        """Notice weights that do not hold the deltas; those of the optimizer's state to come are proven by it."""
        self.overwritten = self.overwritten or self.carrier.misplaced() is not None

    def require_intact(self, what: str) -> None:
        """Raise UserError unless the weights hold the deltas that were trained, in O(K)."""
        if self.overwritten or self.carrier.misplaced() is not None:
            raise UserError(
                f"{what}: the weights of the model were replaced, moved or cast after attach (load_state_dict, "
                "load_best_model_at_end, to), so they are not the base with these deltas. Fix: load the base again, "
                "attach, and load the optimizer's state of the step that you want"
            )

    @contextmanager
    def base(self) -> Iterator[nn.Module]:
        """Take the deltas out, bit for bit, for the length of a `with` block, in O(K); yields the model.

            >>> with sparse.base():
            ...     before = model(**batch).loss

        Raises:
            UserError: the model was detached.
        """
        self.require_attached("base")
        self.require_intact("base")
        with self.carrier.without():
            self._away = True
            try:
                yield self.model
            finally:
                self._away = False

    def save(self, folder: str | Path) -> Path:
        """Write the deltas as an adapter folder, as a run of `scale-sft train` does; returns the folder.

            >>> sparse.save("adapter")  # then: scale-sft merge adapter --output merged

        Raises:
            UserError: the model was detached, its weights were replaced, or the folder cannot be written.
        """
        self.require_attached("save")
        self.require_intact("save")
        if self._save is None:
            raise UserError("save: got a model without a writer, expected one made by scale_sft.attach")
        self._save(self, Path(folder))
        return Path(folder)

    def detach(self) -> nn.Module:
        """Restore the model's base, bit for bit, and release the model; returns it.

        Raises:
            UserError: the model was detached already, or its weights were replaced: the base cannot be restored.
        """
        self.require_attached("detach")
        if self.exposed:
            self.require_intact("detach")
        self.carrier.restore()
        self._untap()
        if self._exposure is not None:
            self._exposure.remove()
        if self._dropout is not None:
            self._dropout.restore()
        self._thaw()
        self._tapped = []
        return self.model

    def _untap(self) -> None:
        for module in self._tapped:
            remove_tap(module)
        for packed in self._packed_weights:
            packed.give_back()

    def _thaw(self) -> None:
        """Make parameters trainable again that were so before."""
        for weight in self._trained:
            weight.requires_grad_(True)

    def __repr__(self) -> str:
        store, sparse = self.tuning.store, self.settings.sparse
        total = sum(rows * columns for rows, columns in self.shapes.values())
        steps = self._optimizer.steps if self._optimizer else 0
        return (
            f"<SparseModel: {sparse.method}, {store.active:,} of {total:,} entries ({store.active / total:.3%}) in "
            f"{len(store)} weights of {type(self.model).__name__}, step {steps} of {self.settings.total_steps}"
            f"{'' if self.attached else ', detached'}>"
        )

    @property
    def attached(self) -> bool:
        """True while the model carries the deltas."""
        return bool(self._tapped)

    def require_attached(self, what: str) -> None:
        """Raise UserError after `detach`, and inside `base`."""
        if not self.attached:
            raise UserError(f"{what}: got a model that was detached. Fix: scale_sft.attach it again")
        if self._away:
            raise UserError(f"{what}: got a call inside sparse.base(), expected it outside of the `with` block")
