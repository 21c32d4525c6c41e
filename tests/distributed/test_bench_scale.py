"""What ranks give into collectives is what the planner says."""

import pytest

from scale_sft.bench.scale import measure as scale
from scale_sft.model.loading import load_model_config
from scale_sft.planning.planner import Planner

pytestmark = pytest.mark.distributed


@pytest.mark.parametrize("sharded", [False, True], ids=["replicated", "sharded"])
def test_two_ranks_measure_the_bytes_of_the_model_and_their_time_in_collectives(
    sharded: bool, hf_home, monkeypatch
) -> None:
    monkeypatch.setenv("HF_HOME", str(hf_home))
    worlds = scale.Worlds(sharded=sharded, batch=2, max_length=64)
    scale.check(worlds, [2])
    measured = scale.measure(worlds, 2)
    modelled = scale.modelled(Planner(load_model_config(worlds.config(2).model)), worlds, 2)
    counted = {purpose: measured["payload_bytes"][purpose] for purpose in ("gradients", "proposal")}
    assert counted == pytest.approx(modelled["modelled_payload_bytes"], rel=1e-3)
    assert 0 < measured["collective_seconds"] < measured["step_seconds"] < measured["cycle_seconds"]
    assert ("gathering of the base" in modelled["sent_bytes"]) == sharded
