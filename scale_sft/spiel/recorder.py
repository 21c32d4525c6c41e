"""What the backward pass records: gradients of the active deltas (Eq. 7), and candidates for growth (Eq. 8).

Shapes: N = R * C' entries of a weight, K active, C candidates; T tokens. Estimates are fp32.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .deltas import DeltaStore
from .indices import Entries
from .schedules import Phase
from .topk import top_k_magnitude

Select = Callable[[Tensor, int], Tensor]
"""(gradient [N], C) -> [C] sorted indices of the C largest magnitudes, of the gradient summed over all ranks."""

Products = Callable[[Tensor, Tensor, Sequence[tuple[Entries, Tensor]]], bool]
"""(left [T, R], right [T, C'], [(entries, out [K]), ...]): adds the entries of left^T right to each `out` and returns
True; or does nothing and returns False where the whole product is as good."""

CANDIDATE_STATE = ("candidate_indices", "candidate_mean", "candidate_mean_square")


def dense_products(left: Tensor, right: Tensor, wanted: Sequence[tuple[Entries, Tensor]]) -> None:
    """The whole product, of which the entries are picked; it is gone when this returns."""
    pick(left.t() @ right, wanted)


def pick(gradient: Tensor, wanted: Sequence[tuple[Entries, Tensor]]) -> None:
    """Add the entries of a dense gradient [R, C'] to each `out` [K]."""
    for entries, out in wanted:
        out += gradient.view(-1).index_select(0, entries.flat()).to(out.dtype)


@dataclass
class Candidates:
    """Growth candidates of one weight and the running estimates of their gradient (Eq. 8)."""

    entries: Entries
    mean: Tensor  # [C] fp32
    mean_square: Tensor  # [C] fp32

    @property
    def indices(self) -> Tensor:
        """[C] flat indices as the delta's: sorted, unique."""
        return self.entries.flat()

    @property
    def tensors(self) -> list[Tensor]:
        """What is kept."""
        return [*self.entries.tensors, self.mean, self.mean_square]

    def state(self) -> dict[str, Tensor]:
        """All that a checkpoint keeps, by name; views, not copies, but for the indices."""
        return dict(zip(CANDIDATE_STATE, (self.indices, self.mean, self.mean_square), strict=True))


class GradientRecorder:
    """Receives the factors of each weight's gradient once per backward pass and keeps what of it is asked for.

    Args:
        store: whose active entries are recorded.
        candidates: C of each weight; needed only where a phase proposes.
        estimation_steps: G, over which Eq. 8 averages.
        select: how candidates are chosen from one weight's gradient; the default sees this process only.
        dtype: of the recorded gradients: float32, or bfloat16, which sums micro-batches and ranks in bf16.
        products: how the entries of a weight's gradient are had where nothing else of it is needed (appendix B); None:
            from the whole product.
        reuse_buffer: form all whole products of a step in one buffer.
    """

    def __init__(
        self,
        store: DeltaStore,
        candidates: Mapping[str, int] | None = None,
        *,
        estimation_steps: int = 5,
        select: Select = top_k_magnitude,
        dtype: torch.dtype = torch.float32,
        products: Products | None = None,
        reuse_buffer: bool = True,
    ):
        self.store, self.counts, self.select = store, dict(candidates or {}), select
        self.dtype, self.products, self.reuse_buffer = dtype, products, reuse_buffer
        self.estimation_steps = estimation_steps
        self.phase = Phase.OFF
        self.proposing = False  # this step chooses the candidates
        self.candidates: dict[str, Candidates] = {}
        self.received: set[str] = set()  # weights that were offered a gradient that is not all zero
        self._watching = False  # this step looks for dead gradients
        self._buffer: Tensor | None = None  # for one dense gradient after the other, during a step
        self._allocate(0)

    def _allocate(self, candidates: int) -> None:
        """One flat buffer for all that is summed over ranks: active gradients first, then candidates' gradients."""
        self.flat = torch.zeros(self.store.active + candidates, dtype=self.dtype, device=self.store.device)
        sizes = [delta.active for delta in self.store]
        if candidates:
            sizes += [self.counts[name] for name in self.store.names]
        pieces = self.flat.split(sizes)
        self._active = dict(zip(self.store.names, pieces, strict=False))
        self._candidate = dict(zip(self.store.names, pieces[len(self.store) :], strict=False))

    @property
    def gradients(self) -> Tensor:
        """[sum of K]: the gradients of the active deltas, in the order of the store's flat buffer."""
        return self.flat[: self.store.active]

    def begin_step(self, phase: Phase, *, watch: bool = False) -> None:
        """Forget the last step's gradients, and open an estimation phase where one begins.

        It begins where `phase` proposes, and where all steps before this one in the phase were discarded.

        Args:
            phase: what this step records.
            watch: note in `received` which weights get a gradient, for which all products are formed whole.
        """
        self.phase, self._watching = phase, watch
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
        """The gradients of this step are of no use: candidates that they proposed are forgotten.

        The next step of the phase proposes instead; the estimates have one term less.
        """
        self._watching, self._buffer = False, None
        if self.proposing:
            self.candidates = {}

    def load_candidates(self, name: str, state: Mapping[str, Tensor]) -> None:
        """Take over what `Candidates.state` gave for one weight, in an open estimation phase."""
        indices, mean, square = (state[key].to(self.store.device, copy=True) for key in CANDIDATE_STATE)
        self.candidates[name] = Candidates(Entries(indices, self.store[name].shape), mean, square)

    def record_product(self, name: str, left: Tensor, right: Tensor) -> None:
        """Take from left^T right, the [R, C'] gradient of one weight in one backward pass, what is asked for.

        The product is formed whole where all of its entries are looked at: to propose candidates (section 3.2), and in
        the first step of a run, to find dead gradients.

        Args:
            left: [T, R]. right: [T, C'], of the same dtype.
        """
        if self._watching or (self.phase is not Phase.OFF and name not in self.candidates):
            self.record(name, self._product(left, right))
            return
        wanted = self._wanted(name)
        if self.products is None or not self.products(left, right, wanted):
            pick(self._product(left, right), wanted)

    def _product(self, left: Tensor, right: Tensor) -> Tensor:
        """left^T right [R, C']; where a buffer is reused, in it: to be used before the next is formed."""
        if not self.reuse_buffer:
            return left.t() @ right
        size = left.shape[1] * right.shape[1]
        if self._buffer is None or self._buffer.numel() < size or self._buffer.dtype is not left.dtype:
            largest = max(delta.numel for delta in self.store)
            self._buffer = torch.empty(largest, dtype=left.dtype, device=left.device)
        return torch.mm(left.t(), right, out=self._buffer[:size].view(left.shape[1], right.shape[1]))

    def record(self, name: str, gradient: Tensor) -> None:
        """Take from `gradient`, the dense [O, I] gradient of one weight in one backward pass, what is asked for."""
        if self._watching and name not in self.received and bool(gradient.any()):
            self.received.add(name)
        if self.phase is not Phase.OFF and name not in self.candidates:
            chosen = self.select(gradient.reshape(-1), self.counts[name])
            zeros = torch.zeros(chosen.shape, dtype=torch.float32, device=chosen.device)
            self.candidates[name] = Candidates(Entries(chosen, self.store[name].shape), zeros, zeros.clone())
        pick(gradient, self._wanted(name))

    def _wanted(self, name: str) -> list[tuple[Entries, Tensor]]:
        """Where the gradient of one weight is wanted now, and what it is added to."""
        wanted = [(self.store[name].entries, self._active[name])]
        if self.phase is not Phase.OFF:
            wanted.append((self.candidates[name].entries, self._candidate[name]))
        return wanted

    def end_step(self) -> None:
        """After the buffer is summed over ranks: one more term of the running estimates (Eq. 8)."""
        self._watching, self._buffer = False, None
        if self.phase is Phase.OFF:
            return
        for name, candidates in self.candidates.items():
            gradient = self._candidate[name].float()
            candidates.mean.add_(gradient, alpha=1 / self.estimation_steps)
            candidates.mean_square.addcmul_(gradient, gradient, value=1 / self.estimation_steps)

    def close_estimation(self) -> None:
        """Free the candidates after the reallocation that used them."""
        self.candidates = {}
        self._allocate(0)
