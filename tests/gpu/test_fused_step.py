"""A fused step of all deltas against the plain one; where it runs: see test_recorded_entries.py."""

from contextlib import nullcontext

import pytest
import torch
from kernel_tools import DEVICE, INTERPRETED, drawn, marks, no_waiting
from torch import Tensor, nn

pytest.importorskip("triton", reason="Triton is not installed")

from scale_sft.kernels.gpu.picked import picked_entries
from scale_sft.model.fused_step import update_and_write, why_not
from scale_sft.model.packed_weights import PlainWeight
from scale_sft.model.resident import ResidentDeltas, WeightPart
from scale_sft.model.transient import TransientDeltas
from scale_sft.spiel.algorithm import SparseFineTuning
from scale_sft.spiel.deltas import DeltaStore
from scale_sft.spiel.moments import mixed_moments
from scale_sft.spiel.schedules import ReallocationSchedule
from scale_sft.spiel.settings import Backends, MethodSettings

pytestmark = marks
SHAPES = {"a": (7, 12), "b": (20, 9), "c": (5, 3)}
ACTIVE = {"a": 40, "b": 55, "c": 2}  # the last keeps flat indices


TOKENS = 30


@pytest.fixture(autouse=INTERPRETED)
def triton_and_not_c(monkeypatch) -> None:
    """In the interpreter deltas are on a CPU."""
    from scale_sft.kernels.cpu import updates as updates_cpu
    from scale_sft.kernels.gpu import updates

    for name in ("adamw_write", "sm3_write"):
        monkeypatch.setattr(updates_cpu, name, getattr(updates, name))


class Run:
    """Deltas on random weights, of which this process holds one part each, trained on random gradients; or `transient`
    ones, of which a weight is made when it is looked at."""

    def __init__(self, method: str, *, sharded: bool = False, transient: bool = False, max_grad_norm=None, **backends):
        weights = {name: nn.Parameter(drawn(1, *shape)) for name, shape in SHAPES.items()}
        parts = {name: WeightPart.whole(weight) for name, weight in weights.items()}
        if sharded:
            self.shards = {name: drawn(1, *shape).view(-1)[10:55] for name, shape in SHAPES.items()}
            parts = {name: WeightPart(lambda s=s: s, 10, 10 + s.numel()) for name, s in self.shards.items()}
        store = DeltaStore(SHAPES, ACTIVE, device=DEVICE)
        schedule = ReallocationSchedule(
            total_steps=20, update_interval_steps=3, estimation_steps=2, estimates=method != "ma"
        )
        settings = MethodSettings(method=method, weight_decay=0.1, max_grad_norm=max_grad_norm)
        self.tuning = SparseFineTuning(store, settings, schedule, Backends(**backends))
        if transient:
            modules = {name: nn.Linear(width, rows, bias=False) for name, (rows, width) in SHAPES.items()}
            for name, module in modules.items():
                module.weight = weights[name]
            packed = {name: PlainWeight(module, transposed=False) for name, module in modules.items()}
            self.carrier = TransientDeltas(store, packed)
        else:
            self.carrier = ResidentDeltas(store, parts)
        self.parts, self.transient = parts, transient

    def factors(self, number: int) -> dict[str, tuple[Tensor, Tensor]]:
        """Of each weight's gradient in step `number`."""
        return {
            name: (drawn(10 * number, TOKENS, rows), drawn(10 * number + 1, TOKENS, width))
            for name, (rows, width) in SHAPES.items()
        }

    def update(self, number: int, factors: dict[str, tuple[Tensor, Tensor]], *, fused: bool) -> None:
        """All of a step but drop and grow."""
        self.tuning.begin_step(number)
        for name, of_weight in factors.items():
            self.tuning.recorder.record_product(name, *of_weight)
        self.tuning.clip()
        if fused:
            update_and_write(self.tuning, self.carrier, 0.01)
        else:
            self.tuning.update(0.01)

    def step(self, number: int, *, fused: bool) -> None:
        self.update(number, self.factors(number), fused=fused)
        self.finish(number, fused=fused)

    def finish(self, number: int, *, fused: bool) -> None:
        """Drop and grow where step `number` does."""
        if self.tuning.schedule.reallocates_at(number):
            self.tuning.reallocate(number, self.carrier)
        if not fused or self.tuning.schedule.reallocates_at(number):
            self.carrier.write()

    def everything(self) -> list[torch.Tensor]:
        states = [self.tuning.state_of(name) for name in SHAPES]
        weights = [part.entries().clone() for part in self.parts.values()]
        if self.transient:
            weights += [self.carrier.effective_weight(name) for name in SHAPES]
        return [tensor for state in states for tensor in state.values()] + weights


@pytest.mark.parametrize("method", ["ag", "ma"])
@pytest.mark.parametrize("sharded", [False, True])
def test_a_fused_step_is_an_update_and_a_write(method: str, sharded: bool) -> None:
    plain, fused = Run(method, sharded=sharded), Run(method, sharded=sharded)
    for number in range(1, 7):  # reallocations at 2 and 5
        plain.step(number, fused=False)
        fused.step(number, fused=True)
        for expected, actual in zip(plain.everything(), fused.everything(), strict=True):
            torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-6)
    assert plain.tuning.counters() == fused.tuning.counters()


@pytest.mark.parametrize("method", ["ag", "ma"])
def test_a_fused_step_of_transient_deltas_is_an_update_and_touches_no_weight(method: str) -> None:
    plain, fused = Run(method, transient=True), Run(method, transient=True)
    untouched = [part.entries().clone() for part in fused.parts.values()]
    for number in range(1, 7):
        plain.step(number, fused=False)
        fused.step(number, fused=True)
        for expected, actual in zip(plain.everything(), fused.everything(), strict=True):
            torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-6)
    assert bool(fused.tuning.store.flat.any())
    assert all(
        torch.equal(part.entries(), before) for part, before in zip(fused.parts.values(), untouched, strict=True)
    )


@pytest.mark.parametrize("products", [None, picked_entries])
@pytest.mark.parametrize(
    ("method", "transient", "fused"),
    [("ag", False, True), ("ma", False, True), ("ma", True, True), ("ag", True, False)],
)
def test_between_backward_and_drop_nothing_waits_for_the_device(products, method, transient, fused) -> None:
    run = Run(method, transient=transient, max_grad_norm=1.0, products=products)
    for number in range(1, 7):  # all kernels are compiled by the third
        factors = run.factors(number)
        with no_waiting() if number in (3, 5, 6) else nullcontext():  # 1 and 4 choose candidates: that waits
            run.update(number, factors, fused=fused)
            run.carrier.write()
        run.finish(number, fused=fused)
    assert bool(run.tuning.store.flat.any())


def test_a_first_moment_in_bf16_is_fused_too() -> None:
    plain, fused = Run("ag", moments=mixed_moments), Run("ag", moments=mixed_moments)
    for number in range(1, 4):
        plain.step(number, fused=False)
        fused.step(number, fused=True)
    assert torch.equal(plain.tuning.store["a"].indices, fused.tuning.store["a"].indices)
    torch.testing.assert_close(fused.tuning.store.flat, plain.tuning.store.flat, rtol=0.02, atol=1e-4)


@pytest.mark.skipif(INTERPRETED, reason="needs a GPU")
def test_what_cannot_be_fused_is_said() -> None:
    for transient in (False, True):
        run = Run("ag", transient=transient)
        assert why_not(run.tuning, run.carrier) is None
        run.tuning.optimizer.exp_avg = object()
        assert why_not(run.tuning, run.carrier) == "the moments are kept in codes"
