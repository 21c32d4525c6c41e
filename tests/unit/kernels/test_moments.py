"""Moments in fewer bytes: what is kept is small, what is computed with it is the fp32 update, and nothing drifts apart."""

import pytest
import torch

from scale_sft.kernels.moments import (
    BLOCK,
    BlockwiseMoment,
    bytes_of_moments,
    int8_moments,
    moments_of,
    resolve_moments,
)
from scale_sft.spiel import indices as entries
from scale_sft.spiel.deltas import DeltaStore
from scale_sft.spiel.drop_grow import exchange_by_gradient
from scale_sft.spiel.indices import Entries
from scale_sft.spiel.moments import float32_moments, mixed_moments
from scale_sft.spiel.optimizers import AdamW, adamw_update
from scale_sft.spiel.recorder import Candidates

SHAPES = {"a": (40, 50), "b": (6, 4), "c": (20, 33)}
ACTIVE = {"a": 700, "b": 24, "c": 257}
WAYS = {"float32": float32_moments, "mixed": mixed_moments, "int8": int8_moments}


def trained(way, steps: int = 30) -> AdamW:
    own = AdamW(DeltaStore(SHAPES, ACTIVE), moments=WAYS[way], weight_decay=0.1)
    generator = torch.Generator().manual_seed(0)
    scale = 10 ** (torch.rand(own.store.active, generator=generator) * 2 - 3)
    for _ in range(steps):
        own.step(torch.randn(own.store.active, generator=generator) * scale, 0.01)
    return own


@pytest.mark.parametrize("way", WAYS)
def test_moments_cost_what_is_said_of_them(way):
    own = trained(way, 1)
    kept = sum(tensor.nbytes for name in own.store.names for tensor in own.state_of(name).values())
    blocks = sum(-(-count // BLOCK) for count in ACTIVE.values())
    expected = 2 * own.store.active + 8 * blocks if way == "int8" else bytes_of_moments(way) * own.store.active
    assert kept == expected and moments_of(way) is WAYS[way]


def test_auto_keeps_every_digit_that_gradients_have():
    assert resolve_moments("auto", torch.float32) == "float32"
    assert resolve_moments("auto", torch.bfloat16) == "mixed"
    assert resolve_moments("int8", torch.float32) == "int8"


def test_a_mixed_step_is_the_fp32_step_whose_first_moment_is_rounded_once():
    own = trained("mixed")
    name, delta = "a", own.store["a"]
    state = {key: tensor.clone() for key, tensor in own.state_of(name).items()}
    assert (state["exp_avg"].dtype, state["exp_avg_sq"].dtype) == (torch.bfloat16, torch.float32)
    deltas, exp_avg, exp_avg_sq = delta.deltas.clone(), state["exp_avg"].float(), state["exp_avg_sq"].clone()
    gradient = torch.randn(own.store.active)
    own.step(gradient, 0.01)
    adamw_update(
        deltas, gradient[: delta.active], exp_avg, exp_avg_sq, delta.cohort, [31],
        learning_rate=0.01, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.1,
    )  # fmt: skip
    assert torch.equal(delta.deltas, deltas)
    assert torch.equal(own.state_of(name)["exp_avg"], exp_avg.bfloat16())
    assert torch.equal(own.state_of(name)["exp_avg_sq"], exp_avg_sq)


@pytest.mark.parametrize(("way", "tolerance"), [("mixed", 0.01), ("int8", 0.1)])
def test_deltas_stay_close_to_those_of_fp32_moments(way, tolerance):
    exact, own = trained("float32", 200).store.flat, trained(way, 200).store.flat
    assert 0 < float((own - exact).norm() / exact.norm()) < tolerance


def test_a_second_moment_that_is_not_zero_does_not_become_zero():
    """The update divides by its root."""
    moment = BlockwiseMoment(DeltaStore(SHAPES, ACTIVE), second=True)
    values = torch.zeros(700)
    values[0], values[1] = 1.0, 1e-25
    moment.store(slice(0, 700), values)
    found = moment.load(slice(0, 700))
    assert found[1] > 0 and not found[2:].any()


def test_blocks_of_8_bits_keep_values_within_their_step_and_zero_exactly():
    store = DeltaStore(SHAPES, ACTIVE)
    for second in (False, True):
        moment = BlockwiseMoment(store, second=second)
        assert all(not moment.load(store.entries_of(name)).any() for name in SHAPES)
        values = torch.rand(ACTIVE["a"]) ** 4 if second else torch.randn(ACTIVE["a"])
        values[5] = 0.0
        moment.store(slice(0, 700), values)
        found = moment.load(slice(0, 700))
        assert found[5] == 0 and float((found - values).abs().max()) < 0.02 * float(values.abs().max())
        assert torch.equal(moment.load(slice(256, 512)), found[256:512])
        assert not moment.load(store.entries_of("c")).any()


@pytest.mark.parametrize("way", WAYS)
def test_pieces_change_nothing(way, monkeypatch):
    whole = trained(way)
    monkeypatch.setattr(entries, "PIECE_ENTRIES", BLOCK)
    cut = trained(way)
    assert torch.equal(whole.store.flat, cut.store.flat)
    for name in SHAPES:
        for key, tensor in whole.state_of(name).items():
            assert torch.equal(tensor, cut.state_of(name)[key]), key


@pytest.mark.parametrize("way", WAYS)
def test_moments_follow_their_entries_over_drop_and_grow(way):
    own = trained(way)
    delta = own.store["a"]
    old_indices, old = delta.indices.clone(), own.exp_avg.load(slice(0, 700)).clone()
    inactive = torch.tensor(sorted(set(range(2000)) - set(old_indices.tolist())))[:60]
    mean = torch.linspace(1, 2, 60)
    candidates = Candidates(Entries(inactive, (40, 50)), mean, mean**2)
    exchange = exchange_by_gradient(old_indices, delta.deltas.abs(), inactive, mean, 50)
    own.begin_cohort()
    own.follow(own.store.places.part_of(slice(0, 1)), exchange, (candidates.mean, candidates.mean_square))
    new_indices, new = exchange.merge(old_indices, exchange.grown), own.exp_avg.load(slice(0, 700))
    stayed_new, stayed_old = torch.isin(new_indices, old_indices), torch.isin(old_indices, new_indices)
    step = float(new.abs().max()) * (0.02 if way == "int8" else 0)
    assert float((new[stayed_new] - old[stayed_old]).abs().max()) <= step
    grown = new[~stayed_new]
    assert grown.numel() == 50
    seeds = mean[exchange.grown_candidates] * (1 - 0.9**5)
    assert float((grown - seeds).abs().max()) <= max(step, 0.004 * float(seeds.max()))
