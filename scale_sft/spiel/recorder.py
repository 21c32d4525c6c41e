"""Record, in the backward pass, gradients of the active deltas (Eq. 7) and candidates for growth (Eq. 8).

Shapes: N = R * C' entries of a weight, K active, C candidates; T tokens. Estimates are fp32.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from .deltas import DeltaStore
from .indices import Entries, FlatEntries, Part, piece_entries, pieces
from .row_gradients import Pending, RowGradient, Sum
from .schedules import Phase
from .topk import largest_magnitudes

Select = Callable[[Tensor, int], Tensor]
"""(gradient [N], C) -> [C] sorted indices of the C largest magnitudes, of the gradient summed over all ranks; [0] if
all of it is 0."""

Products = Callable[[Tensor, Tensor, Sequence[tuple[Entries, Tensor]]], bool]
"""(left [T, R], right [T, C'], [(entries, out [K]), ...]): adds the entries of left^T right to each `out` and returns
True; or returns False, doing nothing, if forming the full product is no slower."""

Gradient = Tensor | RowGradient
"""Of one weight: dense [O, I], or the rows that are not 0."""

Propose = Callable[[str, Gradient, int], tuple[Tensor, dict[str, Tensor]]]
"""(name, gradient [O, I], C) -> [C] sorted indices of candidates, and the facts that their ranking needs later; [0] if
all of the gradient is 0."""

PICKED_TOGETHER, PICKED_TOGETHER_ON_DEVICE = 1 << 17, 1 << 25
"""Entries of products that `record_many` holds at once."""

CANDIDATE_STATE = ("candidate_indices", "candidate_mean", "candidate_mean_square")


def largest(select: Select, sum_: Sum = lambda flat: None) -> Propose:
    """Propose the largest gradients, as in the paper; their ranking needs no other facts.

    Args:
        select: see `Select`.
        sum_: over the same ranks.
    """

    def propose(name: str, gradient: Gradient, count: int) -> tuple[Tensor, dict[str, Tensor]]:
        if isinstance(gradient, RowGradient):
            return gradient.union(sum_).choose(select, count), {}
        return select(gradient.reshape(-1), count), {}

    return propose


def dense_products(left: Tensor, right: Tensor, wanted: Sequence[tuple[Entries, Tensor]]) -> None:
    """Form the full product, pick the entries from it, and free it."""
    pick(left.t() @ right, wanted)


def pick(gradient: Gradient, wanted: Sequence[tuple[Entries, Tensor]]) -> None:
    """Add the entries of a gradient [R, C'] to each `out` [K]."""
    if isinstance(gradient, RowGradient):
        gradient.pick(wanted)
        return
    for entries, out in wanted:
        out += gradient.view(-1).index_select(0, entries.flat()).to(out.dtype)


def candidates_of(store: DeltaStore, ratio: float) -> Mapping[str, int]:
    """Compute C of each weight: ratio * K, at least 1 and at most N."""
    return {delta.name: max(1, min(int(ratio * delta.active), delta.numel)) for delta in store}


@dataclass
class Candidates:
    """Growth candidates of one weight and the running estimates of their gradient (Eq. 8)."""

    entries: Entries
    mean: Tensor  # [C] fp32
    mean_square: Tensor  # [C] fp32
    facts: dict[str, Tensor] = field(default_factory=dict)  # fp32, what another rule than |gradient| ranks them by

    @property
    def indices(self) -> Tensor:
        """The [C] flat indices, sorted and unique like the delta's."""
        return self.entries.flat()

    @property
    def tensors(self) -> list[Tensor]:
        """Return the tensors that are kept."""
        return [*self.entries.tensors, self.mean, self.mean_square, *self.facts.values()]

    def state(self) -> dict[str, Tensor]:
        """Return the tensors that a checkpoint keeps, by name: views, except for the indices."""
        return dict(zip(CANDIDATE_STATE, (self.indices, self.mean, self.mean_square), strict=True)) | self.facts


class GradientRecorder:
    """The receiver of each weight's gradient factors in a backward pass; it keeps only the entries wanted.

    Args:
        store: the deltas whose active entries are recorded.
        candidates: C of each weight; needed only where a phase proposes.
        estimation_steps: G, over which Eq. 8 averages.
        propose: chooses candidates from one weight's gradient; the default takes the largest that this process sees.
        dtype: of the recorded gradients: float32, or bfloat16, which sums micro-batches and ranks in bf16.
        products: computes only the wanted entries of a weight's gradient (appendix B); None: pick them from the full
            product.
        reuse_buffer: reuse one buffer for every dense gradient of a step.
    """

    def __init__(
        self,
        store: DeltaStore,
        candidates: Mapping[str, int] | None = None,
        *,
        estimation_steps: int = 5,
        propose: Propose | None = None,
        dtype: torch.dtype = torch.float32,
        products: Products | None = None,
        reuse_buffer: bool = True,
    ):
        self.store, self.counts = store, dict(candidates or {})
        self.dtype, self.products, self.reuse_buffer = dtype, products, reuse_buffer
        self.estimation_steps, self.propose = estimation_steps, propose or largest(largest_magnitudes)
        self.phase = Phase.OFF
        self.proposing = False  # this step chooses the candidates
        self.candidates: dict[str, Candidates] = {}
        self.received: set[str] = set()  # weights that received a gradient that is not all zero
        self.by_rows: set[str] = set()  # embeddings: all of the gradient may be 0 outside of some rows
        self._pending = Pending()
        self._watching = False  # this step looks for dead gradients
        self._buffer: Tensor | None = None  # for one dense gradient after the other, during a step
        self._allocate(0)

    def _allocate(self, candidates: int) -> None:
        """Allocate one flat buffer to sum over ranks: active gradients first, then candidates' gradients."""
        self.flat = torch.zeros(self.store.active + candidates, dtype=self.dtype, device=self.store.device)
        sizes = [delta.active for delta in self.store]
        if candidates:
            sizes += [self.counts[name] for name in self.store.names]
        of_each = self.flat.split(sizes)
        self._active = dict(zip(self.store.names, of_each, strict=False))
        self._candidate = dict(zip(self.store.names, of_each[len(self.store) :], strict=False))
        self.estimates = torch.zeros(2, candidates, device=self.store.device)  # mean, mean square
        counts = [self.counts[name] for name in self.store.names] if candidates else [0] * len(self.store)
        self.places = FlatEntries(self.store.places.rows, counts)

    @property
    def gradients(self) -> Tensor:
        """The [sum of K] gradients of the active deltas, in the order of the store's flat buffer."""
        return self.flat[: self.store.active]

    def begin_step(self, phase: Phase, *, watch: bool = False) -> None:
        """Forget the last step's gradients, and open an estimation phase where one begins.

        It begins where `phase` proposes, and where all steps before this one in the phase were discarded.

        Args:
            phase: what this step records.
            watch: collect the weights that get a gradient in `received`; this forms every full product.
        """
        self.phase, self._watching = phase, watch
        self._pending.clear()
        self.proposing = phase is Phase.PROPOSE or (phase is Phase.ESTIMATE and not self.candidates)
        if self.proposing:
            self.open_estimation()
        else:
            self.flat.zero_()

    def open_estimation(self) -> None:
        """Forget candidates and allocate gradients for new ones."""
        self.candidates = {}
        self._allocate(sum(self.counts[name] for name in self.store.names))

    def discard_step(self) -> None:
        """Ignore this step's gradients, and forget candidates that they proposed.

        The next step of the phase proposes instead; the estimates have one term fewer.
        """
        self._watching, self._buffer = False, None
        if self.proposing:
            self.candidates = {}

    @property
    def has_estimates(self) -> bool:
        """True if something may grow by the gradients of the phase."""
        return bool(self.candidates)

    def estimation_state(self, name: str) -> dict[str, Tensor]:
        """Return what a checkpoint keeps of an open phase; nothing of a weight that has no candidates."""
        return self.candidates[name].state() if name in self.candidates else {}

    def estimation_tensors(self, name: str) -> list[Tensor]:
        """Return the tensors of one weight's candidates."""
        return self.candidates[name].tensors if name in self.candidates else []

    def load_estimation(self, name: str, state: Mapping[str, Tensor]) -> None:
        """Load a result of `estimation_state` for one weight, in an open estimation phase."""
        if CANDIDATE_STATE[0] in state:
            self.load_candidates(name, state)

    def load_candidates(self, name: str, state: Mapping[str, Tensor]) -> None:
        """Load a result of `Candidates.state` for one weight, in an open estimation phase."""
        own = lambda key: state[key].to(self.store.device)
        indices, mean, square = map(own, CANDIDATE_STATE)
        facts = {key: own(key).clone() for key in state if key.startswith("candidate_") and key not in CANDIDATE_STATE}
        candidates = self._choose(name, indices, facts)
        candidates.mean.copy_(mean)
        candidates.mean_square.copy_(square)

    def _choose(self, name: str, indices: Tensor, facts: dict[str, Tensor]) -> Candidates:
        """Make entries [C] the candidates of one weight, in an open estimation phase."""
        number = self.store.number_of(name)
        mean, mean_square = self.estimates[:, self.places.range_of(number)]
        self.candidates[name] = Candidates(self.places.of_weight(number, indices), mean, mean_square, facts)
        return self.candidates[name]

    def stand_in(self, name: str) -> None:
        """Give a weight without candidates its first entries in their place, none of which may grow."""
        count, number = self.counts[name], self.store.number_of(name)
        self.places.of_weight(number, torch.arange(count, device=self.store.device))

    def record_product(self, name: str, left: Tensor, right: Tensor, *, more: bool = False) -> None:
        """Record the wanted entries of left^T right, the [R, C'] gradient of one weight in one backward pass.

        The full product is formed only where every entry is needed: to propose candidates (section 3.2), and in the
        first step of a run, to find dead gradients. Of an embedding it never is.

        Args:
            left: [T, R], or [T] int64 of an embedding: see `Record`.
            right: [T, C'], of the same dtype.
            more: other parts of this weight's gradient follow in the same backward pass, and candidates are proposed
                by their sum.
        """
        if left.dim() == 1:
            self.by_rows.add(name)
            self.record(name, RowGradient(left, right, self.store[name].shape[0]), more=more)
            return
        if self._watching or self._proposes(name):
            self.record(name, self._product(left, right), more=more)
            return
        if not len(left):  # an expert that met no token
            return
        wanted = self._wanted(name)
        if self.products is None or not self.products(left, right, wanted):
            pick(self._product(left, right), wanted)

    def record_many(self, names: Sequence[str], left: Tensor, right: Tensor, bounds: Sequence[tuple[int, int]]) -> None:
        """Record left[a:b]^T right[a:b] of several weights [R, C'], one after the other in the store.

        Small products of many weights are formed one after the other, and their entries picked together.

        Args:
            names: of the weights.
            left: [S, R]. right: [S, C'].
            bounds: (a, b) of each.
        """
        rows, columns = left.shape[1], right.shape[1]
        few = PICKED_TOGETHER if left.device.type == "cpu" else PICKED_TOGETHER_ON_DEVICE
        estimating = self.phase is not Phase.OFF
        alone = self._watching or rows * columns > few // 4
        if alone or (estimating and not self.candidates.keys() >= set(names)):
            for name, (start, stop) in zip(names, bounds, strict=True):
                self.record_product(name, left[start:stop], right[start:stop])
            return
        first = self.store.number_of(names[0])
        together = few // (rows * columns)
        products = left.new_empty(min(together, len(names)), rows, columns)
        for begin in range(0, len(names), together):
            chunk = bounds[begin : begin + together]
            for product, (start, stop) in zip(products, chunk, strict=False):
                torch.mm(left[start:stop].t(), right[start:stop], out=product)
            weights = slice(first + begin, first + begin + len(chunk))
            self._pick_together(self.store.places, weights, products, self.gradients)
            if estimating:
                self._pick_together(self.places, weights, products, self.flat[self.store.active :])

    def _pick_together(self, places: FlatEntries, weights: slice, products: Tensor, out: Tensor) -> None:
        """Add the entries of some consecutive weights, of their products [W, R, C'], to theirs of `out`."""
        part = places.part_of(weights)
        picked = products.view(-1).index_select(0, places.joined(part))
        out[part.entries] += picked.to(out.dtype)

    def _product(self, left: Tensor, right: Tensor) -> Tensor:
        """Form left^T right [R, C'], in the reused buffer if there is one: use it before the next is formed."""
        if not self.reuse_buffer:
            return left.t() @ right
        size = left.shape[1] * right.shape[1]
        if self._buffer is None or self._buffer.numel() < size or self._buffer.dtype is not left.dtype:
            others = (delta.numel for delta in self.store if delta.name not in self.by_rows)
            self._buffer = torch.empty(max(size, *others), dtype=left.dtype, device=left.device)
        return torch.mm(left.t(), right, out=self._buffer[:size].view(left.shape[1], right.shape[1]))

    def record(self, name: str, gradient: Gradient, *, more: bool = False) -> None:
        """Record the wanted entries of the [O, I] gradient of one weight in one backward pass, or of a part of it.

        Args:
            gradient: dense, or the rows that are not 0.
            more: see `record_product`.
        """
        if self._watching and name not in self.received and bool(gradient.any()):
            self.received.add(name)
        if not self._proposes(name):
            pick(gradient, self._wanted(name))
            return
        pick(gradient, [(self.store[name].entries, self._active[name])])
        whole: Gradient | None = gradient
        if isinstance(gradient, Tensor) or more or name in self._pending:
            whole = self._pending.add(name, gradient, more=more)
        if whole is not None:
            indices, facts = self.propose(name, whole, self.counts[name])
            if len(indices):  # else all of the gradient is 0: the next backward pass proposes
                self._choose(name, indices, facts)
                pick(whole, [(self.candidates[name].entries, self._candidate[name])])

    def _proposes(self, name: str) -> bool:
        """Return True if the next gradient of a weight proposes its candidates."""
        return self.phase is not Phase.OFF and name not in self.candidates

    def _wanted(self, name: str) -> list[tuple[Entries, Tensor]]:
        """List the entries of one weight whose gradient is wanted now, and the tensors to add it to."""
        wanted = [(self.store[name].entries, self._active[name])]
        if self.phase is not Phase.OFF and name in self.candidates:
            wanted.append((self.candidates[name].entries, self._candidate[name]))
        return wanted

    def estimates_of(self, part: Part) -> Tensor:
        """Return mean and mean square of the gradients of some whole weights' candidates: [2, c]."""
        return self.estimates[:, self.places.part_of(part.weights).entries]

    def end_step(self) -> None:
        """Add one term to the running estimates (Eq. 8), after the buffer was summed over ranks."""
        self._watching, self._buffer = False, None
        if self.phase is Phase.OFF:
            return
        mean, mean_square = self.estimates
        gradients = self.flat[self.store.active :]  # 0 where a weight has no candidates yet
        for part in pieces(gradients.numel(), piece_entries(self.store.device)):
            gradient = gradients[part].float()
            mean[part].add_(gradient, alpha=1 / self.estimation_steps)
            mean_square[part].addcmul_(gradient, gradient, value=1 / self.estimation_steps)

    def close_estimation(self) -> None:
        """Free the candidates after the reallocation that used them."""
        self.candidates = {}
        self._allocate(0)
