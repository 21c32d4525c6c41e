"""Updates of the deltas: AdamW with one bias correction per cohort (section 3.2), and SM3 (section 3.3).

Shapes: K active entries; O rows, I columns of a weight. The update functions are pure: they touch only their
arguments. The classes hold the state and follow drop and grow.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from .deltas import DeltaStore
from .drop_grow import Exchange
from .indices import Part, on_device, piece_entries, pieces
from .moments import Moments, float32_moments


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
    table: Tensor | None = None,
) -> None:
    """Do one AdamW step on [K] entries in place, each with the bias correction of its own age (section 3.2).

    The order of operations and the place of eps are those of `torch.optim.AdamW` (decoupled decay first); with one
    cohort the result equals it bit for bit.

    Args:
        deltas, gradients, exp_avg, exp_avg_sq: [K] fp32.
        cohort: [K] integers: which entry of `gradients_seen` holds for each delta.
        gradients_seen: by cohort, how many gradients its moments have seen, this one included.
        table: the step's `correction_table`, computed once for all calls; None: computed here if needed.
    """
    beta1, beta2 = betas
    if learning_rate * weight_decay:
        deltas.mul_(1 - learning_rate * weight_decay)
    exp_avg.lerp_(gradients, 1 - beta1)
    exp_avg_sq.mul_(beta2).addcmul_(gradients, gradients, value=1 - beta2)
    if len(gradients_seen) == 1:
        step_sizes, denominators = corrections(gradients_seen, learning_rate, betas)
        denominator = (exp_avg_sq.sqrt() / denominators[0]).add_(eps)
        deltas.addcdiv_(exp_avg, denominator, value=step_sizes[0])
        return
    place = cohort.int()
    if table is None:
        table = correction_table(gradients_seen, learning_rate, betas, deltas.device)
    denominator = exp_avg_sq.sqrt().div_(table[1].index_select(0, place)).add_(eps)
    deltas.add_(table[0].index_select(0, place).mul_(exp_avg).div_(denominator))


def corrections(
    gradients_seen: Sequence[int], learning_rate: float, betas: tuple[float, float]
) -> tuple[list[float], list[float]]:
    """Compute (step sizes, denominators) by cohort.

    They are -learning_rate / (1 - beta1^n) and sqrt(1 - beta2^n) after n gradients; 0 and 1 where n = 0.
    """
    beta1, beta2 = betas
    step_sizes = [-learning_rate / (1 - beta1**n) if n else 0.0 for n in gradients_seen]
    return step_sizes, [(1 - beta2**n) ** 0.5 if n else 1.0 for n in gradients_seen]


def correction_table(
    gradients_seen: Sequence[int],
    learning_rate: float,
    betas: tuple[float, float],
    device: torch.device,
    warmth: Sequence[float] = (),
) -> Tensor:
    """Put `corrections` into a tensor [2, cohorts] fp32 on the device, without waiting for it.

    `warmth` by cohort, if given, scales the step sizes.
    """
    step_sizes, denominators = corrections(gradients_seen, learning_rate, betas)
    if warmth:
        step_sizes = [size * share for size, share in zip(step_sizes, warmth, strict=True)]
    return on_device((step_sizes, denominators), torch.float32, device)


class Coordinates(Protocol):
    """Entries that know their rows and columns, of one weight or of all of them one after the other."""

    def coordinates(self) -> Iterator[tuple[slice, Tensor, Tensor]]:
        """Yield (slice of entries, int64 rows, int64 columns) in pieces."""


def sm3_update(
    deltas: Tensor,
    gradients: Tensor,
    entries: Coordinates,
    row: Tensor,
    col: Tensor,
    *,
    learning_rate: float,
    eps: float,
    weight_decay: float,
) -> None:
    """Do one SM3-II step (Anil et al. 2019) restricted to the [K] active entries, in place.

    nu = min(row[i], col[j]) + g^2; row[i] = max over the row's active nu, col likewise;
    delta -= learning_rate * g / sqrt(nu + eps), decoupled decay first.

    Args:
        deltas: [K] fp32 or bf16 (rounded once, at the end). gradients: [K] fp32 or bf16.
        entries: their places, in one [O, I] weight or in all.
        row: [O] fp32. col: [I] fp32: accumulators, of one weight or of all.
    """
    new_row, new_col = row.clone(), col.clone()
    for part, i, j in entries.coordinates():
        gradient = gradients[part].float()
        nu = torch.minimum(row.index_select(0, i), col.index_select(0, j)).addcmul_(gradient, gradient)
        new_row.scatter_reduce_(0, i, nu, "amax")
        new_col.scatter_reduce_(0, j, nu, "amax")
        with in_fp32(deltas[part]) as moved:
            if learning_rate * weight_decay:
                moved.mul_(1 - learning_rate * weight_decay)
            moved.addcdiv_(gradient, nu.add_(eps).sqrt_(), value=-learning_rate)
    row.copy_(new_row)
    col.copy_(new_col)


@contextmanager
def in_fp32(deltas: Tensor) -> Iterator[Tensor]:
    """Yield deltas to update in place: fp32 ones themselves; of bf16 ones a copy, rounded back once at the end."""
    if deltas.dtype is torch.float32:
        yield deltas
        return
    work = deltas.float()
    yield work
    deltas.copy_(work)


@dataclass(frozen=True)
class Growth:
    """How newly grown entries begin in AdamW."""

    seed_moments: bool = True
    """Start their moments from the estimates of the phase that chose them (section 3.2), or from zero."""
    warmup_steps: int = 0
    """Let their rate rise linearly over this many updates."""


class Optimizer(Protocol):
    """An optimizer of deltas, as the main loop and checkpoints use it."""

    eps: float
    weight_decay: float

    def step(self, gradients: Tensor, learning_rate: float) -> None: ...

    def follow(self, part: Part, exchange: Exchange, estimates: tuple[Tensor, Tensor] | None) -> None: ...

    def begin_cohort(self) -> None: ...

    def state_of(self, name: str) -> dict[str, Tensor]: ...

    def counters(self) -> dict[str, list[int]]: ...

    def load_counters(self, counters: Mapping[str, list[int]]) -> None: ...


class AdamW:
    """AdamW for `ag` and `static`: two moments per delta and one age per cohort.

    Args:
        store: the deltas.
        estimation_steps: G, the gradients already counted in the moments of a newly grown delta.
        moments: creates the storage of the two moments.
        growth: how newly grown entries begin.
    """

    def __init__(
        self,
        store: DeltaStore,
        *,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        estimation_steps: int = 5,
        moments: Moments = float32_moments,
        growth: Growth | None = None,
    ):
        self.growth = growth or Growth()
        self.store, self.betas, self.eps, self.weight_decay = store, betas, eps, weight_decay
        self.estimation_steps = estimation_steps
        self.exp_avg, self.exp_avg_sq = moments(store)
        self.gradients_seen = [0]  # by cohort

    def step(self, gradients: Tensor, learning_rate: float) -> None:
        """Update all deltas with `gradients` [sum of K] fp32 or bf16, the gradient of the global batch."""
        table, store = self.count_gradient(learning_rate), self.store
        for part in self._parts():
            exp_avg, exp_avg_sq = self.exp_avg.load(part), self.exp_avg_sq.load(part)
            with in_fp32(store.flat[part]) as deltas:
                adamw_update(
                    deltas,
                    gradients[part].float(),
                    exp_avg,
                    exp_avg_sq,
                    store.cohort[part],
                    self.gradients_seen,
                    learning_rate=learning_rate,
                    betas=self.betas,
                    eps=self.eps,
                    weight_decay=self.weight_decay,
                    table=table,
                )
            self.exp_avg.store(part, exp_avg)
            self.exp_avg_sq.store(part, exp_avg_sq)

    def _parts(self) -> Iterator[slice]:
        """Yield parts of all entries that can be updated at once."""
        size, starts = piece_entries(self.store.device), self.store.places.starts
        if self.exp_avg.crosses_weights and self.exp_avg_sq.crosses_weights:
            yield from pieces(self.store.active, size)
            return
        for start, stop in itertools.pairwise(starts):
            for piece in pieces(stop - start, size):
                yield slice(start + piece.start, start + piece.stop)

    def count_gradient(self, learning_rate: float) -> Tensor:
        """Count one more gradient for every cohort; returns the `correction_table` [2, cohorts] fp32.

        `step` does this itself; code that updates the deltas in another way calls it once per step.
        """
        self.gradients_seen = [n + 1 for n in self.gradients_seen]
        return correction_table(self.gradients_seen, learning_rate, self.betas, self.store.device, self._warmth())

    @property
    def _seen_at_birth(self) -> int:
        """How many gradients the moments of a newly grown delta have seen."""
        return self.estimation_steps if self.growth.seed_moments else 0

    def _warmth(self) -> list[float]:
        """Compute by cohort the fraction of the learning rate that holds for it; the first is never warmed up."""
        if not self.growth.warmup_steps:
            return []
        updates = [n - self._seen_at_birth for n in self.gradients_seen[1:]]
        return [1.0, *(min(1.0, n / self.growth.warmup_steps) for n in updates)]

    def estimates(self, part: Part) -> tuple[Tensor, Tensor]:
        """Return the moments of whole weights' entries with their bias corrected: [n] fp32 each; 0 before any update.

        They estimate the gradients' mean and mean square, as those of candidates do.
        """
        places, found = self.store.places, []
        place = self.store.cohort[part.entries].int()
        for moment, beta in zip((self.exp_avg, self.exp_avg_sq), self.betas, strict=True):
            values = torch.cat([moment.load(places.range_of(number)) for number in part.numbers])
            weights = torch.tensor([1 - beta**n if n else 1.0 for n in self.gradients_seen], device=values.device)
            found.append(values / weights.index_select(0, place))
        return found[0], found[1]

    def begin_cohort(self) -> None:
        """Open the cohort that the next drop and grow fills; seeded moments start with G gradients counted."""
        self.gradients_seen.append(self._seen_at_birth)

    def follow(self, part: Part, exchange: Exchange, estimates: tuple[Tensor, Tensor] | None) -> None:
        """Move the moments with the entries, and seed grown ones from their estimates (section 3.2), or with zero.

        Args:
            part: whole weights.
            exchange: of their entries.
            estimates: mean and mean square of their candidates' gradients, [c] each (Eq. 8).
        """
        if estimates is None:
            raise ValueError("an exchange by gradient needs the estimates of its candidates")
        picked, weights = exchange.grown_candidates, [self.store.places.range_of(number) for number in part.numbers]
        for moment, beta, estimate in zip((self.exp_avg, self.exp_avg_sq), self.betas, estimates, strict=True):
            seed = (estimate if picked is None else estimate[picked]) * (1 - beta**self._seen_at_birth)
            if moment.crosses_weights:
                moment.store(part.entries, exchange.merge(moment.load(part.entries), seed))
                continue
            moved = exchange.merge(torch.cat([moment.load(entries) for entries in weights]), seed)
            for entries, values in zip(weights, moved.split([w.stop - w.start for w in weights]), strict=True):
                moment.store(entries, values)

    def state_of(self, name: str) -> dict[str, Tensor]:
        """Return the state tensors of one weight, by name; views, not copies."""
        kept = {"exp_avg": self.exp_avg.state(name), "exp_avg_sq": self.exp_avg_sq.state(name)}
        return {moment + suffix: tensor for moment, state in kept.items() for suffix, tensor in state.items()}

    def counters(self) -> dict[str, list[int]]:
        """Return the state that is not tensors: by cohort, how many gradients its moments have seen."""
        return {"gradients_seen": list(self.gradients_seen)}

    def load_counters(self, counters: Mapping[str, list[int]]) -> None:
        self.gradients_seen = list(counters["gradients_seen"])


class SM3:
    """SM3 for `ma`: one accumulator per row and per column of each weight; they survive drop and grow.

    `rows` [R] and `columns` hold those of all weights, one after the other (see `indices.Rows`).
    """

    def __init__(self, store: DeltaStore, *, eps: float = 1e-8, weight_decay: float = 0.0):
        self.store, self.eps, self.weight_decay = store, eps, weight_decay
        rows = store.places.rows
        self.rows = torch.zeros(rows.starts[-1], device=store.device)
        self.columns = torch.zeros(rows.first_columns[-1], device=store.device)
        self._of = {}
        for number, delta in enumerate(store):
            row, column = rows.starts[number], rows.first_columns[number]
            of_rows, of_columns = self.rows[row : row + delta.shape[0]], self.columns[column : column + delta.shape[1]]
            self._of[delta.name] = {"row": of_rows, "col": of_columns}

    def step(self, gradients: Tensor, learning_rate: float) -> None:
        """Update all deltas with `gradients` [sum of K] fp32 or bf16, the gradient of the global batch."""
        sm3_update(
            self.store.flat,
            gradients,
            self.store.places,
            self.rows,
            self.columns,
            learning_rate=learning_rate,
            eps=self.eps,
            weight_decay=self.weight_decay,
        )

    def begin_cohort(self) -> None:
        """SM3 has no ages."""

    def follow(self, part: Part, exchange: Exchange, estimates: tuple[Tensor, Tensor] | None) -> None:
        """Move nothing: the accumulators belong to rows and columns, not to entries."""

    def state_of(self, name: str) -> dict[str, Tensor]:
        """Return the state tensors of one weight, by name; views, not copies."""
        return dict(self._of[name])

    def counters(self) -> dict[str, list[int]]:
        """SM3 counts nothing."""
        return {}

    def load_counters(self, counters: Mapping[str, list[int]]) -> None:
        """SM3 counts nothing."""
