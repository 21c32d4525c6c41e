"""Whole columns and rows that move: sketches of gradients, and the exchange of tiles."""

import pytest
import torch
from carriers import NoCarrier
from torch.utils._python_dispatch import TorchDispatchMode

from scale_sft.spiel.algorithm import SparseFineTuning
from scale_sft.spiel.deltas import DeltaStore
from scale_sft.spiel.drop_grow import exchange_tiles
from scale_sft.spiel.schedules import Phase, ReallocationSchedule
from scale_sft.spiel.seeding import random_tiles
from scale_sft.spiel.selection.rule import SelectionRule
from scale_sft.spiel.selection.tile_keys import growth_keys
from scale_sft.spiel.settings import Backends, MethodSettings
from scale_sft.spiel.tile_recorder import SKETCHED, TileRecorder, sketched
from scale_sft.spiel.tiles import Tiles, Tiling

SHAPE = (150, 170)  # longer than r both ways
KINDS = {"columns": lambda rows, columns: (rows, 1), "rows": lambda rows, columns: (1, columns)}


@pytest.fixture(params=KINDS)
def kind(request) -> str:
    return request.param


def tiling_of(kind: str, shape: tuple[int, int] = SHAPE) -> Tiling:
    return Tiling(shape, *KINDS[kind](*shape))


def factors(seed: int, shape=SHAPE, tokens: int = 12) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return tuple(torch.randn(tokens, width, generator=generator) for width in shape)


def recorder_of(tiling: Tiling, **options) -> TileRecorder:
    return TileRecorder(DeltaStore({"w": tiling.shape}, {"w": random_tiles(tiling, 9, 0, "w")}), **options)


def estimated(tiling: Tiling, gradients, **options) -> torch.Tensor:
    """The norms [m] after a phase of one step."""
    recorder = recorder_of(tiling, estimation_steps=1, **options)
    recorder.begin_step(Phase.PROPOSE)
    for left, right in gradients:
        recorder.record_product("w", left, right)
    recorder.end_step()
    return recorder.norms_of("w")


def exact(kind: str, gradient: torch.Tensor) -> torch.Tensor:
    return gradient.norm(dim=0 if kind == "columns" else 1)


def test_squared_norms_are_estimated_without_bias_and_as_closely_as_r_says(kind) -> None:
    tiling, (left, right) = tiling_of(kind), factors(0)
    true, rounds = exact(kind, left.t() @ right).square(), 200
    found = torch.stack([estimated(tiling, [(left, right)], seed=seed).square() / true for seed in range(rounds)])
    spread = (2 / SKETCHED) ** 0.5
    assert (found.mean(0) - 1).abs().max() < 4.5 * spread / rounds**0.5
    assert 0.9 * spread < found.std(0).mean() <= spread


def test_lines_of_few_entries_are_exact(kind) -> None:
    left, right = factors(1, (SKETCHED, SKETCHED))
    found = estimated(tiling_of(kind, (SKETCHED, SKETCHED)), [(left, right)])
    torch.testing.assert_close(found, exact(kind, left.t() @ right), rtol=1e-5, atol=1e-5)


def test_micro_batches_and_steps_add_up_before_norms_are_taken(kind) -> None:
    tiling = tiling_of(kind)
    steps = [[factors(10 * step + part) for part in range(2)] for step in range(3)]
    recorder = recorder_of(tiling, estimation_steps=3)
    for step, parts in enumerate(steps):
        recorder.begin_step(Phase.ESTIMATE if step else Phase.PROPOSE)
        for left, right in parts:
            recorder.record_product("w", left, right)
        recorder.flat.mul_(0.5)  # as clipping does
        recorder.end_step()
    every = [torch.cat(both) for both in zip(*(pair for parts in steps for pair in parts), strict=True)]
    whole = estimated(tiling, [(every[0] * 0.5 / 3, every[1])])
    torch.testing.assert_close(recorder.norms_of("w"), whole, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("rows", [150, 40])
def test_an_embedding_is_sketched_as_its_one_hot_product(kind, rows) -> None:
    tiling = tiling_of(kind, (rows, 70))
    ids, (_, dy) = torch.randint(rows, (30,), generator=torch.Generator().manual_seed(0)), factors(2, (rows, 70), 30)
    one_hot = torch.nn.functional.one_hot(ids, rows).float()
    torch.testing.assert_close(estimated(tiling, [(ids, dy)]), estimated(tiling, [(one_hot, dy)]), rtol=1e-4, atol=1e-5)


class LargestTensor(TorchDispatchMode):
    entries = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        self.entries = max(self.entries, result.numel() if isinstance(result, torch.Tensor) else 0)
        return result


def test_a_phase_forms_no_full_gradient_and_a_part_of_the_input_is_not_taken_for_all_of_it(kind) -> None:
    tiling, (left, right) = tiling_of(kind), factors(3)
    recorder = recorder_of(tiling)
    recorder.begin_step(Phase.PROPOSE)
    with LargestTensor() as seen:
        recorder.record_product("w", left, right)
        recorder.end_step()
    assert 0 < seen.entries < SHAPE[0] * SHAPE[1] / 2
    with pytest.raises(ValueError, match="'w': got a part of its input in an estimation phase"):
        recorder.record_product("w", left[:, :9], right[:, :9])


def test_blocks_have_no_sketch() -> None:
    with pytest.raises(ValueError, match="expected single columns or rows"):
        sketched(Tiling((12, 18), 3, 2))


# --- drop and grow ----------------------------------------------------------------------------------------------------


def trained(kind: str, steps: int = 5) -> tuple[SparseFineTuning, torch.Tensor]:
    """Train to the first reallocation on gradients whose lines have norms far apart; returns the mean gradient too."""
    tiling, total = tiling_of(kind), torch.zeros(SHAPE)
    scale = 1.6 ** torch.randperm(tiling.count, generator=torch.Generator().manual_seed(7)).sub(
        tiling.count - 20
    ).clamp(min=0)
    schedule = ReallocationSchedule(total_steps=40, estimation_steps=steps, initial_replacement_fraction=0.5)
    store = DeltaStore({"w": SHAPE}, {"w": random_tiles(tiling, 9, 0, "w")})
    tuning = SparseFineTuning(store, MethodSettings(), schedule, Backends())
    for step in range(1, steps + 1):
        tuning.begin_step(step)
        for part in range(2):
            left, right = factors(10 * step + part)
            left, right = (left, right * scale[: SHAPE[1]]) if kind == "columns" else (left * scale, right)
            total += left.t() @ right / steps
            tuning.recorder.record_product("w", left, right)
        tuning.update(1e-3)
    return tuning, total


def test_growth_takes_the_lines_with_the_largest_norms_of_the_accumulated_gradient(kind) -> None:
    tuning, total = trained(kind)
    turnover = tuning.reallocate(5, NoCarrier())
    best = exact(kind, total).topk(9).indices.sort().values
    delta = tuning.store["w"]
    assert torch.equal(delta.tiles.numbers, best) and torch.equal(delta.indices.long(), delta.tiles.indices())
    assert turnover.replaced == turnover.dropped > 0
    grown = delta.cohort == 1
    assert int(grown.sum()) == turnover.replaced and not bool(delta.deltas[grown].any())
    state = tuning.optimizer.state_of("w")
    assert not any(bool(state[moment][grown].any()) for moment in ("exp_avg", "exp_avg_sq"))
    assert tuning.optimizer.gradients_seen == [5, 0]  # moments of what grows start from 0
    assert tuning.recorder.flat.numel() == tuning.store.active


def exchanged(kind: str, scores, keys, able=None, k: int = 2, if_better: bool = False) -> list[int]:
    """The numbers of the tiles after an exchange: of the 6 lines of a [6, 6] weight, 1, 3 and 4 are active."""
    tiling = tiling_of(kind, (6, 6))
    tiles = Tiles(tiling, torch.tensor([1, 3, 4]))
    indices, keys = tiles.indices(), torch.tensor(keys)
    able = keys > 0 if able is None else torch.tensor(able)
    of_entries = tiles.spread(torch.tensor(scores))
    torch.testing.assert_close(tiles.norms(of_entries), torch.tensor(scores) * 6**0.5)
    exchange = exchange_tiles(tiles, indices, of_entries, keys, able, k, if_better=if_better)
    after = exchange.merge(indices, exchange.grown)
    assert torch.equal(after, after.sort().values) and int((~exchange.kept).sum()) == exchange.grown.numel()
    return tiling.chosen_in(after).numbers.tolist()


@pytest.mark.parametrize(
    ("what", "options", "expected"),
    [
        ("the smallest leave, the best come", {}, [0, 3, 5]),
        ("one that leaves and is among the best stays", {"keys": [9.0, 8, 1, 1, 1, 7]}, [0, 1, 3]),
        ("lines without a gradient do not grow", {"keys": [9.0, 0, 0, 1, 0, 0]}, [0, 1, 3]),
        ("nothing has a gradient", {"keys": [0.0] * 6}, [1, 3, 4]),
        ("only one promises more than what it replaces", {"keys": [9.0, 3, 1, 1, 6, 4], "if_better": True}, [0, 3, 4]),
        ("none is to be replaced", {"k": 0}, [1, 3, 4]),
    ],
)
def test_an_exchange_keeps_the_number_of_tiles(kind, what, options, expected) -> None:
    given = {"scores": [0.5, 2.0, 0.25], "keys": [9.0, 1, 1, 1, 1, 8]} | options
    assert exchanged(kind, **given) == expected, what


def test_a_draw_prefers_larger_norms_and_is_drawn_again_each_round() -> None:
    norms, rule = torch.tensor([1.0, 1.0, 1.0, 8.0]), SelectionRule(temperature=1.0)
    first = [int(growth_keys(rule, "w", norms, number).argmax()) for number in range(300)]
    assert abs(first.count(3) / 300 - 8 / 11) < 4 * (8 / 11 * 3 / 11 / 300) ** 0.5
    uniform = SelectionRule(score="random")
    assert {int(growth_keys(uniform, "w", norms, number).argmax()) for number in range(40)} == {0, 1, 2, 3}
    assert torch.equal(growth_keys(SelectionRule(), "w", norms, 1), norms)


def test_a_few_tiles_move_in_the_nearest_number() -> None:
    schedule = ReallocationSchedule(total_steps=100, initial_replacement_fraction=0.2, chosen=True)
    assert [schedule.replaced_tiles(step, 3) for step in (5, 10, 25)] == [1, 1, 0]
    assert schedule.replaced(5, 3) == 0 and schedule.replaced_tiles(5, 100) == schedule.replaced(5, 100) == 19
