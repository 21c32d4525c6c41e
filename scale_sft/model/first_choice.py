"""The choice of a model's entries before the first update.

Shapes: O rows, I columns of a weight; T tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from math import ceil
from typing import Any

from torch import Tensor

from scale_sft.config.options import SparseConfig
from scale_sft.errors import UserError
from scale_sft.spiel.selection.parts import ReadWeight
from scale_sft.spiel.selection.survey import Survey

from .stepped import Sparse
from .targets import Target
from .transient import TransientDeltas


def weight_reader(sparse: Sparse) -> ReadWeight:
    """Make a function that reads whole weights of a sparse model as they are now, dequantised where they are packed."""
    targets: dict[str, Target] = {}

    @contextmanager
    def read(name: str) -> Iterator[Tensor]:
        if isinstance(sparse.carrier, TransientDeltas):
            yield sparse.carrier.effective_weight(name)
            return
        if not targets:
            targets.update((target.name, target) for target in sparse.targets)
        target = targets[name]
        with sparse.group.materialize(target.weight) as whole:
            yield whole[target.number] if target.fused else whole

    return read


def pool_sizes(options: SparseConfig, counts: Mapping[str, int]) -> dict[str, int]:
    """Compute M of each weight from its budget K, by option selection_pool; nothing where all entries are looked at."""
    pool = options.selection_pool
    return {name: ceil(pool * count) for name, count in counts.items()} if pool else {}


class FirstChoice:
    """The choice of a model's entries before the first update, from the gradients of several batches.

    While it is open, backward passes add to a survey and train nothing.

    Args:
        sparse: the model, before its first step; its deltas are 0.
    """

    def __init__(self, sparse: Sparse):
        self.sparse, self.batches = sparse, sparse.settings.sparse.selection_batches
        group, store = sparse.group, sparse.tuning.store
        tilings = {delta.name: delta.tiles.tiling for delta in store if delta.tiles is not None}
        self.counts = {delta.name: delta.active for delta in store}
        """K of each weight."""
        pools = pool_sizes(sparse.settings.sparse, self.counts)
        read = weight_reader(sparse)
        self.survey = Survey(sparse.shapes, sparse.settings.rule, group, read, group.device, tilings, pools)
        self.received = False
        """Whether the batch in progress has had a backward pass."""
        if not self.survey.needs_batches:
            self.batches = 0

    @property
    def complete(self) -> bool:
        """True once all batches have been seen."""
        return self.survey.batches >= self.batches

    def record(self, name: str, left: Tensor, right: Tensor, *, more: bool = False) -> None:
        """Receive the factors of one weight's gradient in a backward pass: see `Record`."""
        if not self.received and not self.survey.batches:
            self.sparse.join()
            self.survey.parts = self.sparse.group
        self.received = True
        self.survey.record(name, left, right, more=more)

    def end_batch(self) -> None:
        """Close a global batch.

        Raises:
            UserError: it had no backward pass.
        """
        if not self.received:
            raise UserError("step: got no gradient since the last step. Fix: call loss.backward() before step()")
        self.survey.end_batch()
        self.received = False

    def step(self) -> bool:
        """Close a global batch, and choose the entries after the last one; returns True if they are chosen.

        Raises:
            UserError: see `end_batch` and `apply`.
        """
        if not self.complete:
            self.end_batch()
        if self.complete:
            self.apply()
        return self.complete

    def apply(self) -> None:
        """Choose the entries and make them the model's, with deltas of 0.

        Raises:
            UserError: a gradient or a score is not finite, a quota does not hold the budget, or processes differ.
        """
        sparse, options = self.sparse, self.sparse.settings.sparse
        try:
            chosen = self.survey.choose(
                self.counts, floor_fraction=options.budget_floor if options.budget == "global" else None
            )
        except ValueError as error:
            raise UserError(f"selection: {error}") from None
        sparse.rebuild(chosen)
        sparse.group.check_identical(sparse.tuning.digests, "the entries that were chosen")


def choose_entries(sparse: Sparse, batches: Iterable[Callable[[], None]]) -> None:
    """Choose the entries before the first step, by option selection_batches; each of `batches` runs one batch.

    Raises:
        UserError: see `FirstChoice.apply`.
    """
    choosing = FirstChoice(sparse)
    sparse.choosing = choosing
    try:
        for run in batches:
            if not choosing.complete:
                run()
            if choosing.step():
                break
    finally:
        sparse.choosing = None


def expect_state(sparse: Sparse, state: Mapping[str, Any], *, fresh: bool) -> None:
    """Choose no entries, because a saved state is to be loaded; if a global ranking chose its, make place for them.

    Args:
        sparse: the model.
        state: of a `SparseOptimizer`, not checked yet.
        fresh: the model has made no step, so that its entries may change.
    """
    sparse.choosing = None
    if sparse.settings.sparse.budget != "global" or not fresh:
        return
    counts = {name: one["indices"].numel() for name, one in state.get("weights", {}).items() if "indices" in one}
    if counts.keys() == sparse.shapes.keys() and sum(counts.values()) == sparse.tuning.store.active:
        sparse.rebuild(counts)
