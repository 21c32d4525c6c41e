"""Packed rows: nothing leaks, nothing changes."""

from __future__ import annotations

import itertools

import pytest
import torch

from scale_sft.config.options import ModelConfig
from scale_sft.data.batches import batches_of_rank
from scale_sft.data.examples import Examples
from scale_sft.data.micro_batches import collate
from scale_sft.data.packing import collate_packed, pack, packed_micro_batches, refuse_leaks
from scale_sft.errors import UserError
from scale_sft.model.loading import load_base, load_model_config
from scale_sft.model.loss import IGNORED, token_loss_sum, token_losses

CPU = torch.device("cpu")
PAD = 258


@pytest.fixture(scope="module")
def examples() -> Examples:
    """Twelve examples of 3 to 20 tokens, of which the last third counts (of one, everything)."""
    generator = torch.Generator().manual_seed(0)
    lengths = [3, 20, 7, 12, 5, 9, 16, 4, 11, 6, 8, 13]
    ids = [torch.randint(0, 256, (length,), generator=generator).tolist() for length in lengths]
    labels = [[IGNORED] * (2 * len(row) // 3) + row[2 * len(row) // 3 :] for row in ids]
    labels[4] = ids[4]
    return Examples.from_lists(ids, labels, "made up")


def load(folder, attention: str = "sdpa", checkpointing: bool = False):
    config = ModelConfig(base=str(folder), attention=attention, gradient_checkpointing=checkpointing)
    return load_base(config, load_model_config(config), CPU).requires_grad_(True)


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "qwen2"])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("checkpointing", [False, True], ids=["plain", "checkpointing"])
def test_packed_examples_have_their_own_losses_and_gradient(
    tiny_model, architecture, attention, checkpointing, examples
):
    model = load(tiny_model(architecture), attention, checkpointing)
    members = [0, 4, 1, 7, 2]
    alone = [token_losses(model, collate(examples, [n], PAD, CPU)) for n in members]
    torch.cat(alone).sum().backward()
    gradient = {name: weight.grad.clone() for name, weight in model.named_parameters() if weight.grad is not None}
    model.zero_grad()
    packed = token_losses(model, collate_packed(examples, [members[:3], members[3:]], PAD, CPU))
    torch.testing.assert_close(packed, torch.cat(alone), rtol=1e-5, atol=1e-5)
    packed.sum().backward()
    for name, weight in model.named_parameters():
        if name in gradient:
            torch.testing.assert_close(weight.grad, gradient[name], rtol=1e-4, atol=2e-5, msg=name)


def test_rows_laid_end_to_end_have_the_same_losses_and_no_padding(tiny_model, examples):
    model = load(tiny_model("llama"))
    rows = [[0, 4, 1], [7, 2]]
    flat = collate_packed(examples, rows, PAD, CPU, flat=True)
    assert flat["input_ids"].shape == (1, examples.all_tokens([0, 4, 1, 7, 2]))
    torch.testing.assert_close(
        token_losses(model, flat), token_losses(model, collate_packed(examples, rows, PAD, CPU)), rtol=1e-5, atol=1e-5
    )


def test_position_ids_restart_and_no_token_predicts_the_next_example(examples):
    batch = collate_packed(examples, [[4, 0], [7]], PAD, CPU)
    assert batch["position_ids"].tolist() == [[0, 1, 2, 3, 4, 0, 1, 2], [0, 1, 2, 3, 0, 1, 2, 3]]
    assert batch["labels"][0, 0] == batch["labels"][0, 5] == IGNORED
    assert (batch["labels"] != IGNORED).sum() == examples.target_tokens([4, 0, 7])


def test_rows_hold_every_example_once_and_never_too_much(examples):
    for size in (20, 21, 40, 200):
        rows = pack(examples, range(len(examples)), size)
        assert sorted(itertools.chain(*rows)) == list(range(len(examples)))
        assert max(examples.all_tokens(row) for row in rows) <= size
    assert len(pack(examples, range(len(examples)), 200)) == 1
    assert len(pack(examples, range(len(examples)), 38)) <= 4  # 114 tokens


@pytest.mark.parametrize("ranks", [1, 2, 3])
@pytest.mark.parametrize("first", [None, 5])
def test_ranks_share_the_rows_evenly_and_completely(examples, ranks, first):
    arguments = {"row_tokens": 24, "world_size": ranks, "micro_batch_size": 1, "first": first}
    shares = [packed_micro_batches(examples, range(12), rank=rank, **arguments) for rank in range(ranks)]
    assert len({len(share) for share in shares}) == 1
    members = [n for share in shares for rows in share for row in rows for n in row]
    assert sorted(members) == list(range(12))
    if first:
        proposing = [n for share in shares for row in share[0] for n in row]
        assert sorted(proposing) == list(range(first))


@pytest.mark.parametrize("packed", [False, True])
def test_the_cut_into_micro_batches_does_not_change_the_loss(tiny_model, examples, packed):
    model = load(tiny_model("llama"))
    totals = []
    for ranks, size in ((1, None), (1, 1), (2, 2), (3, 4)):
        shared = {
            "world_size": ranks, "micro_batch_size": size, "first": None, "keep_order": False, "flat": False,
            "row_tokens": 24 if packed else None, "pad_id": PAD, "device": CPU,
        }  # fmt: skip
        batches = [
            batch for rank in range(ranks) for batch in batches_of_rank(examples, range(12), rank=rank, **shared)
        ]
        totals.append(sum(token_loss_sum(model, batch) for batch in batches).item())
    assert totals == pytest.approx([totals[0]] * 4, rel=1e-5)


def test_sequences_of_similar_length_meet_unless_their_order_is_wanted(examples):
    shared = {
        "rank": 0, "world_size": 1, "micro_batch_size": 2, "row_tokens": None, "flat": False, "pad_id": PAD,
        "device": CPU,
    }  # fmt: skip
    cells = lambda **how: sum(
        batch["input_ids"].numel() for batch in batches_of_rank(examples, range(12), first=None, **how, **shared)
    )
    assert examples.all_tokens(range(12)) <= cells(keep_order=False) < cells(keep_order=True)


def test_a_model_that_lets_packed_examples_see_each_other_is_refused(tiny_model):
    refuse_leaks(load(tiny_model("llama")), 259, CPU, flat=False)
    with pytest.raises(UserError, match="see each other.*set packing false"):  # its mask ignores position ids
        refuse_leaks(load(tiny_model("opt")), 259, CPU, flat=False)


def test_training_packed_and_unpacked_gives_the_same_deltas(train_run, tmp_path):
    from scale_sft.adapters.format import Adapter

    runs = {}
    for packing in (False, True):
        folder = train_run(
            packing=packing, micro_batch_size=2, proposal_batch_size=2, output_dir=str(tmp_path / str(packing))
        )
        runs[packing] = Adapter.load(folder / "adapter")
    for name, indices in runs[False].indices.items():
        assert torch.equal(indices, runs[True].indices[name])
        torch.testing.assert_close(runs[False].deltas[name], runs[True].deltas[name], rtol=1e-3, atol=1e-5)
