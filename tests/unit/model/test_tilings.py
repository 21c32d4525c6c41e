"""Whole columns, rows and blocks of a model's weights: chosen, trained, saved and resumed."""

import json

import pytest
import torch
from tiny_loop import batch, same, train
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend

import scale_sft
from scale_sft.config.loading import load as load_config
from scale_sft.errors import UserError
from scale_sft.model import compiled_blocks
from scale_sft.model.compiled_blocks import compile_blocks, decoder_blocks
from scale_sft.model.targets import budget_of
from scale_sft.spiel.schedules import Phase
from scale_sft.spiel.taps import WeightTap, attach
from tests.methods import ESTIMATED

RUN = {"density": 0.07, "total_steps": 6}
KINDS = {
    "columns": {"method": "columns"},
    "chosen columns": {"method": "columns", "selection_batches": 1, "score": "balanced", "draw": "sample"},
    "columns, with embeddings": {"method": "columns", "train_embeddings": "both"},
    "rows": {"method": "random", "granularity": "row"},
    "blocks": {"method": "static", "granularity": "block", "block_size": 4, "selection_batches": 1},
}
GROWN = {"method": "ag", "update_interval_steps": 3, "estimation_steps": 2, "density": 0.2, "total_steps": 9}
GROWN |= {"initial_replacement_fraction": 0.6}
MOVING = {
    "columns": {"granularity": "column"},
    "rows, sampled": {"granularity": "row", "selection_batches": 1, "score": "balanced", "draw": "sample"},
    "columns, with embeddings": {"granularity": "column", "train_embeddings": "both", "exchange_if_better": True},
    "rows, with embeddings": {"granularity": "row", "train_embeddings": "both", "drop_criterion": "change"},
}


def by_inputs(sparse, name: str) -> torch.Tensor:
    """Which entries are active, [out, in], however the layer stores its weight."""
    delta = sparse.tuning.store[name]
    mask = torch.zeros(delta.numel, dtype=torch.bool)
    mask[delta.indices.long()] = True
    transposed = next(target.transposed for target in sparse.targets if target.name == name)
    return mask.view(delta.shape).t() if transposed else mask.view(delta.shape)


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
@pytest.mark.parametrize("kind", KINDS)
def test_gradients_are_those_of_autograd_and_no_step_makes_candidates(load, architecture, kind) -> None:
    dense, model = load(architecture=architecture), load(architecture=architecture)
    sparse = scale_sft.attach(model, **RUN, **KINDS[kind])
    optimizer, recorder = sparse.optimizer(lr=1e-2), sparse.tuning.recorder
    while optimizer.steps < 1:
        train(model, optimizer, 1, 1)
        recorder = sparse.tuning.recorder
    for name in sparse.shapes:
        mask = by_inputs(sparse, name)
        lines = mask.all(1) if kind == "rows" else mask.all(0)
        if kind != "blocks":
            assert torch.equal(mask, lines[:, None].expand_as(mask) if kind == "rows" else lines.expand_as(mask))
    dense.load_state_dict({name: value.clone() for name, value in model.state_dict().items()})
    for one in (dense, model):
        one(**batch(2)).loss.backward()
    assert recorder.phase is Phase.OFF and not recorder.candidates and recorder.flat.numel() == recorder.store.active
    gradients = dict(dense.named_parameters())
    for delta in recorder.store:
        expected = gradients[delta.name].grad.view(-1)[delta.indices.long()]
        torch.testing.assert_close(
            recorder.gradients[recorder.store.entries_of(delta.name)], expected, rtol=1e-4, atol=1e-6
        )


def test_a_column_holds_the_weights_of_one_input_and_the_forward_pass_keeps_no_other_input() -> None:
    layer, saved = nn.Linear(10, 6).requires_grad_(False), []
    wanted = torch.tensor([1, 8])
    record = lambda name, left, right: saved.append((left.shape, right.shape))
    attach(WeightTap(layer, "w", record, needed=lambda name, x, left: x.index_select(1, wanted)))
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor.shape) or tensor, lambda t: t):
        out = layer(torch.randn(2, 3, 10, requires_grad=True))
    out.sum().backward()
    assert kept == [(6, 2)] and saved == [((6, 6), (6, 2))]


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
@pytest.mark.parametrize("kind", MOVING)
def test_lines_move_and_stay_whole_and_their_gradients_are_those_of_autograd(load, architecture, kind) -> None:
    dense, model = load(architecture=architecture), load(architecture=architecture)
    sparse = scale_sft.attach(model, **GROWN | MOVING[kind])
    optimizer, first = sparse.optimizer(lr=1e-2), {}
    before = {name: value.clone() for name, value in model.state_dict().items()}
    for number in range(1, 11):
        if optimizer.steps == 7:
            break
        train(model, optimizer, number, number, micro=2)
        first = first if optimizer.turnovers else {name: by_inputs(sparse, name) for name in sparse.shapes}
    assert [turnover.step for turnover in optimizer.turnovers] == [2, 5]
    assert all(0 < turnover.replaced == turnover.dropped for turnover in optimizer.turnovers)
    for name, earlier in first.items():
        mask = by_inputs(sparse, name)
        if "embed" not in kind:
            assert torch.equal(mask, (mask.all(1)[:, None] if "rows" in kind else mask.all(0)).expand_as(mask))
        assert int(mask.sum()) == int(earlier.sum()) and len(sparse.tuning.store[name].tiles.numbers)
    assert any(not torch.equal(by_inputs(sparse, name), earlier) for name, earlier in first.items())
    dense.load_state_dict({name: value.clone() for name, value in model.state_dict().items()})
    for one in (dense, model):  # step 8, in a phase: the whole input is kept, and the active gradients are the same
        one(**batch(20)).loss.backward()
    recorder, gradients = sparse.tuning.recorder, dict(dense.named_parameters())
    assert recorder.phase is Phase.ESTIMATE and recorder.flat.numel() > recorder.store.active
    for delta in recorder.store:
        expected = gradients[delta.name].grad.view(-1)[delta.indices.long()]
        found = recorder.gradients[recorder.store.entries_of(delta.name)]
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)
    optimizer.zero_grad()
    sparse.detach()
    assert same(before, model.state_dict())


def test_the_forward_pass_keeps_all_of_the_input_in_phases_only(load) -> None:
    model = load()
    sparse = scale_sft.attach(model, **GROWN | {"granularity": "column", "selection_batches": 1})
    optimizer, kept = sparse.optimizer(lr=1e-2), []
    name = next(name for name in sparse.shapes if "down_proj" in name)
    factor = torch.zeros(3, sparse.shapes[name][1])
    while optimizer.steps < 6:
        kept.append(sparse._needed(name, factor, False).shape[1] == factor.shape[1])
        train(model, optimizer, len(kept), len(kept))
    assert kept == [True, True, True, False, True, True, False]  # the choice, steps 1 and 2, 3, 4 and 5, 6


def test_static_columns_without_selection_batches_are_replaced_once(load) -> None:
    model = load()
    sparse = scale_sft.attach(model, **GROWN | ESTIMATED | {"granularity": "column"})
    optimizer = sparse.optimizer(lr=1e-2)
    train(model, optimizer, 1, 6)
    assert [turnover.step for turnover in optimizer.turnovers] == [2] and optimizer.turnovers[0].replaced > 0


@pytest.mark.parametrize("kind", ["columns", "rows, with embeddings"])
@pytest.mark.parametrize("step", [4, 6])
def test_moving_lines_resume_bit_for_bit_also_in_an_open_phase(load, kind, step) -> None:
    options = GROWN | MOVING[kind] | {"moments": "int8"}
    straight, again = load("bfloat16"), load("bfloat16")
    whole = scale_sft.attach(straight, **options)
    optimizer = whole.optimizer(lr=1e-2)
    train(straight, optimizer, 1, step)
    state = optimizer.state_dict()
    assert ("candidate_sketch" in next(iter(state["state"]["weights"].values()))) == (step == 4)
    train(straight, optimizer, step + 1, 9)
    resumed = scale_sft.attach(again, **options)
    optimizer = resumed.optimizer(lr=1e-2)
    optimizer.load_state_dict(state)
    train(again, optimizer, step + 1, 9)
    assert whole.tuning.digests() == resumed.tuning.digests() and same(straight.state_dict(), again.state_dict())


@pytest.mark.parametrize("kind", ["columns", "blocks"])
def test_an_interrupted_loop_resumes_bit_for_bit(load, kind) -> None:
    straight = load("bfloat16")
    whole = scale_sft.attach(straight, **RUN, **KINDS[kind])
    optimizer = whole.optimizer(lr=1e-2)
    train(straight, optimizer, 1, 3)
    state = optimizer.state_dict()
    train(straight, optimizer, 4, 6)
    again = load("bfloat16")
    resumed = scale_sft.attach(again, **RUN, **KINDS[kind], seed=9)  # the state's columns replace those of the seed
    optimizer = resumed.optimizer(lr=1e-2)
    optimizer.load_state_dict(state)
    train(again, optimizer, 4, 6)
    assert whole.tuning.digests() == resumed.tuning.digests() and same(straight.state_dict(), again.state_dict())
    name = resumed.tuning.store.names[0]
    indices = state["state"]["weights"][name]["indices"]
    indices.copy_(torch.arange(len(indices)))
    with pytest.raises(UserError, match="are not whole tiles"):
        optimizer.load_state_dict(state)


@pytest.mark.parametrize("options", [RUN | {"method": "columns"}, GROWN | {"granularity": "column"}])
def test_compiled_blocks_train_as_plain_ones_do(load, monkeypatch, options) -> None:
    torch._dynamo.reset()
    monkeypatch.setattr(compiled_blocks, "BACKEND", CompileCounterWithBackend("eager"))
    found = []
    for compiled in (False, True):
        model = load().train()
        model.config.use_cache = False
        sparse = scale_sft.attach(model, **options)
        if compiled:
            compile_blocks(decoder_blocks(model, sparse.shapes))
        train(model, sparse.optimizer(lr=1e-2), 1, 3)
        found.append(sparse.tuning.digests())
    assert found[0] == found[1] and compiled_blocks.BACKEND.frame_count


def test_an_adapter_of_columns_says_so_and_trains_further_only_as_columns(load, tmp_path) -> None:
    model = load()
    sparse = scale_sft.attach(model, **RUN, method="columns")
    train(model, sparse.optimizer(lr=1e-2), 1, 2)
    info = json.loads((sparse.save(tmp_path / "columns") / "adapter_config.json").read_text())
    assert (info["method"], info["granularity"]) == ("columns", "column")
    deltas = sparse.tuning.store.flat.clone()
    sparse.detach()
    further = scale_sft.attach(model, start_from=str(tmp_path / "columns"), method="columns", total_steps=2)
    assert torch.equal(further.tuning.store.flat, deltas)
    train(model, further.optimizer(lr=1e-2), 1, 1)
    further.detach()
    entries = scale_sft.attach(model, **RUN, method="random")
    entries.save(tmp_path / "entries")
    entries.detach()
    with pytest.raises(UserError, match="start_from: got entries of '.*' in .* that are not whole columns"):
        scale_sft.attach(model, start_from=str(tmp_path / "entries"), method="columns", total_steps=2)


def test_budgets_are_whole_columns_and_together_less_than_one_below_what_was_asked_for() -> None:
    shapes = {"a.weight": (10, 30), "b.weight": (20, 30), "c.weight": (30, 10)}
    sparse = load_config(None, {"method": "columns", "density": 0.05, "base": "demo", "steps": 1}).sparse
    counts = budget_of(sparse, shapes, {"c.weight"})
    assert counts == {"a.weight": 10, "b.weight": 20, "c.weight": 30}  # asked for: 15, 30, 15; the last is [in, out]
    with pytest.raises(UserError, match=r"got 4 entries for 'a.weight' of 10 x 30, expected at least 10: a whole col"):
        budget_of(load_config(None, {"method": "columns", "density": 0.015, "steps": 1}).sparse, shapes)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"granularity": "column", "method": "ma"}, "granularity: got column with method ma"),
        ({"granularity": "block", "method": "ag"}, "granularity: got block with method ag, which replaces"),
        ({"granularity": "column", "method": "ag", "score": "balanced"}, "score: got balanced with method ag and gran"),
        ({"granularity": "row", "method": "ag", "budget": "global", "selection_batches": 1}, "budget: got global with"),
        ({"granularity": "row", "method": "columns"}, "granularity: got row with method columns"),
        (
            {"granularity": "block", "method": "static", "selection_batches": 0},
            "granularity: got block with method static without selection_batches, which replaces",
        ),
        ({"method": "columns", "selection_batches": 1, "row_quota": 2.0}, "row_quota: got 2.0 with granularity column"),
        ({"method": "columns", "selection_batches": 1, "budget": "global"}, "budget: got global with granularity col"),
        ({"method": "columns", "score": "snr"}, "score: got snr with method columns, which without selection_batches"),
        ({"method": "columns", "seed_moments": False}, "seed_moments: got False with method columns"),
        ({"granularity": "colum"}, "granularity: .*colum.*did you mean 'column'"),
        ({"method": "random", "granularity": "block", "block_size": 7}, "block_size: got 7 for '.*does not divide"),
        ({"method": "columns", "density": 1e-4}, r"budget: got 1 entries for '.*expected at least .*: a whole column"),
    ],
)
def test_what_contradicts_itself_is_one_error_that_says_what_to_do(load, options, says) -> None:
    model = load()
    with pytest.raises(UserError, match=says):
        scale_sft.attach(model, **{**RUN, **options})
    scale_sft.attach(model, **RUN).detach()
