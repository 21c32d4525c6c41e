"""A step on a GPU launches few kernels, however many weights a model has. Counted on the CPU: see `Launches`."""

from collections import Counter

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from scale_sft.model.resident import ResidentDeltas, WeightPart
from scale_sft.spiel import indices
from scale_sft.spiel.algorithm import SparseFineTuning
from scale_sft.spiel.deltas import DeltaStore
from scale_sft.spiel.moments import float32_moments, mixed_moments
from scale_sft.spiel.schedules import Phase, ReallocationSchedule
from scale_sft.spiel.settings import Backends, MethodSettings

SCALE = 128  # 7B's 224 weights, with fewer rows and columns
SHAPES = {
    f"{layer}.{name}": (rows // SCALE, columns // SCALE)
    for layer in range(32)
    for name, rows, columns in [
        *((name, 4096, 4096) for name in "qkvo"),
        ("gate", 11008, 4096),
        ("up", 11008, 4096),
        ("down", 4096, 11008),
    ]
}
ENTRIES_OF_7B = 129_500_000  # active, at a density of 2 %


NOTHING = frozenset({"empty", "new_empty", "empty_like", "empty_strided", "lift_fresh", "_local_scalar_dense"})
SEVERAL = {"cumsum": 2, "cumsum_": 2, "repeat_interleave": 3, "sort": 16, "topk": 6, "nonzero": 3}
WAITS = frozenset({"_local_scalar_dense", "nonzero", "masked_select", "_unique2", "equal", "bincount"})


class Launches(TorchDispatchMode):
    """Counts the kernels that a GPU would launch, and the times that the host would wait for it.

    Each aten operation counts as one kernel, except for: views and allocations, none; an operation whose CUDA version
    is made of several, as many as SEVERAL says (upper bounds for large inputs: a radix sort of int64 takes 8 passes and
    a few kernels before and after them); `cat`, one per 128 inputs; `_foreach`, one per 30 tensors. The host waits
    where the values or the number of results are needed: WAITS, boolean masks, and `tolist`, which `counted` adds.
    """

    def __init__(self) -> None:
        super().__init__()
        self.kernels: Counter[str] = Counter()
        self.waits: Counter[str] = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        name, schema = func.overloadpacket.__name__, func._schema
        masks = name in ("index", "index_put_", "index_put", "_index_put_impl_") and any(
            index is not None and index.dtype in (torch.bool, torch.uint8) for index in args[1]
        )
        unsized = name == "repeat_interleave" and kwargs.get("output_size") is None
        if name in WAITS or masks or unsized:
            self.waits[name] += 1
        is_view = any(one.alias_info and not one.alias_info.is_write for one in schema.returns)
        if name == "cat":
            self.kernels[name] += -(-len(args[0]) // 128)
        elif name.startswith("_foreach"):
            self.kernels[name] += -(-len(args[0]) // 30)
        elif not is_view and name not in NOTHING:
            self.kernels[name] += SEVERAL.get(name, 1) + (SEVERAL["nonzero"] if masks else 0)
        return func(*args, **kwargs)

    def report(self, what: str) -> tuple[int, int]:
        kernels, waits = sum(self.kernels.values()), sum(self.waits.values())
        print(f"\n{what}: {kernels} launches, {waits} waits; {self.kernels.most_common(8)} {dict(self.waits)}")
        return kernels, waits


class Run:
    """224 weights in bf16 with their deltas, handled in as many pieces as 7B's would be on a GPU."""

    def __init__(self, method: str, monkeypatch, **backends) -> None:
        counts = {name: max(1, rows * columns // 50) for name, (rows, columns) in SHAPES.items()}
        piece = -(-sum(counts.values()) * indices.DEVICE_PIECE_ENTRIES // ENTRIES_OF_7B)
        monkeypatch.setattr(indices, "PIECE_ENTRIES", piece)
        assert len(SHAPES) == 224
        store = DeltaStore(SHAPES, counts)
        schedule = ReallocationSchedule(
            total_steps=100, estimation_steps=2, update_interval_steps=4, estimates=method == "ag"
        )
        settings = MethodSettings(method=method, weight_decay=0.1)
        self.tuning = SparseFineTuning(store, settings, schedule, Backends(**backends))
        self.weights = {name: nn.Parameter(torch.randn(shape).bfloat16()) for name, shape in SHAPES.items()}
        parts = {name: WeightPart.whole(weight) for name, weight in self.weights.items()}
        self.carrier = ResidentDeltas(store, parts)
        self.step(Phase.OFF)  # tables that are made once
        self.tuning.optimizer.begin_cohort()  # several cohorts are the usual case, and the dearer one

    def record(self, phase: Phase) -> None:
        self.tuning.recorder.begin_step(phase)
        for name, shape in SHAPES.items():
            self.tuning.recorder.record(name, torch.randn(shape).bfloat16())

    def step(self, phase: Phase) -> None:
        self.record(phase)
        self.tuning.update(1e-3)
        self.carrier.write()

    def counted(self, monkeypatch, work, what: str) -> tuple[int, int]:
        with Launches() as launches, monkeypatch.context() as patch:
            for name in ("tolist", "cpu"):
                original = getattr(Tensor, name)
                count = lambda tensor, name=name, original=original: launches.waits.update([name]) or original(tensor)
                patch.setattr(Tensor, name, count)
            work()
        return launches.report(what)


@pytest.mark.parametrize(("moments", "phase"), [(float32_moments, Phase.OFF), (mixed_moments, Phase.ESTIMATE)])
def test_adamw_and_the_write_of_all_weights_are_few_launches(moments, phase, monkeypatch):
    run = Run("ag", monkeypatch, moments=moments)
    run.record(Phase.PROPOSE if phase is Phase.ESTIMATE else Phase.OFF)
    work = lambda: (run.tuning.update(1e-3), run.carrier.write())
    launches, waits = run.counted(monkeypatch, work, f"AG, {moments.__name__}, {phase.name}")
    assert launches <= 300 and waits == 0


def test_sm3_and_the_write_of_all_weights_are_few_launches(monkeypatch):
    run = Run("ma", monkeypatch)
    run.record(Phase.OFF)
    launches, waits = run.counted(monkeypatch, lambda: (run.tuning.update(1e-3), run.carrier.write()), "MA")
    assert launches <= 300 and waits == 0


@pytest.mark.parametrize(("method", "limit"), [("ag", 3000), ("ma", 5000)])
def test_a_reallocation_of_all_weights_is_few_launches(method, limit, monkeypatch):
    run = Run(method, monkeypatch, together=True)
    tuning = run.tuning
    run.step(Phase.PROPOSE if method == "ag" else Phase.OFF)
    turnovers = []
    work = lambda: (turnovers.append(tuning.reallocate(50, run.carrier)), run.carrier.write())
    launches, waits = run.counted(monkeypatch, work, f"reallocation, {method}")
    assert turnovers[0].replaced > 224
    assert launches <= limit and waits <= 224
