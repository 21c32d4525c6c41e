from collections import Counter

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from scale_sft.kernels.moments import moments_of
from scale_sft.spiel import digests
from scale_sft.spiel.algorithm import SparseFineTuning
from scale_sft.spiel.deltas import DeltaStore
from scale_sft.spiel.digests import BLOCK_BYTES, digest_states
from scale_sft.spiel.moments import mixed_moments
from scale_sft.spiel.schedules import ReallocationSchedule
from scale_sft.spiel.settings import Backends, MethodSettings

INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
SHAPES = {"a": (40, 50), "b": (7, 9), "c": (1, 5)}


def digest(**tensors: Tensor) -> str:
    return digest_states([("w", tensors)])["w"]


def with_one_bit_flipped(tensor: Tensor, entry: int, bit: int) -> Tensor:
    flipped = tensor.clone()
    bits = flipped.view(INTEGERS[tensor.element_size()])
    value, is_sign = 1 << bit, bits.dtype is not torch.uint8 and bit == 8 * bits.element_size() - 1
    bits[entry] ^= -value if is_sign else value
    return flipped


@pytest.mark.parametrize("size", [1, 13, 3 * BLOCK_BYTES // 4 + 5])
@pytest.mark.parametrize(
    "dtype", [torch.uint8, torch.int16, torch.int32, torch.int64, torch.bfloat16, torch.float32, torch.uint16]
)
def test_one_bit_of_any_entry_of_any_dtype_is_told(dtype: torch.dtype, size: int) -> None:
    tensor = torch.randint(0, 200, (size,), generator=torch.Generator().manual_seed(size)).to(dtype)
    before, kept = digest(other=torch.ones(3), tensor=tensor), tensor.clone()
    assert torch.equal(tensor, kept) and digest(other=torch.ones(3), tensor=kept) == before
    for entry in {0, size // 2, size - 1}:
        for bit in range(8 * tensor.element_size()):
            assert digest(other=torch.ones(3), tensor=with_one_bit_flipped(tensor, entry, bit)) != before


def test_a_digest_tells_what_equality_does_not() -> None:
    x, ints = torch.tensor([0.0, torch.nan, 1.0, 2.0]), torch.arange(6, dtype=torch.int32)
    different = [
        digest(x=x),
        digest(x=with_one_bit_flipped(x, 0, 31)),  # -0.0
        digest(x=with_one_bit_flipped(x, 1, 3)),  # another NaN
        digest(x=x[[0, 1, 3, 2]]),
        digest(x=x[:2], y=x[2:]),
        digest(x=x.view(2, 2)),
        digest(x=x.view(torch.int32)),
        digest(y=x),
        digest(x=torch.cat((x, torch.zeros(1)))),
        digest(x=ints),
        digest(x=ints.view(2, 3)),
        digest(x=ints.long()),
        digest(x=torch.empty(0)),
        digest(x=torch.empty(0, dtype=torch.int32)),
        digest(x=torch.empty(0), y=torch.empty(0)),
        digest(),
        digest_states([("v", {"x": x})])["v"],
    ]
    assert len(set(different)) == len(different) and all(len(value) == 32 for value in different)
    assert digest_states([]) == {}


def test_a_digest_depends_on_values_alone_not_on_layout_neighbours_or_batches(monkeypatch) -> None:
    """Pinned: ranks may run on different machines, whose digests must be equal."""
    flat = torch.arange(200_001, dtype=torch.float32)
    x, scalar = flat[1:], torch.tensor(3.0)
    expected = digest(x=x, scalar=scalar)
    assert digest(x=x.clone(), scalar=scalar) == expected
    assert digest(x=torch.stack((x, -x), 1)[:, 0], scalar=scalar) == expected
    neighbours = [(name, {"x": x, "scalar": scalar}) for name in ("u", "w", "x")]
    assert digest_states(neighbours)["w"] == expected
    for blocks in (1, 2, 7):
        monkeypatch.setattr(digests, "CPU_BLOCKS", blocks)
        assert digest_states(neighbours)["w"] == expected
    assert expected == "28cb23430090cba7ceab4e94692b0789"


def after_a_phase_opened(settings: MethodSettings, cohorts: int, backends: Backends, dtype: torch.dtype, wide: bool):
    shapes = {**SHAPES, "wide": (1 << 16, 1 << 16)} if wide else SHAPES
    store = DeltaStore(
        shapes, dict.fromkeys(shapes, 5), cohorts=cohorts, dtype=dtype,
        keep_reference=settings.drop_criterion == "change",
    )  # fmt: skip
    schedule = ReallocationSchedule(total_steps=9, estimates=settings.method != "ma")
    tuning = SparseFineTuning(store, settings, schedule, backends)
    if settings.method != "ma":
        tuning.recorder.open_estimation()
        for name in shapes:
            state = {"candidate_indices": torch.arange(5, dtype=store[name].indices.dtype)}
            state |= {"candidate_mean": torch.rand(5), "candidate_mean_square": torch.rand(5)}
            tuning.recorder.load_candidates(name, state)
    return tuning


@pytest.mark.parametrize(
    ("settings", "cohorts", "backends", "dtype", "wide", "dtypes"),
    [
        (MethodSettings(drop_criterion="change"), 9, Backends(), torch.float32, True, "float32 int32 int64 uint8"),
        (MethodSettings(), 300, Backends(moments=mixed_moments), torch.bfloat16, False, "bfloat16 float32 int16 int32"),
        (MethodSettings(), 9, Backends(moments=moments_of("int8")), torch.float32, False, "float32 int32 uint8"),
        (MethodSettings(method="ma"), 9, Backends(), torch.float32, False, "float32 int32 uint8"),
    ],
)  # fmt: skip
def test_one_bit_of_any_tensor_of_the_state_changes_the_digest_of_its_weight_alone(
    settings, cohorts, backends, dtype, wide, dtypes
) -> None:
    tuning = after_a_phase_opened(settings, cohorts, backends, dtype, wide)
    states = {name: tuning.state_of(name) for name in tuning.store.names}
    expected, seen = tuning.digests(), set()
    assert list(expected) == tuning.store.names
    for name, state in states.items():
        for kind, tensor in state.items():
            seen.add(str(tensor.dtype).removeprefix("torch."))
            planted = {**state, kind: with_one_bit_flipped(tensor, tensor.numel() // 2, bit=5)}
            found = digest_states({**states, name: planted}.items())
            assert [other for other in states if found[other] != expected[other]] == [name], kind
    assert seen == set(dtypes.split())


def test_the_state_is_read_once_in_few_launches_and_one_transfer(monkeypatch) -> None:
    """Counted on the CPU, with the batches of a device: 12 launches for 16 MiB."""
    monkeypatch.setattr(digests, "CPU_BLOCKS", digests.DEVICE_BLOCKS)
    states = [(f"w{n}", {"x": torch.ones(300_000), "y": torch.ones(300_000)}) for n in range(20)]

    made: Counter[str] = Counter()

    class Launches(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            made[function.overloadpacket.__name__] += 1
            return function(*args, **(kwargs or {}))

    with Launches():
        digest_states(states)
    for view in ("view", "detach", "slice", "split", "alias", "unbind", "select"):
        made.pop(view, None)
    batches = -(-sum(-(-2_400_000 // BLOCK_BYTES) for _ in states) // digests.DEVICE_BLOCKS)
    assert made["cat"] == batches + 1
    assert sum(made.values()) <= 12 * batches + 30, made
