"""Updates in one pass, in C, against the plain ones, and the weights that they write."""

import json
from typing import ClassVar

import pytest
import torch
from torch import Tensor

from scale_sft.kernels.cpu.updates import adamw_write, sm3_write
from scale_sft.kernels.operands import Written
from scale_sft.model.fused_step import update_and_write, why_not
from scale_sft.model.resident import ResidentDeltas, WeightPart, effective_values
from scale_sft.spiel.algorithm import SparseFineTuning
from scale_sft.spiel.deltas import DeltaStore
from scale_sft.spiel.indices import Entries
from scale_sft.spiel.moments import mixed_moments
from scale_sft.spiel.optimizers import adamw_update, correction_table, sm3_update
from scale_sft.spiel.schedules import ReallocationSchedule
from scale_sft.spiel.settings import Backends, MethodSettings

pytestmark = pytest.mark.usefixtures("c_kernels")

CPU = torch.device("cpu")
SHAPE = (37, 90)
PIECE = 1024  # entries that updates.c takes at once
SETTINGS = [((0.9, 0.999), 1e-8, 0.1), ((0.0, 0.95), 1e-6, 0.0)]


def drawn(seed: int, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def some(shape: tuple[int, int], count: int) -> Entries:
    """Random entries, more of them in the first rows, so that some rows are full and others empty."""
    weight = torch.rand(shape, generator=torch.Generator().manual_seed(count)) / (1 + torch.arange(shape[0]))[:, None]
    return Entries(weight.view(-1).topk(count).indices.sort().values, shape)


def weight_and_base(entries: Entries, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    weight = drawn(9, *entries.shape, dtype=dtype)
    return weight, weight.view(-1)[entries.flat().long()]


class State:
    """What an update moves, and the update itself, in C and in torch."""

    def __init__(self, kind: str, entries: Entries, deltas=torch.float32, gradients=torch.float32, mean=torch.float32):
        count = entries.count
        self.kind, self.entries = kind, entries
        self.deltas, self.gradients = drawn(3, count, dtype=deltas), drawn(4, count, dtype=gradients)
        self.exp_avg, self.exp_avg_sq = drawn(5, count, dtype=mean), drawn(6, count).square()
        self.row, self.col = drawn(7, entries.shape[0]).square(), drawn(8, entries.shape[1]).square()
        self.seen = [12, 3, 40]
        self.cohort = (torch.arange(count) % 3).to(torch.uint8 if count % 2 else torch.int16)

    @property
    def moved(self) -> list[Tensor]:
        return [self.deltas, *((self.row, self.col) if self.kind == "sm3" else (self.exp_avg, self.exp_avg_sq))]

    def in_c(self, written: Written | None, betas=(0.9, 0.999), eps=1e-8, decay=0.1) -> None:
        common = {"decay": 1 - 0.01 * decay, "eps": eps, "entries": self.entries, "written": written}
        if self.kind == "sm3":
            sm3_write(self.deltas, self.gradients, self.row, self.col, learning_rate=0.01, **common)
        else:
            tables = correction_table(self.seen, 0.01, betas, CPU)
            adamw_write(
                self.deltas, self.gradients, self.exp_avg, self.exp_avg_sq, self.cohort, *tables, betas=betas, **common
            )

    def in_torch(self, betas=(0.9, 0.999), eps=1e-8, decay=0.1) -> None:
        common = {"learning_rate": 0.01, "eps": eps, "weight_decay": decay}
        if self.kind == "sm3":
            sm3_update(self.deltas, self.gradients, self.entries, self.row, self.col, **common)
        else:
            moments = self.exp_avg, self.exp_avg_sq
            adamw_update(self.deltas, self.gradients, *moments, self.cohort, self.seen, betas=betas, **common)


@pytest.fixture(params=[1, 3])
def threads(request, set_threads):
    set_threads(request.param)


@pytest.mark.parametrize(("betas", "eps", "decay"), SETTINGS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ["adamw", "sm3"])
@pytest.mark.parametrize("count", [1, 150, 1500, 3330])
def test_an_update_in_one_pass_is_the_plain_one_and_writes_the_weight(betas, eps, decay, dtype, kind, count, threads):
    entries = some(SHAPE, count)
    weight, base = weight_and_base(entries, dtype)
    one, plain = State(kind, entries), State(kind, entries)
    one.in_c(Written(weight, base), betas, eps, decay)
    plain.in_torch(betas, eps, decay)
    for actual, expected in zip(one.moved, plain.moved, strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-6, atol=3e-7)  # torch fuses some products with sums
    written = drawn(9, *SHAPE, dtype=dtype)
    written.view(-1)[entries.flat().long()] = effective_values(base, one.deltas)
    assert torch.equal(weight, written)


@pytest.mark.parametrize("kind", ["adamw", "sm3"])
def test_a_row_longer_than_a_piece_is_updated_whole(kind):
    entries = some((2, 3 * PIECE), 2 * PIECE + 77)
    one, plain = State(kind, entries), State(kind, entries)
    weight, base = weight_and_base(entries, torch.float32)
    one.in_c(Written(weight, base))
    plain.in_torch()
    for actual, expected in zip(one.moved, plain.moved, strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-6, atol=3e-7)
    assert torch.equal(weight.view(-1)[entries.flat().long()], effective_values(base, one.deltas))


@pytest.mark.parametrize("kind", ["adamw", "sm3"])
def test_any_number_of_threads_gives_the_same_bits(kind, set_threads):
    results = []
    for threads in (1, 2, 5):
        set_threads(threads)
        state = State(kind, some((200, 300), 9000))
        state.in_c(None)
        results.append(state.moved)
    assert all(torch.equal(one, other) for result in results[1:] for one, other in zip(results[0], result, strict=True))


@pytest.mark.parametrize("kind", ["adamw", "sm3"])
def test_state_of_bf16_is_rounded_once_and_the_weight_gets_the_stored_delta(kind):
    entries = some(SHAPE, 700)
    half = State(kind, entries, torch.bfloat16, torch.bfloat16, torch.bfloat16)
    exact = State(kind, entries, torch.bfloat16, torch.bfloat16, torch.bfloat16)
    for name in ("deltas", "gradients", "exp_avg"):
        setattr(exact, name, getattr(exact, name).float())
    weight, base = weight_and_base(entries, torch.bfloat16)
    half.in_c(Written(weight, base))
    exact.in_c(None)
    assert all(torch.equal(a, b.to(a.dtype)) for a, b in zip(half.moved, exact.moved, strict=True))
    assert torch.equal(weight.view(-1)[entries.flat().long()], effective_values(base, half.deltas.float()))


@pytest.mark.parametrize("kind", ["adamw", "sm3"])
@pytest.mark.parametrize(("start", "stop"), [(0, 3330), (900, 1800), (0, 7), (3321, 3330), (1000, 1000)])
def test_a_part_of_a_sharded_weight_is_written_and_all_entries_are_updated(kind, start, stop):
    entries = some(SHAPE, 1200)
    flat = entries.flat()
    whole, base = weight_and_base(entries, torch.bfloat16)
    first, last = (int((flat < bound).sum()) for bound in (start, stop))
    part = whole.view(-1)[start:stop].clone()
    states = []
    for written in (None, Written(whole, base), Written(part, base[first:last].clone(), start, first)):
        states.append(State(kind, entries))
        states[-1].in_c(written)
    assert all(
        torch.equal(one, other)
        for state in states[1:]
        for one, other in zip(states[0].moved, state.moved, strict=False)
    )
    assert torch.equal(part, whole.view(-1)[start:stop])


def test_numbers_that_are_none_stay_so_in_bf16_and_halves_go_to_the_even_neighbour():
    entries = Entries(torch.arange(4), (1, 4))
    weight, base = torch.zeros(4, dtype=torch.bfloat16), torch.zeros(4, dtype=torch.bfloat16)
    deltas = torch.tensor([float("nan"), float("inf"), 1 + 2**-8, 1 + 3 * 2**-8])
    tables = torch.zeros(2, 1)
    tables[1] = 1
    zeros = torch.zeros(3, 4)
    adamw_write(
        deltas, *zeros, torch.zeros(4, dtype=torch.uint8), *tables,
        decay=1.0, betas=(0.9, 0.9), eps=1.0, entries=entries, written=Written(weight, base),
    )  # fmt: skip
    torch.testing.assert_close(weight, deltas.bfloat16(), rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("kind", ["adamw", "sm3"])
def test_a_part_that_cannot_be_of_this_weight_is_refused(kind):
    entries = some(SHAPE, 120)
    weight, base = weight_and_base(entries, torch.float32)
    for wrong, said in (
        (Written(weight, base.bfloat16()), "dtype of its base values"),
        (Written(weight.t(), base), "contiguous"),
        (Written(weight, base, 0, 1), "120 from entry 1 on"),
    ):
        with pytest.raises(ValueError, match=said):
            State(kind, entries).in_c(wrong)


@pytest.mark.parametrize("kind", ["adamw", "sm3"])
def test_state_of_another_dtype_or_with_gaps_is_refused(kind):
    for wrong in (drawn(3, 120).double(), drawn(3, 240)[::2]):
        state = State(kind, some(SHAPE, 120))
        state.deltas = wrong
        with pytest.raises(ValueError, match="state of deltas: got"):
            state.in_c(None)


# --- all deltas of a run --------------------------------------------------------------------------------------------


class Run:
    """Two weights, of which this process holds all or one part each, trained on random gradients."""

    shapes: ClassVar = {"a": (20, 30), "b": (7, 50)}

    def __init__(self, method: str, dtype: torch.dtype, part: slice = slice(None)):
        self.weights = {
            name: drawn(1, *shape, dtype=dtype).view(-1)[part].clone() for name, shape in self.shapes.items()
        }
        schedule = ReallocationSchedule(
            total_steps=20, update_interval_steps=3, estimation_steps=2, estimates=method != "ma"
        )
        self.tuning = SparseFineTuning(
            DeltaStore(self.shapes, {"a": 200, "b": 90}),
            MethodSettings(method=method, weight_decay=0.1),
            schedule,
            Backends(moments=mixed_moments),
        )
        start = part.start or 0
        parts = {name: WeightPart(lambda w=w: w, start, start + w.numel()) for name, w in self.weights.items()}
        self.carrier = ResidentDeltas(self.tuning.store, parts)

    def train(self, fused: bool, steps: int = 8) -> None:
        for step in range(1, steps + 1):
            self.tuning.begin_step(step)
            for name, shape in self.shapes.items():
                self.tuning.recorder.record(name, drawn(100 * step, *shape))
            if fused:
                update_and_write(self.tuning, self.carrier, 0.01)
            else:
                self.tuning.update(0.01)
            if self.tuning.schedule.reallocates_at(step):
                self.tuning.reallocate(step, self.carrier)
            self.carrier.write()


@pytest.mark.parametrize("part", [slice(None), slice(100, 250)], ids=["whole", "sharded"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("method", ["ag", "ma", "static"])
def test_a_run_of_fused_steps_is_the_plain_run_and_its_weights_hold_the_deltas(method, dtype, part):
    plain, fused = Run(method, dtype, part), Run(method, dtype, part)
    assert why_not(fused.tuning, fused.carrier) is None
    plain.train(False), fused.train(True)
    one, other = plain.tuning.store, fused.tuning.store
    assert all(torch.equal(one[name].indices, other[name].indices) for name in Run.shapes)
    torch.testing.assert_close(other.flat, one.flat, rtol=1e-4, atol=1e-6)
    for delta in other:
        base = drawn(1, *delta.shape, dtype=dtype).view(-1)
        base[delta.indices.long()] = effective_values(base[delta.indices.long()], delta.deltas)
        assert torch.equal(fused.weights[delta.name], base[part])


def test_weights_in_float16_are_updated_by_torch():
    run = Run("ag", torch.float16)
    assert "float16" in why_not(run.tuning, run.carrier)


@pytest.mark.parametrize("method", ["ag", "ma"])
def test_a_run_with_kernels_learns_what_one_without_does(method, train_run, tmp_path):
    losses = []
    for kernels in ("off", "cpu"):
        run = train_run(method=method, kernels=kernels, steps=6, log_every_steps=1, output_dir=str(tmp_path / kernels))
        rows = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
        losses.append([row["loss"] for row in rows if row["event"] == "step"])
    assert len(losses[0]) == 6 and losses[0] == pytest.approx(losses[1], rel=1e-4)
