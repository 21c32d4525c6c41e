import pytest
from safetensors.torch import load_file

from scale_sft.config.loading import load
from scale_sft.distributed.world import World
from scale_sft.training.inputs import read_inputs

MIB = 1 << 20


@pytest.fixture
def placement(run_options, monkeypatch):
    """(free bytes of a device, ranks, option=value, ...) -> where the base would lie, and why."""

    def choose(free_bytes: int, ranks: int, **options):
        monkeypatch.setattr(World, "device_memory_bytes", lambda _: free_bytes)
        monkeypatch.setenv("WORLD_SIZE", str(ranks))
        return read_inputs(load(None, {**run_options, "base_placement": "auto", **options})).placement

    return choose


@pytest.mark.parametrize(
    ("free_bytes", "ranks", "name"), [(1 << 40, 1, "replicate"), (1 << 40, 4, "replicate"), (1000, 4, "shard")]
)
def test_a_base_is_replicated_where_it_fits_and_sharded_where_it_does_not(placement, free_bytes, ranks, name) -> None:
    chosen = placement(free_bytes, ranks)
    assert chosen.name == name and chosen.reason.startswith("auto: ") and "GiB" in chosen.reason


def test_one_process_cannot_shard_and_is_told_so(placement) -> None:
    chosen = placement(1000, 1)
    assert chosen.name == "replicate" and "cannot shard" in chosen.reason


@pytest.mark.parametrize("asked", ["replicate", "shard"])
def test_a_placement_that_is_asked_for_is_kept(placement, asked: str) -> None:
    assert placement(1000, 4, base_placement=asked).name == asked
    assert placement(1 << 40, 4, base_placement=asked).name == asked


def test_momentum_approximation_needs_less_memory_than_accumulated_gradients(run_options) -> None:
    from scale_sft.planning.footprint import footprint

    total = {}
    for method in ("ag", "ma"):
        config = load(None, {**run_options, "method": method, "density": 0.3})
        inputs = read_inputs(config)
        total[method] = footprint(config, inputs.model_config, inputs.dtype).total
        stored = load_file(f"{run_options['base']}/model.safetensors")
        assert footprint(config, inputs.model_config, inputs.dtype).base == sum(t.nbytes for t in stored.values())
    assert total["ma"] < total["ag"]
