"""The owner of an optimizer step: Algorithm 1 after the backward passes, as a `torch.optim.Optimizer`."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Mapping
from math import inf, isfinite
from numbers import Real
from typing import Any

import torch
from torch import Tensor

from scale_sft.errors import UserError
from scale_sft.spiel.algorithm import SparseFineTuning, Turnover
from scale_sft.spiel.schedules import LearningRateSchedule, Phase

from .first_choice import expect_state
from .fused_step import update_and_write
from .resident import ResidentDeltas
from .stepped import Sparse
from .targets import unreached


class SparseOptimizer(torch.optim.Optimizer):
    """An optimizer, AdamW or SM3, of a `SparseModel`'s deltas, with drop and grow where the schedule says so.

        >>> optimizer = sparse.optimizer(lr=1e-2)
        >>> model(**batch).loss.backward()
        >>> optimizer.step()

    Gradients come from the backward passes themselves and add up until `step`; `param_groups[0]["lr"]` is read by
    each step, so torch's schedulers work, and so does `clip_grad_norm_(model.parameters(), ...)`. With several
    processes `step` averages gradients over them, as DistributedDataParallel would, but only then: before it each
    process sees its own, so clip with option max_grad_norm, which is applied to the average.

    The trainer runs the same step in pieces: `begin`, backward passes, `reduce`, `clip`, `update`, `reallocate`, `end`.

    Args:
        sparse: the model and its deltas.
        learning_rate: a number, which the caller may change between steps; or a schedule, which sets each step's.
    """

    def __init__(self, sparse: Sparse, learning_rate: float | LearningRateSchedule):
        self.sparse = sparse
        self.schedule = learning_rate if isinstance(learning_rate, LearningRateSchedule) else None
        self.steps = 0
        """Completed optimizer steps."""
        self.number: int | None = None  # of the open step
        self.turnovers: list[Turnover] = []
        """Reallocations since the optimizer was made."""
        self._received = False  # the open step has gradients
        self._stale = False  # the weights do not hold the present deltas
        self._untouched: tuple[int, Tensor] | None = None  # version and norm of the gradients after a backward pass
        rate = learning_rate.at(1) if isinstance(learning_rate, LearningRateSchedule) else learning_rate
        if isinstance(rate, bool) or not isinstance(rate, Real | Tensor) or not 0 <= float(rate) < inf:
            raise UserError(f"lr: got {rate!r}, expected a number of at least 0")
        super().__init__([sparse.parameter], {"lr": rate})

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Refuse every group but the one of the deltas, which the constructor adds.

        Raises:
            UserError: always, from a caller.
        """
        if self.param_groups:
            raise UserError(
                "add_param_group: got parameters, expected none, as this optimizer updates the deltas only. Fix: give "
                "them an optimizer of their own"
            )
        super().add_param_group(param_group)

    @property
    def tuning(self) -> SparseFineTuning:
        """The method and its state."""
        return self.sparse.tuning

    @property
    def learning_rate(self) -> float:
        """The learning rate of the next update."""
        return float(self.param_groups[0]["lr"])

    # --- the pieces of a step -----------------------------------------------------------------------------------

    def begin(self, number: int | None = None) -> None:
        """Open step `number` (counted from 1; default: the next): zero the gradients, open a phase if one begins."""
        self.number = self.steps + 1 if number is None else number
        self.tuning.begin_step(self.number)
        self._received, self._untouched = False, None
        if self.schedule:
            self.param_groups[0]["lr"] = self.schedule.at(min(self.number, self.schedule.total_steps))

    def reduce(self, *, average: bool = False) -> None:
        """Sum the recorded gradients over all processes, or average them."""
        flat, group = self.tuning.recorder.flat, self.sparse.group
        group.sum_(flat)
        if average and group.size > 1:
            flat.div_(group.size)

    def clip(self) -> Tensor:
        """Clip to the option max_grad_norm; returns the norm before that, an fp32 scalar."""
        return self.tuning.clip()

    def update(self) -> None:
        """Move all deltas, and add one term to the candidates' estimates (line 6 of Algorithm 1, Eq. 8)."""
        if self.sparse.fused:
            update_and_write(self.tuning, self.sparse.carrier, self.learning_rate)
        else:
            self.tuning.update(self.learning_rate)
            self._stale = True

    def discard(self) -> None:
        """Ignore the open step's gradients: neither update nor estimate."""
        self.tuning.discard_step()

    def refuse_dead_gradients(self) -> None:
        """Refuse weights that no gradient has reached in the first step: they would never learn, silently.

        An expert may have met no token yet, but not all experts of a layer.

        Raises:
            UserError: names the first of them.
        """
        tuning = self.tuning
        received = set().union(*self.sparse.group.gather_objects(tuning.recorder.received))
        missing = unreached(self.sparse.targets, received)
        if missing:
            raise UserError(
                f"target_modules: no gradient reached '{missing[0]}' at step 1 ({len(missing)} of "
                f"{len(tuning.store)} weights), so it takes no part in the loss. Fix: leave it out"
            )

    @property
    def reallocates(self) -> bool:
        """True if the open step ends with drop and grow."""
        return self.tuning.schedule.reallocates_at(self._open_number())

    def reallocate(self) -> Turnover | None:
        """Drop and grow in every weight (lines 9 to 16); None if all steps of the estimation phase were discarded.

        Raises:
            UserError: the processes' deltas differ afterwards.
        """
        tuning, carrier = self.tuning, self.sparse.carrier
        if not tuning.can_reallocate:
            tuning.recorder.close_estimation()
            return None
        carrier.settle()
        turnover = tuning.reallocate(self._open_number(), carrier)
        self._stale = True
        self.sparse.group.check_identical(tuning.digests, f"the deltas after reallocation {turnover.number}")
        return turnover

    def end(self) -> None:
        """Write the deltas into the weights, unless `update` has done so, and close the step."""
        if self._stale:
            self.sparse.carrier.write()
            self._stale = False
        self.steps = self._open_number()
        self._close()

    def _close(self) -> None:
        self.number, self._received, self._untouched = None, False, None
        self.sparse.parameter.grad = None

    def _open_number(self) -> int:
        if self.number is None:
            raise UserError("step: got no gradient since the last step. Fix: call loss.backward() before step()")
        return self.number

    # --- torch's optimizer --------------------------------------------------------------------------------------

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Reduce over processes, clip, update, drop and grow, write.

        Args:
            closure: computes the loss and its gradients again; `step` returns its result.

        Raises:
            UserError: there was no backward pass, the gradient is not finite, or see `refuse_dead_gradients` (nothing
                was changed); or the model was detached, moved or cast.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        if self.sparse.choosing is not None:
            self.sparse.require_attached("step")
            if self.sparse.choosing.step():
                self.sparse.choosing = None
            return loss
        self._require_usable()
        self._take_gradient()
        self._scale_candidates()
        if self.number == 1:
            self.refuse_dead_gradients()
        self.reduce(average=True)
        norm = self.clip().item()
        if not isfinite(norm) or not self.tuning.candidates_are_finite:
            number = self.number
            what = f"the norm of the gradient is {norm}" if not isfinite(norm) else "candidates' gradients are infinite"
            self.zero_grad()
            raise UserError(
                f"step {number}: {what}, expected finite numbers; nothing was changed. "
                "Fix: lower the learning rate, or look at this batch; in float16, use bfloat16 or a smaller loss scale"
            )
        self.update()
        if self.reallocates and (turnover := self.reallocate()):
            self.turnovers.append(turnover)
        self.end()
        self._tell_the_end()
        return loss

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Forget the gradients recorded since the last step."""
        if self._received:
            self.discard()
        self._close()

    def receive(self) -> None:
        """Prepare to record one weight's gradient in a backward pass."""
        recorder, parameter = self.tuning.recorder, self.sparse.parameter
        if self._received and parameter.grad is None:  # model.zero_grad() was called
            self.zero_grad()
        if self._received:
            self._take_gradient()
        if self._was_changed() and not bool(recorder.gradients.any()):  # model.zero_grad(set_to_none=False)
            self.zero_grad()
        self._scale_candidates()
        if self.number is None:
            self.sparse.join()
            self.begin()
        if parameter.grad is None:
            parameter.grad = recorder.gradients
        if recorder.phase is not Phase.OFF and (self._untouched is not None or not self._received):
            self._untouched = None
            torch.autograd.Variable._execution_engine.queue_callback(self._note_norm)
        self._received = True

    def _note_norm(self) -> None:
        """Remember the gradients' norm at the end of a backward pass: see `_scale_candidates`."""
        if self.number is not None:
            flat, gradients = self.tuning.recorder.flat, self.tuning.recorder.gradients
            self._untouched = flat._version, torch.linalg.vector_norm(gradients, dtype=torch.float32)

    def _was_changed(self) -> bool:
        """Tell whether the caller has written into the gradients of a phase's step since the last backward pass."""
        return self._untouched is not None and self.tuning.recorder.flat._version != self._untouched[0]

    def _take_gradient(self) -> None:
        """Take over the values of a tensor that the caller has put in the gradient's place."""
        parameter, gradients = self.sparse.parameter, self.tuning.recorder.gradients
        if parameter.grad is not None and parameter.grad.data_ptr() != gradients.data_ptr():
            gradients.copy_(parameter.grad)
            parameter.grad = gradients

    def _scale_candidates(self) -> None:
        """Scale candidates' gradients by the factor that the caller applied to the active ones, the only ones it sees.

        `clip_grad_norm_` and gradient scalers multiply the parameter's gradient; estimates (Eq. 8) must follow.
        """
        recorder = self.tuning.recorder
        if self._untouched is None or not self._was_changed():
            return
        before, now = self._untouched[1], torch.linalg.vector_norm(recorder.gradients, dtype=torch.float32)
        recorder.flat[self.tuning.store.active :] *= torch.where(before > 0, now / before, 1.0)
        self._untouched = recorder.flat._version, now

    def _require_usable(self) -> None:
        sparse = self.sparse
        sparse.require_attached("step")
        if not self._received or sparse.parameter.grad is None:
            raise UserError("step: got no gradient since the last step. Fix: call loss.backward() before step()")
        weight = sparse.targets[0].weight
        if weight.device != self.tuning.store.device:
            raise UserError(
                f"step: the model is on {weight.device}, its deltas are on {self.tuning.store.device}. Fix: move the "
                "model to its device before scale_sft.attach"
            )
        sparse.require_joined()
        if sparse.overwritten:
            sparse.require_intact("step")
        settings = sparse.settings
        if settings.quantization is None and weight.dtype is not settings.dtype:
            raise UserError(
                f"step: the model is in {weight.dtype}, expected {settings.dtype}, in which it was attached. Fix: cast "
                "the model before scale_sft.attach"
            )

    def _tell_the_end(self) -> None:
        total = self.sparse.settings.total_steps
        if self.steps == total + 1:
            warnings.warn(
                f"total_steps: got a step beyond {total}; deltas are trained further, without drop and grow. Fix: "
                "attach with as many total_steps as you train",
                stacklevel=4,
            )

    # --- saved and resumed --------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Copy all that the next step needs: deltas, moments, ages, candidates, and the base values under the deltas.

        Raises:
            UserError: called between a backward pass and its step; gradients are not saved.
        """
        if self._received:
            raise UserError("state_dict: got gradients that no step has used. Fix: call step() or zero_grad() before")
        if self.sparse.choosing is not None:
            raise UserError("state_dict: got a call while entries are chosen, expected selection_batches steps before")
        tuning, carrier = self.tuning, self.sparse.carrier
        weights = {name: {k: t.clone() for k, t in tuning.state_of(name).items()} for name in tuning.store.names}
        base = {}
        if isinstance(carrier, ResidentDeltas):
            base = {name: carrier.base_values(name).clone() for name in tuning.store.names}
        state = {
            "steps": self.steps,
            "identity": self._identity(),
            "counters": tuning.counters(),
            "weights": weights,
            "base": base,
        }
        return {"state": state, "param_groups": super().state_dict()["param_groups"]}

    def resume(
        self,
        steps: int,
        states: Iterable[tuple[str, Mapping[str, Tensor]]],
        counters: Mapping[str, list[int]],
        base: Mapping[str, Tensor] | None = None,
    ) -> None:
        """Continue after `steps` completed steps from a state that fits; see `SparseModel.load_state`."""
        self.sparse.load_state(steps, states, counters, base)
        self.steps = steps

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Resume from a `state_dict`, bit for bit; a state that does not fit changes nothing.

        The weights may be the base's, or hold the state's deltas, as in a model that a trainer saved along with its
        optimizer.

        Raises:
            UserError: the state belongs to another method, base or budget, or is damaged; or, found after loading, the
                weights are not those of its base.
        """
        self.sparse.require_attached("load_state_dict")
        state = state_dict.get("state", {})
        expect_state(self.sparse, state, fresh=not self.steps)
        self._require_fit(state)
        resumes = state["steps"] != self.steps  # accelerate loads an optimizer's own state into it
        super().load_state_dict({"state": {}, "param_groups": state_dict["param_groups"]})
        self.zero_grad()
        self.resume(state["steps"], state["weights"].items(), state["counters"], state["base"])
        if resumes and isinstance(self.sparse.carrier, ResidentDeltas):
            with self.sparse.carrier.without():
                self.sparse.check_base(
                    "load_state_dict: the weights of the model are not those of its base with these deltas. Fix: load "
                    "the base again, attach, and load this state"
                )
            self.sparse.overwritten = False

    def _require_fit(self, state: dict[str, Any]) -> None:
        """Raise UserError unless a state belongs to this model, method and budget."""
        tuning, settings = self.tuning, self.sparse.settings
        parts = {"steps", "identity", "counters", "weights", "base"}
        if set(state) != parts:
            raise UserError(
                f"load_state_dict: got a state of {', '.join(map(str, state)) or 'nothing'}, expected one that a "
                "SparseOptimizer has saved"
            )
        for what, own in self._identity().items():
            found = state["identity"].get(what)
            if found != own:
                raise UserError(f"load_state_dict: {what}: got a state of {found}, expected {own}. Fix: attach alike")
        counters, own = state["counters"], tuning.counters()
        cohorts = len(counters.get("cohort_steps", ()))
        if set(counters) != set(own) or not cohorts or any(len(counts) != cohorts for counts in counters.values()):
            raise UserError(f"load_state_dict: counters: got {counters}, expected {', '.join(own)} of one length each")
        resident = isinstance(self.sparse.carrier, ResidentDeltas)
        for name in tuning.store.names:
            wrong = tuning.wrong_with_state(name, state["weights"].get(name, {}), state["steps"], cohorts)
            if wrong:
                raise UserError(f"load_state_dict: weight '{name}': {wrong}. Fix: attach with the budget of the state")
            base, expected = state["base"].get(name), ((tuning.store[name].active,), settings.dtype)
            if resident and (base is None or (tuple(base.shape), base.dtype) != expected):
                found = "none" if base is None else f"{tuple(base.shape)} {base.dtype}"
                raise UserError(f"load_state_dict: weight '{name}': got base values {found}, expected {expected}")

    def _identity(self) -> dict[str, Any]:
        """Return the properties that a state and the model loading it must share."""
        settings = self.sparse.settings
        return {
            "method": settings.sparse.method,
            "total_steps": settings.total_steps,
            "hash of the target weights": self.sparse.base_hash,
            "active entries": self.tuning.store.active,
            "start_from": "an adapter" if settings.start else None,  # the first reallocation depends on it
        }
