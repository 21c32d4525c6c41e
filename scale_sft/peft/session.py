"""`Session`: the training of one adapter, whoever steps: candidates, drop and grow, and the writes into the weights.

Shapes: K active entries of a weight, C candidates; T tokens.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from scale_sft.distributed.existing import existing_ranks
from scale_sft.errors import UserError
from scale_sft.kernels.backends import exchanges_of, products_of
from scale_sft.model.group import Group, OneProcess
from scale_sft.model.method import ModelProposals
from scale_sft.model.sparse_settings import rule_of
from scale_sft.spiel.deltas import DeltaStore, SparseDelta
from scale_sft.spiel.digests import digest_states
from scale_sft.spiel.drop_grow import apply_exchange, drop_scores
from scale_sft.spiel.recorder import Candidates, Gradient, GradientRecorder, candidates_of, largest
from scale_sft.spiel.schedules import Phase, ReallocationSchedule

from .config import SpielOptions
from .layer import Linear, require_whole
from .optimizer_state import INTERVAL, follow, group_of, refuse_foreign, require_same_interval

STATE_KEY = "spiel"
"""Key in an optimizer's parameter group: what the next step needs in addition, by adapter."""
PROBES = 4096


class Session:
    """What an adapter needs while it is trained: gradients of candidates, the number of steps, and the schedule.

    Its parameters become views of one flat buffer of `spiel.deltas.DeltaStore`; they stay the same parameters, so an
    optimizer made before or after keeps working. Everything that outlives a step is in the optimizer's parameter group,
    under `STATE_KEY`, so that the optimizer's own state dict resumes it.

    Args:
        adapter: its name.
        config: its options.
        layers: its layers; their weights are whole and on one device.
        total_steps: of the whole training; None: known to no one.
        chosen: the entries are a finished adapter's and not random.

    Raises:
        UserError: the layers cannot be trained here, or drop and grow needs to know the number of steps.
    """

    def __init__(
        self, adapter: str, config: SpielOptions, layers: Iterable[Linear], total_steps: int | None, chosen: bool
    ):
        self.adapter, self.config = adapter, config
        self.layers = {layer.weight_name: layer for layer in layers}
        device = _device_of(self.layers, adapter)
        self.sparse, self.total_steps, self.chosen = config.sparse_options(), total_steps, chosen
        self.group: Group = existing_ranks(device) or OneProcess(device)
        indices = {name: layer.spiel_indices[adapter] for name, layer in self.layers.items()}
        shapes = {name: layer.shape for name, layer in self.layers.items()}
        self.store = DeltaStore(shapes, indices, device=device, keep_reference=self.sparse.drop_criterion == "change")
        self._adopt_values()
        self.exchanges = exchanges_of(device, config.kernels)
        rule = rule_of(self.sparse, config.seed)
        self.proposals = (
            None
            if rule.is_plain
            else ModelProposals(rule, lambda: self.group, self._read_weight, self.sparse.estimation_steps)
        )
        self.recorder = GradientRecorder(
            self.store,
            candidates_of(self.store, self.sparse.candidate_ratio),
            estimation_steps=self.sparse.estimation_steps,
            propose=self._propose,
            products=products_of(device, config.kernels),
        )
        self.schedule = self._schedule()
        self.steps = 0
        """Completed optimizer steps."""
        self.skipped = 0
        """Steps that a GradScaler has skipped; a Trainer counts them."""
        self.reallocations: list[int] = []
        """Steps that ended with drop and grow."""
        self._published: Any = None  # our state in the optimizer's group
        probes = min(PROBES, self.store.active)
        self._probes = torch.arange(probes, device=device) * self.store.active // probes
        self._seen: Tensor | None = self._probe()  # bits of the probed deltas as they were written
        self._open()

    def _adopt_values(self) -> None:
        """Make each parameter a view of the flat buffer of all deltas."""
        for name, layer in self.layers.items():
            values, view = layer.spiel_values[self.adapter], self.store[name].deltas
            view.copy_(values.detach())
            values.data = view

    def _schedule(self) -> ReallocationSchedule | None:
        sparse, method = self.sparse, self.config.method
        if method == "random":
            return None
        if method == "ag" and self.total_steps is None:
            raise UserError(
                "total_steps: got none, expected the number of optimizer steps, as drop and grow follow a schedule. "
                "Fix: SpielConfig(total_steps=...), or Trainer(callbacks=[scale_sft.peft.SpielCallback()])"
            )
        return ReallocationSchedule(
            total_steps=self.total_steps or sparse.estimation_steps,
            update_interval_steps=sparse.update_interval_steps,
            estimation_steps=sparse.estimation_steps,
            initial_replacement_fraction=sparse.initial_replacement_fraction,
            replacement_schedule=sparse.replacement_schedule,
            only_first=method == "static",
            chosen=self.chosen,
        )

    # --- a step -----------------------------------------------------------------------------------------------------

    def _open(self) -> None:
        """Open the next step: gradients of candidates are zero, and a phase begins where the schedule says so."""
        phase = self.schedule.phase(self.steps + 1) if self.schedule else Phase.OFF
        self.recorder.begin_step(phase)
        self.received: set[str] = set()
        """Layers that have had a backward pass in this step."""
        sizes = [delta.active for delta in self.store]
        self._own = dict(zip(self.store.names, self.recorder.gradients.split(sizes), strict=True))
        self._sums = torch.zeros(self.store.active if phase is not Phase.OFF else 0, device=self.store.device)
        self._parts = (
            dict(zip(self.store.names, self._sums.split(sizes), strict=True)) if phase is not Phase.OFF else {}
        )
        self._inside = False

    def gradient(self, layer: Linear, left: Tensor, right: Tensor) -> Tensor:
        """Compute the gradient of one layer's deltas, [K] fp32, and record that of its candidates.

        Args:
            layer: whose backward pass it is.
            left: [T, R]. right: [T, C']. The gradient of the weight [R, C'] is left^T right.
        """
        if self.recorder.phase is not Phase.OFF and not self._inside:
            self._begin_backward()
        name = layer.weight_name
        self.received.add(name)
        own = self._own[name]
        own.zero_()
        self.recorder.record_product(name, left, right)
        if name in self._parts:
            self._parts[name] += own
        return own.clone()

    def _begin_backward(self) -> None:
        """Forget the candidates' gradients if the caller has dropped the active ones since the last backward pass."""
        self._inside = True
        torch.autograd.Variable._execution_engine.queue_callback(self._end_backward)
        if not self.received:
            return
        gradients = [self.layers[name].spiel_values[self.adapter].grad for name in self.received]
        alone = self.group.size == 1  # a batch may give zeros on one rank only, and ranks choose together
        if all(one is None or (alone and not bool(one.any())) for one in gradients):
            self.recorder.discard_step()
            self._open()
            self._inside = True

    def _end_backward(self) -> None:
        self._inside = False

    @torch.no_grad()
    def after_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Finish an optimizer step: estimate candidates, drop and grow where the schedule says so, write.

        Raises:
            UserError: a layer has had no gradient at step 1, the optimizer's state is another run's or cannot follow,
                or the processes' deltas differ.
        """
        self._require_fit(optimizer)
        if bool(getattr(optimizer, "found_inf", False)):  # fused: a GradScaler calls it, and the kernel skips
            self.skip()
            return
        if self.recorder.phase is not Phase.OFF:
            self._estimate()
        self.steps += 1
        if self.schedule and self.schedule.reallocates_at(self.steps) and self.recorder.candidates:
            self._reallocate(optimizer)
        self.write()
        self._open()
        self._publish(optimizer)

    def skip(self) -> None:
        """Count a step that a GradScaler has skipped, and forget its gradients."""
        self.recorder.discard_step()
        self.skipped += 1
        if self._published is not None:
            self._published["skipped"] = self.skipped
        self._open()

    def _require_fit(self, optimizer: torch.optim.Optimizer) -> None:
        missing = [name for name in self.store.names if name not in self.received]
        if self.steps == 0 and missing:
            raise UserError(
                f"target_modules: no gradient reached '{missing[0]}' at step 1 ({len(missing)} of {len(self.store)} "
                "weights), so it takes no part in the loss. Fix: leave it out; or, with gradient checkpointing, use "
                "gradient_checkpointing_kwargs={'use_reentrant': False} or model.enable_input_require_grads()"
            )
        held = {id(one) for group in optimizer.param_groups for one in group["params"]}
        absent = next((n for n, layer in self.layers.items() if id(layer.spiel_values[self.adapter]) not in held), None)
        if absent:
            raise UserError(
                f"optimizer: got one without the deltas of '{absent}', expected all of adapter '{self.adapter}' in one "
                "optimizer. Fix: make it from model.parameters()"
            )
        first = next(iter(self.layers.values())).spiel_values[self.adapter]
        found = group_of(optimizer, first).get(STATE_KEY, {}).get(self.adapter)
        if found is not None and found is not self._published and found["steps"] != self.steps:
            raise UserError(
                f"optimizer: got the state of step {found['steps']}, expected that of step {self.steps}. Fix: call "
                "scale_sft.peft.resume(model, optimizer) after optimizer.load_state_dict"
            )
        if self.schedule:
            refuse_foreign(optimizer, first, self.config.optimizer_state)

    def _estimate(self) -> None:
        """Add one term to the candidates' estimates (Eq. 8), of the gradient as the optimizer has used it.

        The caller may have averaged, clipped or unscaled the active entries' gradients, the only ones it sees. So a
        GradScaler does not skip a step in which only candidates have overflowed: their gradients count as fp16's limit.
        """
        flat = self.recorder.flat
        limit = torch.finfo(torch.float16).max
        flat[self.store.active :].nan_to_num_(nan=0.0, posinf=limit, neginf=-limit)
        flat[: self.store.active] = self._sums
        self.group.sum_(flat)
        if self.group.size > 1:
            flat.div_(self.group.size)
        used = [layer.spiel_values[self.adapter].grad for layer in self.layers.values()]
        sizes = [delta.active for delta in self.store]
        whole = torch.cat([flat.new_zeros(n) if g is None else g.float() for g, n in zip(used, sizes, strict=True)])
        before, now = torch.linalg.vector_norm(flat[: self.store.active]), torch.linalg.vector_norm(whole)
        flat[self.store.active :] *= torch.where(before > 0, now / before, 1.0)
        self.recorder.end_step()

    def _reallocate(self, optimizer: torch.optim.Optimizer) -> None:
        """Drop and grow in every weight (lines 9 to 16 of Algorithm 1)."""
        assert self.schedule is not None
        for name, layer in self.layers.items():
            if name not in self.recorder.candidates:
                continue  # no gradient has reached it in this phase
            delta, candidates = self.store[name], self.recorder.candidates[name]
            k = self.schedule.replaced(self.steps, delta.active)
            scores = drop_scores(delta, self.sparse.drop_criterion)
            ranking = self._ranking(delta, candidates)
            exchange = self.exchanges.exchange_by_gradient(delta.indices, scores, candidates.indices, ranking, k)
            values = layer.spiel_values[self.adapter]
            follow(optimizer, values, exchange, candidates.mean, candidates.mean_square, self.config.optimizer_state)
            resident = layer.resident
            layer.show(None)
            apply_exchange(delta, exchange, 0)
            layer.spiel_indices[self.adapter].copy_(delta.indices)
            layer.show(resident)
        self.recorder.close_estimation()
        self.reallocations.append(self.steps)
        self.group.check_identical(self._digests, f"the deltas after step {self.steps}")

    @contextmanager
    def _read_weight(self, name: str) -> Iterator[Tensor]:
        yield self.layers[name].weight.detach()

    def _propose(self, name: str, gradient: Gradient, count: int) -> tuple[Tensor, dict[str, Tensor]]:
        """Choose candidates for the next reallocation: the largest gradients, or by the rule of the options."""
        if self.proposals is None:
            return largest(self.group.select_candidates)(name, gradient, count)
        return self.proposals.propose(name, gradient, count, len(self.reallocations) + 1)

    def _ranking(self, delta: SparseDelta, candidates: Candidates) -> Tensor:
        """Return values [C] fp32 of which the largest magnitudes grow first."""
        one, number = candidates, len(self.reallocations) + 1
        if self.proposals is None:
            return one.mean
        width = delta.shape[1]
        return self.proposals.rank(delta.name, width, one.indices, one.mean, one.mean_square, one.facts, number)

    def _digests(self) -> dict[str, str]:
        return digest_states((delta.name, {"indices": delta.indices, "deltas": delta.deltas}) for delta in self.store)

    # --- the weights ------------------------------------------------------------------------------------------------

    def write(self) -> None:
        """Write the present effective values into the weights."""
        for layer in self.layers.values():
            layer.write(self.adapter)
        self._seen = self._probe()

    def written(self) -> None:
        """Note that a weight has been written."""
        self._seen = None

    def _probe(self) -> Tensor:
        return self.store.flat.index_select(0, self._probes).view(torch.int32)

    def check(self) -> None:
        """Refuse a forward pass whose deltas have changed since they were written.

        Fused optimizers do not raise a parameter's version, so some of the values are compared.

        Raises:
            UserError: they have.
        """
        if self._seen is None:
            self._seen = self._probe()
        elif not torch.equal(self._seen, self._probe()):
            raise UserError(
                f"forward: the deltas of adapter '{self.adapter}' have changed, but nobody has written them into the "
                "weights, as no step of a torch optimizer was seen. Fix: call scale_sft.peft.write(model) after each "
                "step"
            )

    @property
    def intact(self) -> bool:
        """Return False if the parameters were moved, cast or replaced, so that the session must be made again."""
        return all(map(self.holds, self.layers.values()))

    def holds(self, layer: Linear) -> bool:
        """Return True if a layer's parameter is the view that this session has made of it."""
        view = self.store[layer.weight_name].deltas
        return layer.has(self.adapter) and layer.spiel_values[self.adapter].data_ptr() == view.data_ptr()

    def reload(self, layer: Linear) -> None:
        """Take over indices that a layer has loaded."""
        if layer.weight_name in self.layers and layer.has(self.adapter):
            self.store[layer.weight_name].indices = layer.spiel_indices[self.adapter].clone()
            self._seen = None

    # --- saved and resumed ------------------------------------------------------------------------------------------

    def state(self) -> dict[str, Any]:
        """Return what the next step needs besides the adapter and the optimizer's own state; tensors are not copied."""
        return {
            "steps": self.steps,
            "skipped": self.skipped,
            "chosen": self.chosen,
            "reallocations": list(self.reallocations),
            "candidates": {name: one.state() for name, one in self.recorder.candidates.items()},
            "reference": {d.name: d.reference for d in self.store if d.reference is not None},
            INTERVAL: self.sparse.update_interval_steps,
        }

    def load(self, state: Mapping[str, Any]) -> None:
        """Resume from a `state`, of an adapter of the same entries."""
        require_same_interval(state, self.schedule)
        self.steps, self.skipped = int(state["steps"]), int(state.get("skipped", 0))
        self.chosen = bool(state["chosen"])
        self.reallocations = list(state["reallocations"])
        self.schedule = self._schedule()
        for name, reference in state["reference"].items():
            if (kept := self.store[name].reference) is not None:
                kept.copy_(reference)
        self.recorder.close_estimation()
        if state["candidates"]:
            self.recorder.open_estimation()
            for name, candidates in state["candidates"].items():
                self.recorder.load_candidates(name, candidates)
        self._open()

    def resume(self, optimizer: torch.optim.Optimizer, *, fresh: bool = False) -> None:
        """Continue where an optimizer's state says, if it says anything; `fresh`: begin at step 0 nevertheless."""
        first = next(iter(self.layers.values())).spiel_values[self.adapter]
        found = group_of(optimizer, first).get(STATE_KEY, {}).get(self.adapter)
        if found is not None and not fresh:
            self.load(found)
        self._publish(optimizer)

    def _publish(self, optimizer: torch.optim.Optimizer) -> None:
        first = next(iter(self.layers.values())).spiel_values[self.adapter]
        self._published = self.state()
        group_of(optimizer, first).setdefault(STATE_KEY, {})[self.adapter] = self._published


def _device_of(layers: Mapping[str, Linear], adapter: str) -> torch.device:
    """Return the one device of all weights.

    Raises:
        UserError: a weight is sharded, there are several devices, or deltas are not fp32.
    """
    for name, layer in layers.items():
        require_whole(layer.weight, name)
        if layer.spiel_values[adapter].dtype is not torch.float32:
            raise UserError(
                f"deltas of '{name}': got {layer.spiel_values[adapter].dtype}, expected float32. Fix: cast the base "
                "model before get_peft_model, not the PEFT model"
            )
    devices = {layer.weight.device for layer in layers.values()}
    if len(devices) > 1:
        raise UserError(
            f"model: got one spread over {', '.join(sorted(map(str, devices)))}, expected one device. Fix: load it "
            "with device_map {'': device}"
        )
    return devices.pop()
