"""Sparse weight sync: what is sent, what is refused, and that the receiver ends with the trainer's bits."""

import copy
import random
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from servers import FusedServer
from torch import nn
from trainers import Trainer, load, same_weights
from transformers.core_model_loading import WeightRenaming

from scale_sft import sync
from scale_sft.errors import UserError
from scale_sft.model.fingerprints import combine_fingerprints, fingerprint
from scale_sft.model.group import OneProcess
from scale_sft.model.resident import WeightPart
from scale_sft.model.sparse_model import SparseModel
from scale_sft.sync import names, places
from scale_sft.sync.patches import Patches, SyncError


@pytest.fixture
def base(tiny_model):
    return tiny_model("llama", "bfloat16")


@pytest.fixture
def trainer(base):
    return Trainer(base)


def weights(model) -> dict:
    return {name: value.detach().clone() for name, value in model.named_parameters()}


def refused(receiver, patches, match: str) -> None:
    """`apply` raises SyncError and writes nothing."""
    before = weights(receiver)
    with pytest.raises(SyncError, match=match):
        sync.apply(receiver, patches)
    assert all(torch.equal(value, before[name]) for name, value in receiver.named_parameters())


# --- what is sent -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("architecture", "dtype", "method", "ends"),
    [
        ("llama", "bfloat16", "ag", "both"),
        ("gpt2", "float32", "ma", "none"),
        ("qwen2", "float16", "ag", "both"),
        ("opt", "bfloat16", "static", "none"),
    ],
)
def test_after_every_sync_the_receiver_has_the_trainers_bits(tiny_model, architecture, dtype, method, ends) -> None:
    folder, kind = tiny_model(architecture), getattr(torch, dtype)
    trainer, receiver = Trainer(folder, kind, method=method, train_embeddings=ends), load(folder, kind)
    for _ in range(8):
        trainer.step()
        assert sync.apply(receiver, sync.changed(trainer.sparse).to_bytes()) == sync.version(receiver) == trainer.steps
        assert same_weights(receiver, trainer.model)
    sync.verify(receiver)


def test_deltas_too_small_for_the_dtype_cost_nothing(trainer) -> None:
    trainer.set_deltas(1e-12)
    assert sync.changed(trainer.sparse).entries == 0
    trainer.set_deltas(1.0)
    everything = sync.changed(trainer.sparse)
    assert everything.entries == trainer.sparse.tuning.store.active
    assert everything.nbytes == 6 * everything.entries  # int32 and bf16
    assert sync.changed(trainer.sparse).entries == 0


def test_dropped_entries_return_to_their_base_values(base) -> None:
    trainer, receiver = Trainer(base, update_interval_steps=1, initial_replacement_fraction=0.9), load(base)
    before = weights(receiver)
    trainer.step(3)
    sync.apply(receiver, sync.changed(trainer.sparse))
    old = {delta.name: set(delta.indices.tolist()) for delta in trainer.sparse.tuning.store}
    trainer.step()
    patches = sync.changed(trainer.sparse)
    dropped = 0
    for patch in patches:
        gone = old[patch.name] - set(trainer.sparse.tuning.store[patch.name].indices.tolist())
        returned = torch.tensor([index in gone for index in patch.indices.tolist()])
        dropped += int(returned.sum())
        assert torch.equal(patch.values[returned], before[patch.name].view(-1)[patch.indices[returned].long()])
    assert dropped > 10
    sync.apply(receiver, patches)
    assert same_weights(receiver, trainer.model)


def test_digests_are_those_of_the_whole_weights(trainer) -> None:
    trainer.step(3)
    patches = sync.changed(trainer.sparse)
    whole = {name: fingerprint(WeightPart.whole(trainer.model.get_parameter(name))) for name in patches.shapes}
    assert patches.after == combine_fingerprints(whole, patches.shapes)
    assert patches.before == trainer.sparse.base_hash


def test_a_receiver_that_lags_is_served_from_the_version_it_has(base, trainer) -> None:
    receiver = load(base)
    trainer.step()
    seen = sync.changed(trainer.sparse)
    sync.apply(receiver, seen)
    for _ in range(4):
        trainer.step()
        sync.changed(trainer.sparse)  # for somebody else
    assert sync.apply(receiver, sync.changed(trainer.sparse, since=seen.snapshot)) == 6
    assert same_weights(receiver, trainer.model)
    with pytest.raises(UserError, match="snapshot of another model"):
        sync.changed(Trainer(base).sparse, since=seen.snapshot)


def test_names_are_those_of_the_checkpoints_files_and_found_once(base, tmp_path, monkeypatch) -> None:
    trainer, receiver = Trainer(base), load(base)
    for model in (trainer.model, receiver):
        model._weight_conversions = [WeightRenaming(r"language_model\.layers", r"model.layers")]
    trainer.step()
    patches = sync.changed(trainer.sparse)
    receiver.save_pretrained(tmp_path)
    assert {patch.name for patch in patches} <= set(load_file(tmp_path / "model.safetensors"))
    assert any(patch.name.startswith("language_model.layers.0") for patch in patches)
    sync.apply(receiver, patches)
    monkeypatch.setattr(places, "name_on_disk", None)
    trainer.step()
    sync.apply(receiver, sync.changed(trainer.sparse))
    assert same_weights(receiver, trainer.model)


def test_a_weight_that_files_hold_in_pieces_is_refused(trainer, monkeypatch) -> None:
    monkeypatch.setattr(names, "name_on_disk", lambda model, name, shape: None if "q_proj" in name else name)
    with pytest.raises(UserError, match=r"q_proj.*fused or in pieces.*target_modules"):
        sync.changed(trainer.sparse)


class Half(OneProcess):
    """One of two processes that each hold half of every weight, and find the other's half in `other`."""

    def __init__(self, rank: int, meeting: list):
        super().__init__(torch.device("cpu"), 2)
        object.__setattr__(self, "rank", rank)
        object.__setattr__(self, "meeting", meeting)

    def part_of(self, weight):
        half = weight.numel() // 2 + 3
        start, stop = (0, half) if self.rank == 0 else (half, weight.numel())
        return WeightPart(lambda: weight.data.view(-1)[start:stop], start, stop)

    def fingerprints(self, parts):
        return self.meeting["prints"]

    def sum_(self, flat, purpose):
        self.meeting["sums"].append(flat.clone())
        flat.copy_(sum(self.meeting["sums"]))


def test_processes_with_shards_compose_the_patches_of_one_with_whole_weights(base, trainer) -> None:
    trainer.set_deltas(0.5)
    expected = sync.changed(trainer.sparse)
    meeting = {"prints": trainer.sparse.prints, "sums": []}
    halves = [SparseModel(load(base), trainer.sparse.settings, Half(rank, meeting)) for rank in (0, 1)]
    for half in halves:
        half.tuning.store.flat.fill_(0.5)
        half.carrier.write()
    sync.changed(halves[0])  # alone it has zeros where the other's base values belong
    found = sync.changed(halves[1])
    assert found.after == expected.after and found.entries == expected.entries
    for mine, theirs in zip(found, expected, strict=True):
        assert mine.name == theirs.name
        assert torch.equal(mine.indices, theirs.indices) and torch.equal(mine.values, theirs.values)


# --- what is refused --------------------------------------------------------------------------------------------------


def test_lost_repeated_and_reordered_patches_are_noticed_and_a_full_set_repairs(base, trainer) -> None:
    receiver = load(base)
    sent = []
    for _ in range(5):
        trainer.step()
        sent.append(sync.changed(trainer.sparse))
    sync.apply(receiver, sent[0])
    refused(receiver, sent[0], "version 1 again, the model has version 1")
    refused(receiver, sent[2], r"version 3, which follows on version 2 .* lost or reordered.*sync.full")
    sync.apply(receiver, sent[1])
    refused(receiver, sent[0], "version 1 late, the model has version 2")
    refused(load(base), sent[3], "the model has the base only.*sync.full")
    everything = sync.full(trainer.sparse)
    assert everything.full and everything.version == 6
    sync.apply(receiver, everything)
    assert same_weights(receiver, trainer.model)
    refused(receiver, everything, "version 6 again")
    trainer.step()
    sync.apply(receiver, sync.changed(trainer.sparse))
    assert same_weights(receiver, trainer.model)
    sync.verify(receiver)


def test_a_restarted_receiver_and_a_restarted_trainer_catch_up(base, trainer) -> None:
    trainer.step(3)
    receiver = load(base)
    sync.apply(receiver, sync.changed(trainer.sparse))
    again = Trainer(base, seed=5)
    again.step(2)
    first = sync.changed(again.sparse)
    assert first.full  # what a new trainer sends first brings any receiver to it
    sync.apply(receiver, first)
    assert same_weights(receiver, again.model)
    trainer.step()
    refused(receiver, sync.changed(trainer.sparse), "follows on version 1; the model has version 1 of")
    fresh = load(base)
    sync.apply(fresh, sync.full(trainer.sparse))
    assert same_weights(fresh, trainer.model)


def test_a_patch_for_another_base_or_dtype_is_refused(tiny_model, base, trainer) -> None:
    trainer.step()
    patches = sync.changed(trainer.sparse)
    other = load(base)
    with torch.no_grad():
        other.model.layers[1].mlp.up_proj.weight[0, 0] += 1
    refused(other, patches, "not those that training started from")
    refused(load(base, torch.float32), patches, "load the receiving model in the dtype")
    refused(load(tiny_model("gpt2")), patches, "the receiving model has none")


def test_weights_that_something_else_wrote_are_noticed(base, trainer) -> None:
    receiver = load(base)
    trainer.set_deltas(0.25)
    patches = sync.changed(trainer.sparse)
    sync.apply(receiver, patches)
    patch = patches.weights[0]
    with torch.no_grad():
        receiver.get_parameter(patch.name).view(-1)[int(patch.indices[0])] += 1
    with pytest.raises(SyncError, match=f"verify: '{patch.name}'"):
        sync.verify(receiver)
    trainer.set_deltas(0.5)
    refused(receiver, sync.changed(trainer.sparse), "something else has written")
    sync.apply(receiver, sync.full(trainer.sparse))
    assert same_weights(receiver, trainer.model)


def test_damaged_bytes_are_refused_or_change_nothing(base, trainer) -> None:
    trainer.step(2)
    data = sync.changed(trainer.sparse).to_bytes()
    kind = random.Random(0)
    for end in (0, 7, 8, 9, 200, len(data) // 2, len(data) - 1):
        with pytest.raises(SyncError, match="damaged bytes"):
            Patches.from_bytes(data[:end])
    clean, caught = load(base), 0
    sync.apply(clean, data)
    receiver = load(base)
    for _ in range(150):
        damaged = bytearray(data)
        for _ in range(kind.randint(1, 3)):
            damaged[kind.randrange(len(data))] ^= 1 << kind.randrange(8)
        try:
            sync.apply(receiver, bytes(damaged))
        except SyncError:
            caught += 1
            continue
        assert same_weights(receiver, clean)  # a bit that says nothing, such as the stream's name
        receiver = load(base)
    assert caught > 130
    assert same_weights(receiver, load(base))


def test_models_without_deltas_to_send_are_refused(base, trainer) -> None:
    with pytest.raises(UserError, match="got LlamaForCausalLM, expected a model with sparse deltas"):
        sync.changed(load(base))
    with trainer.sparse.base(), pytest.raises(UserError, match="inside sparse.base"):
        sync.changed(trainer.sparse)
    with torch.no_grad():
        for weight in trainer.model.parameters():
            weight.data.zero_()
    with pytest.raises(UserError, match="sync: the weights of the model were replaced"):
        sync.changed(trainer.sparse)


# --- where the entries go ---------------------------------------------------------------------------------------------


def test_fused_and_cut_weights_get_what_their_own_loader_would_have_given_them(base, trainer) -> None:
    original = load(base)
    servers = [FusedServer(original), FusedServer(original, 0, 2), FusedServer(original, 1, 2)]
    for _ in range(4):
        trainer.step()
        data = sync.changed(trainer.sparse).to_bytes()
        for server in servers:
            sync.apply(server, data)
            expected = FusedServer(trainer.model, server.rank, server.size)
            assert all(torch.equal(server.held[key], expected.held[key]) for key in server.held)
    sync.verify(servers[0])  # one process holds all: its digest is proven too
    trainer.step()
    sync.changed(trainer.sparse)
    trainer.step()
    for server in servers:
        refused(server, sync.changed(trainer.sparse, since=sync.full(trainer.sparse).snapshot), "sync.full")
        sync.apply(server, sync.full(trainer.sparse))
        expected = FusedServer(trainer.model, server.rank, server.size)
        assert all(torch.equal(server.held[key], expected.held[key]) for key in server.held)


def test_a_loader_that_computes_is_refused(base, trainer) -> None:
    class Quantised(FusedServer):
        def load_weights(self, weights) -> None:
            super().load_weights((name, weight * 2) for name, weight in weights)

    server = Quantised(load(base))
    trainer.step()
    refused(server, sync.changed(trainer.sparse), "computes with")


def test_a_tied_weight_is_written_once_under_either_name() -> None:
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner, self.head = nn.Linear(4, 3, bias=False), nn.Linear(4, 3, bias=False)
            self.head.weight = self.inner.weight

    for name in ("inner.weight", "head.weight"):
        model = Tied()
        prints = {name: fingerprint(WeightPart.whole(model.inner.weight))}
        patch = sync.WeightPatch(name, (3, 4), torch.tensor([5], dtype=torch.int32), torch.tensor([2.5]))
        patches = Patches((patch,), {name: (3, 4)}, "0" * 16, 1, 0, combine_fingerprints(prints, {name: (3, 4)}), "")
        changed = copy.deepcopy(model)
        changed.inner.weight.data.view(-1)[5] = 2.5
        after = {name: fingerprint(WeightPart.whole(changed.inner.weight))}
        sync.apply(model, replace(patches, after=combine_fingerprints(after, {name: (3, 4)})))
        assert float(model.head.weight.view(-1)[5].detach()) == 2.5


def test_the_code_on_the_page_of_docs_runs_as_printed(capsys) -> None:
    page = (Path(__file__).parents[3] / "docs" / "sync.md").read_text(encoding="utf-8")
    names: dict = {}
    for code in re.findall(r"```python\n(.*?)```", page, re.S):
        exec(compile(code, "docs/sync.md", "exec"), names)
    assert "<Patches: version 4 since 3, " in capsys.readouterr().out


@pytest.mark.parametrize("given", ["patches.safetensors", None, Path("patches")])
def test_what_is_no_patches_is_named(base, given) -> None:
    with pytest.raises(UserError, match="patches: got .* expected what sync.changed or sync.full returned"):
        sync.apply(load(base), given)
