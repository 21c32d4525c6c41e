"""Algorithms 1 and 2 without their model: update, drop, grow over all weights.

For each step the caller runs `begin_step`, backward passes that feed the recorder, a sum of `recorder.flat` over
ranks if there are several, then `update` and, where the schedule says so, `reallocate`.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor

from .deltas import DeltaStore, SparseDelta
from .digests import digest_states
from .drop_grow import (
    Exchange,
    apply_exchange,
    drop_scores,
    exchange_tiles,
    keep_unless_better,
    positive_products,
)
from .indices import Part, on_device, piece_entries
from .joined_drop_grow import exchange_by_accumulators, exchange_by_gradient
from .optimizers import SM3, AdamW, Optimizer
from .recorder import CANDIDATE_STATE, Candidates, Gradient, GradientRecorder, candidates_of, largest
from .schedules import Phase, ReallocationSchedule
from .selection.proposals import Proposals
from .selection.rule import SelectionRule
from .selection.spread import update_rates
from .selection.tile_keys import growth_keys
from .settings import Backends, MethodSettings
from .state_check import wrong_with
from .tile_recorder import SKETCH, TileRecorder, sketched

FEW, MANY = 1 << 10, 1 << 6
"""On a CPU, weights of at most so many entries are reallocated together if there are so many of them."""


class Carrier(Protocol):
    """The object that carries the deltas into the forward pass."""

    def write(self) -> None:
        """Show the new values of all deltas to the forward pass."""

    def release(self, *deltas: SparseDelta) -> None:
        """Remove some weights' deltas before their indices change."""

    def adopt(self, *deltas: SparseDelta) -> None:
        """Take over some weights' new indices; a `write` follows."""


@dataclass(frozen=True)
class Turnover:
    """Counts of one reallocation, over all weights."""

    number: int  # counted from 1; also the cohort of the grown entries
    step: int
    active: int
    replaced: int  # entries active now that were not before
    dropped: int


class SparseFineTuning:
    """SFT-AG, SFT-MA, or a choice that stays (static, random, columns), over a store of deltas.

    Args:
        store: the deltas; with a reference where the drop criterion is `change`.
        settings: the method and its hyperparameters.
        schedule: the steps that reallocate, and how many entries each of them replaces.
        backends: implementations to compute with; the default is plain torch in one process.
    """

    def __init__(
        self,
        store: DeltaStore,
        settings: MethodSettings,
        schedule: ReallocationSchedule,
        backends: Backends | None = None,
    ):
        backends = backends or Backends()
        self.store, self.settings, self.schedule, self.exchanges = store, settings, schedule, backends.exchanges
        self.proposals = backends.proposals
        self.together = store.device.type != "cpu" if backends.together is None else backends.together
        self._whole_tiles = any(delta.tiles is not None for delta in store)
        self.together = self.together and not settings.exchange_if_better and not self._whole_tiles
        self._rates: Tensor | None = None  # [sum of K] fp32, where updates are scaled
        self.cohort_steps = [0]  # by cohort: the step that grew it
        decay = {"eps": settings.eps, "weight_decay": settings.weight_decay}
        self.optimizer: Optimizer
        if settings.method == "ma":
            self.optimizer = SM3(store, **decay)
        else:
            self.optimizer = AdamW(
                store,
                betas=settings.betas,
                **decay,
                estimation_steps=schedule.estimation_steps,
                moments=backends.moments,
                growth=replace(settings.growth, seed_moments=False) if self._whole_tiles else settings.growth,
            )
        self.recorder = self._make_recorder(backends)

    def _make_recorder(self, backends: Backends) -> GradientRecorder:
        store, steps = self.store, self.schedule.estimation_steps
        if self._whole_tiles:
            return TileRecorder(
                store,
                estimation_steps=steps,
                dtype=backends.gradient_dtype,
                seed=self.settings.seed,
                round_number=lambda: len(self.cohort_steps),
            )
        return GradientRecorder(
            store,
            candidates_of(store, self.settings.candidate_ratio),
            estimation_steps=steps,
            propose=self._propose if backends.proposals else largest(backends.select, backends.sum_),
            dtype=backends.gradient_dtype,
            products=backends.products,
            reuse_buffer=backends.reuse_buffer,
        )

    @property
    def method(self) -> str:
        """`ag`, `ma`, `static`, `random` or `columns`."""
        return self.settings.method

    def begin_step(self, step: int) -> None:
        """Open step `step` (counted from 1): zero the gradients, and open an estimation phase where one begins."""
        self.recorder.begin_step(self.schedule.phase(step), watch=step == 1)

    def needed(self, name: str, factor: Tensor, step: int, *, left: bool) -> Tensor:
        """Return the columns of a factor of a weight's gradient that step `step` needs: [T, n] of [T, O or I].

        Args:
            name: of the weight, of which whole tiles are trained.
            factor: [T, O] if `left`, otherwise [T, I].
            step: of the forward pass; in an estimation phase sketches need all.
        """
        if self.schedule.phase(step) is not Phase.OFF or not isinstance(self.recorder, TileRecorder):
            return factor
        return self.recorder.needed(name, factor, left=left)

    def clip(self) -> Tensor:
        """Clip the recorded gradients in place; returns the norm of the active ones before that, an fp32 scalar."""
        norm = torch.linalg.vector_norm(self.recorder.gradients, dtype=torch.float32)
        if self.settings.max_grad_norm is not None:
            self.recorder.flat.mul_((self.settings.max_grad_norm / (norm + 1e-6)).clamp(max=1.0))
        return norm

    @property
    def candidates_are_finite(self) -> bool:
        """Return True if all candidates' recorded gradients are finite; the norm from `clip` covers the active ones."""
        others = self.recorder.flat[self.store.active :]
        return not others.numel() or bool(others.isfinite().all())

    def update(self, learning_rate: float) -> None:
        """Do one optimizer step on all deltas, and add one term to the candidates' estimates."""
        self.recorder.end_step()
        if not self.settings.scale_rates:
            self.optimizer.step(self.recorder.gradients, learning_rate)
            return
        if self._rates is None:
            self._rates = torch.cat([update_rates(delta.entries) for delta in self.store])
        before = self.store.flat.to(torch.float32, copy=True)
        self.optimizer.step(self.recorder.gradients, learning_rate)
        self.store.flat.copy_(torch.lerp(before, self.store.flat.float(), self._rates))

    def reallocate(self, step: int, carrier: Carrier) -> Turnover:
        """Drop and grow in every weight, at the end of step `step` (lines 9 to 16 of Algorithm 1)."""
        number = len(self.cohort_steps)
        self.cohort_steps.append(step)
        self.optimizer.begin_cohort()
        names, replaced, dropped = self.store.names, [], []
        for part in self._reallocated():
            deltas = [self.store[names[weight]] for weight in part.numbers]
            joined = deltas[0] if self._alone(part) else self.store.together(part)
            wanted = [self._replaced(step, delta) for delta in deltas]
            scores = drop_scores(joined, self.settings.drop_criterion, self._ages(step))
            exchange = self._exchange(part, scores, wanted)
            self.optimizer.follow(part, exchange, self._estimates(part, exchange))
            carrier.release(*deltas)
            apply_exchange(joined, exchange, number)
            carrier.adopt(*deltas)
            replaced.append(exchange.replaced)
            dropped.append(exchange.kept.numel() - exchange.kept.sum())
        self.recorder.close_estimation()
        self._rates = None
        return Turnover(number, step, self.store.active, int(sum(replaced)), int(sum(dropped)))

    def _replaced(self, step: int, delta: SparseDelta) -> int:
        """Count the entries, or tiles, of a weight to replace: as scheduled, but no more than have a gradient.

        An expert that met no token has none. Of an embedding, rows of tokens that no batch had have none.
        """
        if delta.tiles is not None:
            return self.schedule.replaced_tiles(step, delta.tiles.numbers.numel())
        if not self._may_grow(delta.name):
            return 0
        wanted = self.schedule.replaced(step, delta.active)
        if delta.name not in self.recorder.by_rows:
            return wanted
        if isinstance(self.optimizer, SM3):
            state = self.optimizer.state_of(delta.name)
            return min(wanted, positive_products(delta.entries, state["row"], state["col"]))
        number = self.store.number_of(delta.name)
        part = self.store.places.part_of(slice(number, number + 1))
        able = self._ranking(part) != 0
        if self.proposals is None or self.proposals.reads_gradients:  # keys of a draw are never 0
            able &= self.recorder.estimates_of(part)[0] != 0
        able &= ~torch.isin(self.recorder.candidates[delta.name].indices, delta.indices)
        return min(wanted, int(able.sum()))

    def _ages(self, step: int) -> Tensor | None:
        """Count the steps since each cohort was grown, [cohorts] fp32, at least 1; None: nothing is dropped by age."""
        if self.settings.drop_criterion != "age":
            return None
        ages = [max(1.0, float(step - born)) for born in self.cohort_steps]
        return on_device(ages, torch.float32, self.store.device)

    @property
    def can_reallocate(self) -> bool:
        """Return False if every step of the estimation phase was discarded, so that nothing can grow."""
        return self.method == "ma" or self.recorder.has_estimates

    def _reallocated(self) -> Iterator[Part]:
        """Yield the weights to reallocate: all that know what could grow, many at once or one by one."""
        names, places = self.store.names, self.store.places
        numbers = [number for number, name in enumerate(names) if self._may_grow(name)]
        if self.together:
            yield from places.groups(numbers, piece_entries(self.store.device) // (2 if self.method == "ma" else 4))
            return
        few = [number for number, count in enumerate(places.counts) if count <= FEW]
        if self.settings.exchange_if_better or self._whole_tiles or len(few) < MANY:
            few = []
        elif self.method != "ma":
            for number in few:  # those that cannot grow go with the others, unchanged
                if not self._may_grow(names[number]):
                    self.recorder.stand_in(names[number])
        yield from places.groups(few, FEW * MANY)
        small = set(few)
        yield from places.groups([number for number in numbers if number not in small], 1)

    def _may_grow(self, name: str) -> bool:
        """Return False if no gradient has reached a weight in the phase."""
        return self.method == "ma" or self._whole_tiles or name in self.recorder.candidates

    def _alone(self, part: Part) -> bool:
        """Return True for a part that is one weight, reallocated by itself."""
        return not self.together and len(part.numbers) == 1

    def _estimates(self, part: Part, exchange: Exchange) -> tuple[Tensor, Tensor] | None:
        if self.method == "ma":
            return None
        if self._whole_tiles:  # sketches tell norms, not gradients
            zeros = torch.zeros(exchange.grown.shape, device=exchange.grown.device)
            return zeros, zeros
        mean, mean_square = self.recorder.estimates_of(part)
        return mean, mean_square

    def _exchange(self, part: Part, scores: Tensor, wanted: list[int]) -> Exchange:
        optimizer, recorder, places = self.optimizer, self.recorder, self.store.places
        if not self._alone(part):
            if isinstance(optimizer, SM3):
                return exchange_by_accumulators(places, part, scores, optimizer.rows, optimizer.columns, wanted)
            return exchange_by_gradient(places, recorder.places, part, scores, self._ranking(part), wanted)
        delta, (k,) = self.store[self.store.names[part.weights.start]], wanted
        if delta.tiles is not None:
            return self._exchange_tiles(delta, scores, k)
        if self.method == "ma":
            state = optimizer.state_of(delta.name)
            k = k if bool(state["row"].any()) else 0  # no gradient has ever reached it
            return self.exchanges.exchange_by_accumulators(delta.indices, scores, state["row"], state["col"], k)
        candidates, ranking, indices = recorder.candidates[delta.name], self._ranking(part), delta.indices
        exchange = self.exchanges.exchange_by_gradient(indices, scores, candidates.indices, ranking, k)
        if not self.settings.exchange_if_better or not isinstance(optimizer, AdamW):
            return exchange
        leaving = ~exchange.kept
        mean, square = (estimate[leaving] for estimate in optimizer.estimates(part))
        own = Candidates(candidates.entries, mean, square, candidates.facts)
        promised = mean if self.proposals is None else self._rank(delta, own, self.proposals, indices[leaving])
        return keep_unless_better(exchange, indices, promised.abs(), ranking[exchange.grown_candidates].abs())

    def _exchange_tiles(self, delta: SparseDelta, scores: Tensor, k: int) -> Exchange:
        """Exchange whole tiles by the norms of their mean gradient, whatever score made the first choice."""
        recorder, number = self.recorder, len(self.cohort_steps) - 1
        assert isinstance(recorder, TileRecorder)
        norms = recorder.norms_of(delta.name)
        rule = self.proposals.rule if self.proposals else SelectionRule()
        keys, better = growth_keys(rule, delta.name, norms, number), self.settings.exchange_if_better
        return exchange_tiles(recorder.tiles(delta.name), delta.indices, scores, keys, norms > 0, k, if_better=better)

    def _propose(self, name: str, gradient: Gradient, count: int) -> tuple[Tensor, dict[str, Tensor]]:
        """Choose candidates for the next reallocation by the rule of `proposals`."""
        assert self.proposals is not None
        return self.proposals.propose(name, gradient, count, len(self.cohort_steps))

    def _ranking(self, part: Part) -> Tensor:
        """Return values [c] fp32 of which the largest magnitudes grow first, in the reallocation under way."""
        if self.proposals is None:
            return self.recorder.estimates_of(part)[0]
        deltas, known = [self.store[self.store.names[number]] for number in part.numbers], self.recorder.candidates
        nothing = lambda name: torch.zeros(self.recorder.counts[name], device=self.store.device)
        return torch.cat(
            [
                self._rank(delta, known[delta.name], self.proposals) if delta.name in known else nothing(delta.name)
                for delta in deltas
            ]
        )

    def _rank(
        self, delta: SparseDelta, candidates: Candidates, proposals: Proposals, indices: Tensor | None = None
    ) -> Tensor:
        return proposals.rank(
            delta.name,
            delta.shape[1],
            candidates.indices if indices is None else indices,
            candidates.mean,
            candidates.mean_square,
            candidates.facts,
            len(self.cohort_steps) - 1,
        )

    def discard_step(self) -> None:
        """Ignore this step's gradients: no update and no estimate. Only the step count advances."""
        self.recorder.discard_step()

    def digests(self) -> dict[str, str]:
        """Digest each weight's whole state, where it is: equal on all ranks, or something is wrong."""
        return digest_states((name, self.state_of(name)) for name in self.store.names)

    # --- what the next step needs -------------------------------------------------------------------------------

    def state_of(self, name: str) -> dict[str, Tensor]:
        """Return one weight's tensors that outlive a step, as views; in an estimation phase, candidates too."""
        return {**self.store[name].state(), **self._moving_state_of(name)}

    def _moving_state_of(self, name: str) -> dict[str, Tensor]:
        return {**self.optimizer.state_of(name), **self.recorder.estimation_state(name)}

    def state_bytes(self) -> dict[str, int]:
        """Count the bytes in use by purpose; gradients include those of candidates in an estimation phase."""
        kept: dict[str, list[Tensor]] = {"gradients": [self.recorder.flat]}
        for name in self.store.names:
            parts = {**self.store[name].tensors, "optimizer": list(self.optimizer.state_of(name).values())}
            parts["candidates"] = self.recorder.estimation_tensors(name)
            for part, tensors in parts.items():
                kept.setdefault(part, []).extend(tensors)
        return {part: sum(tensor.nbytes for tensor in tensors) for part, tensors in kept.items() if tensors}

    def is_finite(self) -> bool:
        """Return True if no delta and no optimizer state has overflowed, so that the state is worth saving."""
        states = [self.store.flat, *(t for name in self.store.names for t in self.optimizer.state_of(name).values())]
        return all(bool(tensor.isfinite().all()) for tensor in states)

    def counters(self) -> dict[str, list[int]]:
        """Return the part of the state that is not tensors."""
        return {"cohort_steps": list(self.cohort_steps), **self.optimizer.counters()}

    def wrong_with_state(self, name: str, state: Mapping[str, Tensor], step: int, cohorts: int) -> str | None:
        """Explain why `state` cannot be one weight's state after `step` with this many cohorts; None if it can be."""
        delta = self.store[name]
        own = {**delta.state(), **self.optimizer.state_of(name)}
        expected = {kind: (tuple(tensor.shape), tensor.dtype) for kind, tensor in own.items()}
        if delta.tiles is not None:
            shapes = {SKETCH: sketched(delta.tiles.tiling)} if self._estimating_after(step) else {}
            expected |= {kind: (shape, torch.float32) for kind, shape in shapes.items()}
        elif self._estimating_after(step) and CANDIDATE_STATE[0] in state:
            count = (self.recorder.counts[name],)
            dtypes = (delta.entries.dtype, torch.float32, torch.float32)
            expected |= {kind: (count, dtype) for kind, dtype in zip(CANDIDATE_STATE, dtypes, strict=True)}
            facts = self.proposals.facts(delta.shape, *count) if self.proposals else {}
            expected |= {kind: (shape, torch.float32) for kind, shape in facts.items()}
        return wrong_with(delta, state, expected, cohorts)

    def load_state(
        self, step: int, states: Iterable[tuple[str, Mapping[str, Tensor]]], counters: Mapping[str, list[int]]
    ) -> None:
        """Resume after `step` from `state_of` and `counters`; the carrier must release before, and adopt after."""
        self._rates = None
        self.cohort_steps = list(counters["cohort_steps"])
        self.optimizer.load_counters(counters)
        if self._estimating_after(step):
            self.recorder.open_estimation()
        for name, state in states:
            self.store[name].load_state(state)
            for kind, tensor in self.optimizer.state_of(name).items():
                tensor.copy_(state[kind])
            if self._estimating_after(step):
                self.recorder.load_estimation(name, state)

    def _estimating_after(self, step: int) -> bool:
        """Return True if an estimation phase is open at the end of `step`."""
        return self.schedule.phase(step + 1) is Phase.ESTIMATE
