"""An embedding's gradient is kept by rows: that of autograd where tokens occur, nothing anywhere else."""

from contextlib import nullcontext
from math import inf

import pytest
import torch
from test_linear import Operations
from torch import nn

from scale_sft.spiel.algorithm import SparseFineTuning
from scale_sft.spiel.deltas import DeltaStore
from scale_sft.spiel.embedding_taps import EmbeddingTap, why_not_embedding
from scale_sft.spiel.indices import Entries
from scale_sft.spiel.recorder import GradientRecorder
from scale_sft.spiel.row_gradients import Pending, RowGradient
from scale_sft.spiel.schedules import Phase, ReallocationSchedule
from scale_sft.spiel.selection.parts import WholeParts
from scale_sft.spiel.selection.proposals import Proposals
from scale_sft.spiel.selection.rule import SelectionRule
from scale_sft.spiel.selection.scores import _SCORES
from scale_sft.spiel.selection.survey import Survey
from scale_sft.spiel.settings import Backends, MethodSettings
from scale_sft.spiel.taps import attach, detach
from scale_sft.spiel.topk import top_k_magnitude

V, H = 50, 8


class Scaled(nn.Embedding):
    """An embedding with a scale of its own, as Gemma 3 has."""

    def forward(self, input_ids):
        return super().forward(input_ids) * 3.5


KINDS = {
    "plain": lambda: nn.Embedding(V, H),
    "padding": lambda: nn.Embedding(V, H, padding_idx=4),
    "scaled": lambda: Scaled(V, H, 4),
}
IDS = torch.tensor([[4, 7, 7, 9], [49, 7, 4, 0]])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", KINDS)
def test_gradients_are_those_of_autograd_and_never_dense(kind, dtype) -> None:
    torch.manual_seed(0)
    layer, found, down = KINDS[kind]().to(dtype), [], torch.randn(*IDS.shape, H, dtype=dtype)
    (layer(input_ids=IDS) if kind == "scaled" else layer(IDS)).backward(down)
    expected, plain = layer.weight.grad, layer(IDS).detach()
    layer.requires_grad_(False)
    attach(EmbeddingTap(layer, "w", lambda name, ids, dy: found.append(RowGradient(ids, dy, V))))
    with Operations({V * H}, [layer.weight]) as operations:
        output = layer(IDS)
        output.backward(down)
    assert torch.equal(output, plain) and operations.most_alive == 0
    torch.testing.assert_close(
        found[0].dense(), expected.float(), rtol=1e-2 if dtype is torch.bfloat16 else 1e-6, atol=0
    )
    detach(layer)
    assert not layer(IDS).requires_grad


def test_without_gradients_nothing_is_recorded_and_the_look_up_may_be_anothers() -> None:
    layer = nn.Embedding(V, H).requires_grad_(False)
    attach(EmbeddingTap(layer, "w", lambda *_: pytest.fail("recorded"), look_up=lambda ids: layer.weight[ids] + 1))
    with torch.no_grad():
        assert torch.equal(layer(IDS), layer.weight[IDS] + 1)


@pytest.mark.parametrize(
    ("module", "why"),
    [(nn.Linear(2, 3), "not nn.Embedding"), (nn.Embedding(3, 2, max_norm=1.0), "max_norm"), (nn.Embedding(3, 2), None)],
)
def test_embeddings_that_change_their_weight_are_no_targets(module, why) -> None:
    assert (why_not_embedding(module) is None) if why is None else why in why_not_embedding(module)


def gradient(seed: int = 0, tokens: int = 6) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(V, (tokens,), generator=generator), torch.randn(tokens, H, generator=generator)


def test_entries_are_picked_as_from_the_dense_gradient() -> None:
    rows = RowGradient(*gradient(), V)
    indices = torch.randperm(V * H, generator=torch.Generator().manual_seed(1))[:100].sort().values
    for dtype in (torch.float32, torch.bfloat16):
        out = torch.ones(100, dtype=dtype)
        rows.pick([(Entries(indices, (V, H)), out)])
        assert torch.equal(out, 1 + rows.dense().view(-1)[indices].to(dtype))


@pytest.mark.parametrize("score", sorted(_SCORES))
@pytest.mark.parametrize("draw", ["top", "sample"])
def test_candidates_are_those_of_the_dense_gradient(score, draw) -> None:
    """By any rule, as long as the rows that were met have enough entries."""
    rule = SelectionRule(score=score, temperature=inf if draw == "top" else 1.0)
    weight = torch.randn(V, H, generator=torch.Generator().manual_seed(2))
    proposals = Proposals(rule, WholeParts, lambda name: nullcontext(weight), 2)
    rows = RowGradient(*gradient(), V)
    chosen, facts = proposals.propose("w", rows, 20, 1)
    expected, of_dense = proposals.propose("w", rows.dense(), 20, 1)
    assert torch.equal(chosen, expected)
    assert {key: value.shape for key, value in facts.items()} == {key: value.shape for key, value in of_dense.items()}
    for key, value in facts.items():
        torch.testing.assert_close(value, of_dense[key])


def test_rows_without_enough_entries_are_filled_up_with_entries_of_gradient_zero() -> None:
    rows = RowGradient(torch.tensor([3, 3, 1]), torch.ones(3, H), V)
    chosen = rows.union(lambda flat: None).choose(top_k_magnitude, 20)
    assert chosen.tolist() == [*range(4), *range(8, 16), *range(24, 32)]
    assert rows.union(lambda flat: None).choose(top_k_magnitude, 0).numel() == 0
    nothing = RowGradient(torch.empty(0, dtype=torch.int64), torch.empty(0, H), V)
    assert not nothing.any() and nothing.union(lambda flat: None).choose(top_k_magnitude, 3).tolist() == []


@pytest.mark.parametrize("temperature", [inf, 0.5])
@pytest.mark.parametrize("score", ["gradient", "balanced"])
def test_a_gradient_of_zero_proposes_nothing_and_the_next_one_does(score, temperature) -> None:
    rule = SelectionRule(score=score, temperature=temperature)
    backends = Backends() if rule.is_plain else Backends(proposals=Proposals(rule, WholeParts, None, 1))
    tuning = SparseFineTuning(
        DeltaStore({"w": (V, H)}, {"w": 30}),
        MethodSettings(method="ag"),
        ReallocationSchedule(total_steps=9, update_interval_steps=3, estimation_steps=1),
        backends,
    )
    ids, dy = gradient()
    tuning.recorder.begin_step(Phase.PROPOSE)
    tuning.recorder.record_product("w", ids, torch.zeros_like(dy))
    assert not tuning.recorder.candidates
    tuning.recorder.record_product("w", ids, dy)
    assert set((tuning.recorder.candidates["w"].indices // H).tolist()) <= set(ids.tolist())


def test_an_embedding_takes_no_memory_of_its_size() -> None:
    recorder = GradientRecorder(DeltaStore({"w": (V, H), "v": (3, H)}, {"w": 30, "v": 2}), {"w": 30, "v": 2})
    recorder.begin_step(Phase.PROPOSE)
    recorder.record_product("w", *gradient())
    recorder.record_product("v", torch.randn(4, 3), torch.randn(4, H))
    assert recorder._buffer.numel() == 3 * H


@pytest.mark.parametrize("method", ["ag", "ma"])
@pytest.mark.parametrize(("score", "temperature"), [("gradient", inf), ("snr", inf), ("gradient", 0.5)])
@pytest.mark.parametrize("together", [False, True])
def test_rows_without_a_gradient_grow_nothing(method, score, temperature, together) -> None:
    torch.manual_seed(0)
    store = DeltaStore({"w": (V, H)}, {"w": 120}, seed=0)
    rule = SelectionRule(score=score, temperature=temperature)
    proposals = None if rule.is_plain else Proposals(rule, WholeParts, None, 1)
    backends = Backends(proposals=proposals, together=together)
    schedule = ReallocationSchedule(
        total_steps=9, update_interval_steps=3, estimation_steps=1, estimates=method == "ag"
    )
    tuning = SparseFineTuning(store, MethodSettings(method=method), schedule, backends)
    carrier = type("Nowhere", (), dict.fromkeys(("write", "release", "adopt"), lambda *_: None))()
    before, met = store["w"].indices, torch.tensor([2, 30])
    grown = 0
    for step in range(1, 10):
        tuning.begin_step(step)
        tuning.recorder.record_product("w", met, torch.randn(2, H))
        tuning.update(0.1)
        if schedule.reallocates_at(step):
            grown += tuning.reallocate(step, carrier).replaced
    new = store["w"].indices
    new = new[~torch.isin(new, before)]
    assert 0 < new.numel() <= 2 * H and set((new // H).tolist()) <= {2, 30} and store["w"].active == 120
    assert grown <= 3 * 2 * H


@pytest.mark.parametrize("last", ["rows", "dense"])
def test_parts_of_a_gradient_propose_candidates_together(last) -> None:
    """Chunks of the output layer, and the embedding that shares its weight."""
    torch.manual_seed(0)
    store = DeltaStore({"w": (V, H)}, {"w": 30}, seed=0)
    recorder, ids, dy = GradientRecorder(store, {"w": 30}), *gradient()
    left, right = torch.randn(5, V), torch.randn(5, H)
    dense = left.t() @ right
    whole = 2 * dense + (RowGradient(ids, dy, V).dense() if last == "rows" else dense)
    recorder.begin_step(Phase.PROPOSE, watch=True)
    recorder.record_product("w", left, right, more=True)
    recorder.record_product("w", left, right, more=True)
    assert not recorder.candidates
    recorder.record_product("w", *((ids, dy) if last == "rows" else (left, right)))
    candidates = recorder.candidates["w"].indices
    assert torch.equal(candidates.long(), top_k_magnitude(whole.view(-1), 30))
    torch.testing.assert_close(recorder.gradients, whole.view(-1)[store["w"].indices.long()])
    torch.testing.assert_close(recorder.flat[30:], whole.view(-1)[candidates.long()])
    assert recorder.received == {"w"}


def test_a_survey_adds_up_rows_and_parts() -> None:
    rule = SelectionRule(score="gradient", row_quota=1.5)
    left, right, (ids, dy) = torch.randn(5, V), torch.randn(5, H), gradient()
    whole = left.t() @ right + RowGradient(ids, dy, V).dense()
    by_parts, at_once = (Survey({"w": (V, H)}, rule, WholeParts(), None) for _ in range(2))
    by_parts.record("w", left, right, more=True)
    by_parts.record("w", ids, dy)
    at_once.record("w", torch.eye(V), whole)
    for survey in (by_parts, at_once):
        survey.end_batch()
    chosen = by_parts.choose({"w": 60})["w"]
    assert torch.equal(chosen, at_once.choose({"w": 60})["w"])
    assert torch.bincount(chosen // H).max() <= 2  # 1.5 times the mean of 1.2, rounded up


def test_a_part_may_be_overwritten_and_a_single_one_is_not_copied() -> None:
    pending, part = Pending(), torch.ones(2, 3)
    assert pending.add("w", part, more=False) is part
    assert pending.add("w", part, more=True) is None and "w" in pending
    part.fill_(5)
    assert torch.equal(pending.add("w", part, more=False), torch.full((2, 3), 6.0)) and "w" not in pending
