"""Updates of the deltas: AdamW with one bias correction per cohort (section 3.2), and SM3 (section 3.3).

Shapes: K active entries; O rows, I columns of a weight. The update functions are pure: they touch only their
arguments. The classes hold the state and follow drop and grow.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Protocol

import torch
from torch import Tensor

from .delta import DeltaStore, SparseDelta
from .reallocate import Exchange
from .sampling import Candidates

CHUNK_ENTRIES = 1 << 22


def adamw_update(
    deltas: Tensor,
    gradients: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    cohort: Tensor,
    gradients_seen: Sequence[int],
    *,
    learning_rate: float,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
) -> None:
    """One AdamW step on [K] entries in place, each with the bias correction of its own age (section 3.2).

    The order of operations and the place of eps are those of `torch.optim.AdamW` (decoupled decay first); with one
    cohort the result equals it bit for bit.

    Args:
        deltas, gradients, exp_avg, exp_avg_sq: [K] fp32.
        cohort: [K] integers: which entry of `gradients_seen` holds for each delta.
        gradients_seen: by cohort, how many gradients its moments have seen, this one included.
    """
    beta1, beta2 = betas
    deltas.mul_(1 - learning_rate * weight_decay)
    exp_avg.lerp_(gradients, 1 - beta1)
    exp_avg_sq.mul_(beta2).addcmul_(gradients, gradients, value=1 - beta2)
    step_sizes = [-learning_rate / (1 - beta1**n) if n else 0.0 for n in gradients_seen]
    denominators = [(1 - beta2**n) ** 0.5 if n else 1.0 for n in gradients_seen]
    if len(gradients_seen) == 1:
        denominator = (exp_avg_sq.sqrt() / denominators[0]).add_(eps)
        deltas.addcdiv_(exp_avg, denominator, value=step_sizes[0])
        return
    place = cohort.int()
    table = torch.tensor([step_sizes, denominators], dtype=torch.float32).to(deltas.device)
    denominator = exp_avg_sq.sqrt().div_(table[1].index_select(0, place)).add_(eps)
    deltas.add_(table[0].index_select(0, place).mul_(exp_avg).div_(denominator))


def sm3_update(
    deltas: Tensor,
    gradients: Tensor,
    indices: Tensor,
    row: Tensor,
    col: Tensor,
    *,
    learning_rate: float,
    eps: float,
    weight_decay: float,
) -> None:
    """One SM3-II step (Anil et al. 2019) restricted to the [K] active entries of an [O, I] weight, in place.

    nu = min(row[i], col[j]) + g^2; row[i] = max over the row's active nu, col likewise;
    delta -= learning_rate * g / sqrt(nu + eps), decoupled decay first.

    Args:
        deltas, gradients: [K] fp32. indices: [K] flat. row: [O] fp32. col: [I] fp32.
    """
    i, j = indices // col.numel(), indices % col.numel()
    nu = torch.minimum(row.index_select(0, i), col.index_select(0, j)).addcmul_(gradients, gradients)
    row.scatter_reduce_(0, i.long(), nu, "amax")
    col.scatter_reduce_(0, j.long(), nu, "amax")
    deltas.mul_(1 - learning_rate * weight_decay)
    deltas.addcdiv_(gradients, nu.add_(eps).sqrt_(), value=-learning_rate)


@contextmanager
def in_fp32(deltas: Tensor) -> Iterator[Tensor]:
    """Deltas to update in place: themselves where they are fp32; of bf16 ones a copy, rounded once, at the end."""
    if deltas.dtype is torch.float32:
        yield deltas
        return
    work = deltas.float()
    yield work
    deltas.copy_(work)


class Optimizer(Protocol):
    """What the main loop and the checkpoint ask of an optimizer."""

    def step(self, gradients: Tensor, learning_rate: float) -> None: ...

    def follow(self, delta: SparseDelta, exchange: Exchange, candidates: Candidates | None) -> None: ...

    def begin_cohort(self) -> None: ...

    def state_of(self, name: str) -> dict[str, Tensor]: ...

    def counters(self) -> dict[str, list[int]]: ...

    def load_counters(self, counters: Mapping[str, list[int]]) -> None: ...


class AdamW:
    """AdamW for `ag` and `static`: two moments per delta and one age per cohort.

    Args:
        store: the deltas; the moments follow its flat layout.
        estimation_steps: G: how many gradients the moments of a grown delta have seen when it is grown.
    """

    def __init__(
        self,
        store: DeltaStore,
        *,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        estimation_steps: int = 5,
    ):
        self.store, self.betas, self.eps, self.weight_decay = store, betas, eps, weight_decay
        self.estimation_steps = estimation_steps
        self.exp_avg = torch.zeros_like(store.flat, dtype=torch.float32)
        self.exp_avg_sq = torch.zeros_like(store.flat, dtype=torch.float32)
        self.gradients_seen = [0]  # by cohort
        self._views = _views(store, self.exp_avg), _views(store, self.exp_avg_sq)

    def step(self, gradients: Tensor, learning_rate: float) -> None:
        """Update all deltas with `gradients` [sum of K] fp32, the gradient of the global batch."""
        self.gradients_seen = [n + 1 for n in self.gradients_seen]
        for flat, cohort, first in self._chunks():
            part = slice(first, first + flat.numel())
            with in_fp32(flat) as deltas:
                adamw_update(
                    deltas,
                    gradients[part],
                    self.exp_avg[part],
                    self.exp_avg_sq[part],
                    cohort,
                    self.gradients_seen,
                    learning_rate=learning_rate,
                    betas=self.betas,
                    eps=self.eps,
                    weight_decay=self.weight_decay,
                )

    def _chunks(self):
        """(deltas, cohort, first position) of pieces that keep temporaries small: all at once for small models."""
        if self.store.active <= CHUNK_ENTRIES:
            yield self.store.flat, torch.cat([delta.cohort for delta in self.store]), 0
            return
        first = 0
        for delta in self.store:
            for start in range(0, delta.active, CHUNK_ENTRIES):
                part = slice(start, min(start + CHUNK_ENTRIES, delta.active))
                yield delta.deltas[part], delta.cohort[part], first + start
            first += delta.active

    def begin_cohort(self) -> None:
        """Open the cohort of the deltas that the coming drop and grow will grow; they have seen G gradients."""
        self.gradients_seen.append(self.estimation_steps)

    def follow(self, delta: SparseDelta, exchange: Exchange, candidates: Candidates | None) -> None:
        """Move the moments with the entries; grown ones are seeded from their estimates (section 3.2)."""
        beta1, beta2 = self.betas
        exp_avg, exp_avg_sq = self._views[0][delta.name], self._views[1][delta.name]
        picked = exchange.grown_candidates
        mean = candidates.mean[picked] * (1 - beta1**self.estimation_steps)
        mean_square = candidates.mean_square[picked] * (1 - beta2**self.estimation_steps)
        exp_avg.copy_(exchange.merge(exp_avg, mean))
        exp_avg_sq.copy_(exchange.merge(exp_avg_sq, mean_square))

    def state_of(self, name: str) -> dict[str, Tensor]:
        """The state tensors of one weight, by name; views, not copies."""
        return {"exp_avg": self._views[0][name], "exp_avg_sq": self._views[1][name]}

    def counters(self) -> dict[str, list[int]]:
        """What is no tensor: by cohort, how many gradients its moments have seen."""
        return {"gradients_seen": list(self.gradients_seen)}

    def load_counters(self, counters: Mapping[str, list[int]]) -> None:
        self.gradients_seen = list(counters["gradients_seen"])


class SM3:
    """SM3 for `ma`: one accumulator per row and per column of each weight; they survive drop and grow."""

    def __init__(self, store: DeltaStore, *, eps: float = 1e-8, weight_decay: float = 0.0):
        self.store, self.eps, self.weight_decay = store, eps, weight_decay
        device = store.device
        self.row = {delta.name: torch.zeros(delta.shape[0], device=device) for delta in store}
        self.col = {delta.name: torch.zeros(delta.shape[1], device=device) for delta in store}

    def step(self, gradients: Tensor, learning_rate: float) -> None:
        """Update all deltas with `gradients` [sum of K] fp32, the gradient of the global batch."""
        first = 0
        for delta in self.store:
            with in_fp32(delta.deltas) as deltas:
                sm3_update(
                    deltas,
                    gradients[first : first + delta.active],
                    delta.indices,
                    self.row[delta.name],
                    self.col[delta.name],
                    learning_rate=learning_rate,
                    eps=self.eps,
                    weight_decay=self.weight_decay,
                )
            first += delta.active

    def begin_cohort(self) -> None:
        """SM3 has no ages."""

    def follow(self, delta: SparseDelta, exchange: Exchange, candidates: Candidates | None) -> None:
        """The accumulators belong to rows and columns, not to entries: nothing moves."""

    def state_of(self, name: str) -> dict[str, Tensor]:
        """The state tensors of one weight, by name; views, not copies."""
        return {"row": self.row[name], "col": self.col[name]}

    def counters(self) -> dict[str, list[int]]:
        """SM3 counts nothing."""
        return {}

    def load_counters(self, counters: Mapping[str, list[int]]) -> None:
        """SM3 counts nothing."""


def _views(store: DeltaStore, flat: Tensor) -> Mapping[str, Tensor]:
    """Cuts `flat` as the store's flat buffer is cut."""
    pieces = flat.split([delta.active for delta in store])
    return dict(zip(store.names, pieces, strict=True))
