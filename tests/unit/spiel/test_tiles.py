"""Whole columns, rows and blocks: their entries, their gradients, and the choice by the norm of their scores."""

import math
from contextlib import nullcontext

import pytest
import torch

from scale_sft.spiel.deltas import DeltaStore
from scale_sft.spiel.schedules import Phase
from scale_sft.spiel.seeding import random_tiles
from scale_sft.spiel.selection.parts import WholeParts
from scale_sft.spiel.selection.rule import SelectionRule
from scale_sft.spiel.selection.survey import Survey
from scale_sft.spiel.tile_recorder import TileRecorder
from scale_sft.spiel.tiles import Tiles, Tiling
from tests.thread_ranks import on_threads
from tests.unit.spiel.test_selection import PartsOfRanks

SHAPE = (12, 18)
TILINGS = {"columns": (12, 1), "rows": (1, 18), "blocks": (3, 2), "pairs of columns": (12, 2), "one": (12, 18)}


@pytest.fixture(params=TILINGS.values(), ids=TILINGS)
def tiles(request) -> Tiles:
    tiling = Tiling(SHAPE, *request.param)
    return random_tiles(tiling, (tiling.count + 1) // 2, 0, "w")


def test_entries_are_sorted_and_those_of_whole_tiles_and_tell_the_tiles(tiles) -> None:
    tiling, mask = tiles.tiling, torch.zeros(SHAPE, dtype=torch.bool)
    for number in tiles.numbers.tolist():
        down, across = divmod(number, tiling.across)
        mask[down * tiling.height :, across * tiling.width :][: tiling.height, : tiling.width] = True
    indices = tiles.indices()
    assert torch.equal(indices, mask.view(-1).nonzero().squeeze(1))
    assert torch.equal(tiling.chosen_in(indices.int()).numbers, tiles.numbers)
    if tiling.size < tiling.count * tiling.size:
        with pytest.raises(ValueError, match="are not whole tiles"):
            tiling.chosen_in(indices[1:])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_recorder_adds_up_the_entries_of_the_whole_gradient_from_what_it_needs_of_its_factors(tiles, dtype) -> None:
    store = DeltaStore({"w": SHAPE}, {"w": tiles})
    recorder = TileRecorder(store)
    recorder.begin_step(Phase.OFF, watch=True)
    total = torch.zeros(SHAPE)
    for seed in (0, 1):
        generator = torch.Generator().manual_seed(seed)
        left, right = (torch.randint(-3, 4, (8, width), generator=generator).to(dtype) for width in SHAPE)
        total += (left.t() @ right).float()
        kept = recorder.needed("w", right, left=False) if seed else right
        recorder.record_product("w", recorder.needed("w", left, left=True) if seed else left, kept)
    assert torch.equal(recorder.gradients, total.view(-1)[store["w"].indices.long()])
    assert recorder.received == {"w"}


def test_columns_need_few_columns_of_the_right_factor_and_rows_of_the_left() -> None:
    left, right = torch.randn(5, 12), torch.randn(5, 18)
    columns, rows = (Tiles(Tiling(SHAPE, *TILINGS[kind]), torch.tensor([2, 7])) for kind in ("columns", "rows"))
    assert torch.equal(columns.needed(right, left=False), right[:, [2, 7]]) and columns.needed(left, left=True) is left
    assert torch.equal(rows.needed(left, left=True), left[:, [2, 7]]) and rows.needed(right, left=False) is right


def test_a_weight_whose_tiles_get_no_gradient_counts_as_reached_if_its_layer_is(tiles) -> None:
    left, right = torch.ones(4, SHAPE[0]), torch.zeros(4, SHAPE[1])
    right[:, : SHAPE[1] // 2] = 1
    reached = []
    for dy in (left, torch.zeros_like(left)):
        recorder = TileRecorder(DeltaStore({"w": SHAPE}, {"w": tiles}))
        recorder.begin_step(Phase.OFF, watch=True)
        recorder.record_product("w", dy, recorder.needed("w", right, left=False))
        reached.append("w" in recorder.received)
    assert reached == [True, False]


def test_tiles_that_do_not_cover_a_weight_are_refused() -> None:
    with pytest.raises(ValueError, match="12 x 18 entries does not divide into tiles of 5 x 5"):
        Tiling(SHAPE, 5, 5)


# --- the choice -----------------------------------------------------------------------------------------------------


def surveyed(rule: SelectionRule, tiling: Tiling, parts, rank: int = 0, world: int = 1) -> torch.Tensor:
    survey = Survey({"w": SHAPE}, rule, parts, lambda _: nullcontext(torch.ones(SHAPE)), tilings={"w": tiling})
    for batch in (0, 1):
        generator = torch.Generator().manual_seed(batch)
        left, right = (torch.randint(-3, 4, (6, width), generator=generator).float() for width in SHAPE)
        survey.record("w", left[rank::world], right[rank::world])
        survey.end_batch()
    return survey.choose({"w": 3 * tiling.size})["w"]


@pytest.mark.parametrize("kind", ["columns", "rows", "blocks"])
def test_the_tiles_with_the_largest_norms_of_scores_are_chosen(kind) -> None:
    tiling, total = Tiling(SHAPE, *TILINGS[kind]), torch.zeros(SHAPE)
    for batch in (0, 1):
        generator = torch.Generator().manual_seed(batch)
        left, right = (torch.randint(-3, 4, (6, width), generator=generator).float() for width in SHAPE)
        total += left.t() @ right
    blocks = total.unfold(0, tiling.height, tiling.height).unfold(1, tiling.width, tiling.width)
    best = blocks.square().sum((2, 3)).view(-1).topk(3).indices.sort().values
    assert torch.equal(surveyed(SelectionRule(), tiling, WholeParts()), Tiles(tiling, best).indices())


@pytest.mark.parametrize("kind", ["columns", "rows", "blocks"])
@pytest.mark.parametrize("score", ["balanced", "random"])
def test_any_number_of_ranks_draws_the_same_tiles(kind, score) -> None:
    tiling, rule = Tiling(SHAPE, *TILINGS[kind]), SelectionRule(score=score, temperature=1.0, seed=4)
    alone = surveyed(rule, tiling, WholeParts())
    tiling.chosen_in(alone)
    for found in on_threads(3, lambda ranks: surveyed(rule, tiling, PartsOfRanks(ranks), ranks.rank, 3)):
        assert torch.equal(found, alone)


def test_a_draw_prefers_tiles_of_larger_norms() -> None:
    tiling, count = Tiling((1, 4), 1, 1), 0
    scores = torch.tensor([1.0, 1.0, 1.0, 8.0])
    from scale_sft.spiel.selection.tile_keys import tile_keys

    for seed in range(300):
        keys = tile_keys(SelectionRule(temperature=1.0, seed=seed), "w", tiling, scores, 0, lambda _: None)
        count += int(keys.argmax()) == 3
    assert abs(count / 300 - 8 / 11) < 4 * math.sqrt(8 / 11 * 3 / 11 / 300)


def test_a_weight_that_no_token_met_gets_tiles_of_the_seed() -> None:
    """As an expert may: the first columns would be no better than any."""
    tiling = Tiling((6, 40), 6, 1)
    survey = Survey({"w": (6, 40)}, SelectionRule(), WholeParts(), None, tilings={"w": tiling})
    survey.record("w", torch.zeros(0, 6), torch.zeros(0, 40))
    survey.end_batch()
    expected = random_tiles(tiling, 5, 0, "w").indices()
    assert torch.equal(survey.choose({"w": 30})["w"], expected)
