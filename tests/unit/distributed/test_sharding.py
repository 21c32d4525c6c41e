"""Replicated and sharded bases answer to the same calls; one process needs no process group."""

import inspect
from types import SimpleNamespace

import pytest
import torch

from scale_sft.distributed.agreement import Ranks
from scale_sft.distributed.candidates import select_candidates
from scale_sft.distributed.sharding import Replicated, ZeroShards, read_ds_config
from scale_sft.errors import UserError

CPU = torch.device("cpu")


@pytest.fixture
def alone(monkeypatch) -> Ranks:
    """One rank, on whose machine every collective fails."""
    for name in ("all_reduce", "all_gather", "all_gather_object", "broadcast", "reduce_scatter_tensor"):
        monkeypatch.setattr(torch.distributed, name, lambda *_, **__: pytest.fail("a collective of one rank"))
    return Ranks(rank=0, size=1, device=CPU)


def signatures(kind) -> dict[str, list[str]]:
    methods = inspect.getmembers(kind, inspect.isfunction)
    return {name: list(inspect.signature(f).parameters) for name, f in methods if not name.startswith("_")}


def test_both_placements_have_the_same_methods():
    assert signatures(Replicated) == signatures(ZeroShards)
    replicated, sharded = Replicated(CPU), ZeroShards(SimpleNamespace(), rank=0, device=CPU)
    assert (replicated.sharded, sharded.sharded) == (False, True)
    assert (replicated.load_device, sharded.load_device) == (CPU, None)


def test_a_replicated_weight_is_whole_and_written_in_place():
    weight = torch.nn.Parameter(torch.zeros(3, 2), requires_grad=False)
    sharding = Replicated(CPU)
    part = sharding.part_of(weight)
    part.entries()[4] = 7.0
    assert (part.start, part.stop, weight[2, 0].item()) == (0, 6, 7.0)
    with sharding.materialize(weight) as whole:
        assert whole.data_ptr() == weight.data_ptr()


@pytest.mark.parametrize("rank", [0, 1, 2])
def test_a_shard_ends_where_the_weight_does(rank):
    """7 entries over 3 ranks: 3, 3 and 1; the last shard is padded."""
    weight = SimpleNamespace(ds_numel=7, ds_tensor=SimpleNamespace(ds_numel=3, data=torch.arange(3.0) + 3 * rank))
    part = ZeroShards(SimpleNamespace(), rank=rank, device=CPU).part_of(weight)
    assert part.entries().tolist() == list(range(part.start, part.stop)) == [[0, 1, 2], [3, 4, 5], [6]][rank]


def test_fingerprints_of_shards_add_up_modulo_two_to_the_64():
    other = {"w": (1, (1 << 64) - 1)}
    found = ZeroShards(SimpleNamespace(), rank=0, device=CPU).whole({"w": (2, 3)}, lambda own: [own, other])
    assert found == {"w": (3, 2)}


def test_one_rank_agrees_with_itself_without_a_collective(alone):
    flat = torch.arange(4.0)
    alone.sum_(flat)
    assert flat.tolist() == [0, 1, 2, 3] and alone.sum_floats(0.5, 2) == [0.5, 2]
    assert alone.gather_objects("x") == ["x"] and alone.on_main(lambda: 5) == 5
    alone.check_identical(lambda: pytest.fail("digests were taken"), "anything")
    assert alone.share({"t": ((4,), flat.dtype)}, {"t": flat})["t"] is flat
    assert select_candidates(alone, torch.tensor([1.0, -4.0, 3.0]), 2).tolist() == [1, 2]
    assert not alone.traffic_bytes


def test_what_the_main_rank_could_not_do_ends_the_others_with_its_reason(monkeypatch):
    ranks = Ranks(rank=1, size=2, device=CPU)
    monkeypatch.setattr(ranks, "gather_objects", lambda value: [("OSError: disk full", None), value])
    with pytest.raises(UserError, match="^rank 0 stopped: OSError: disk full$"):
        ranks.on_main(lambda: pytest.fail("only rank 0 writes"))


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("{", "expected JSON with zero_optimization.stage"),
        ("[]", "expected JSON with zero_optimization.stage"),
        ('{"zero_optimization": {"stage": 2}}', "stage is 2; a frozen base is sharded by stage 3"),
        ('{"zero_optimization": {"stage": 3, "zero_hpz_partition_size": 8}}', "a second copy that deltas would not"),
        ('{"zero_optimization": {"stage": 3, "offload_param": {"device": "nvme"}}}', "nvme is not supported; use cpu"),
    ],
)
def test_a_deepspeed_configuration_that_cannot_work_is_refused(content, said, tmp_path):
    (tmp_path / "ds.json").write_text(content)
    with pytest.raises(UserError, match=f"^ds_config: .*{said}"):
        read_ds_config(str(tmp_path / "ds.json"))


def test_the_shipped_deepspeed_configuration_is_stage_3():
    assert read_ds_config(None)["zero_optimization"]["stage"] == 3
