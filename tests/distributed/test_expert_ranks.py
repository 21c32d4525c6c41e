"""Experts of a layer on ranks: the same run on one and two, whole or in shards whose borders cut slices."""

import shutil
from pathlib import Path

import pytest

import scale_sft
from scale_sft.adapters.format import Adapter
from tests.unit.model.mixtures import mixture

from .test_same_on_any_ranks import assert_same_run, reallocations_of, steps_of

pytestmark = [pytest.mark.distributed, pytest.mark.timeout(900)]

RUNS = {
    "ag": {"method": "ag", "gradient_checkpointing": True, "max_grad_norm": 0.5},
    "ma": {"method": "ma"},
    "chosen": {"method": "static", "selection_batches": 2, "score": "gradient_weight", "target_modules": "experts"},
}
BALANCED = {"router_aux_loss": True, "density": 0.03}
"""Of one rank only: this loss is not linear in the tokens, so it depends on how ranks cut a batch."""
COMMON = {"steps": 6, "max_train_examples": 60, "max_length": 64, "global_batch_size": 4, "eval_data": None}


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    """A mixture of 7 experts, so that two shards cut the middle one; some of them meet no token in a step."""
    folder = tmp_path_factory.mktemp("mixture")
    sizes = {"vocab_size": 259, "num_experts": 7, "num_local_experts": 7}
    spread = {"initializer_range": 0.2}  # AdamW would show the order of sums in gradients that are nearly 0
    mixture("mixtral", router_aux_loss_coef=0.1, **sizes, **spread).save_pretrained(folder)
    demo = Path(scale_sft.__file__).parent / "assets" / "demo" / "base"
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(demo / name, folder / name)
    return folder


@pytest.fixture(scope="module")
def runs(launch_runs, base):
    return lambda ranks, sharded: launch_runs(
        ranks, sharded, [{**COMMON, "base": str(base), **options} for options in RUNS.values()]
    )


@pytest.fixture(scope="module")
def single(runs):
    return runs(1, False)


@pytest.fixture(scope="module")
def balanced(launch_runs, base):
    return launch_runs(1, False, [{**COMMON, "base": str(base), **BALANCED}])[0]


@pytest.mark.parametrize("sharded", [False, True], ids=["replicated", "sharded"])
def test_two_ranks_train_experts_as_one_does(runs, single, sharded):
    for one, two in zip(single, runs(2, sharded), strict=True):
        assert_same_run(one, two)


def test_experts_of_one_rank_are_trained_and_the_balancing_loss_is_reported(single, balanced):
    ag, plain, chosen = single
    assert all(record["router_loss"] > 0 for record in steps_of(balanced))
    assert "router_loss" not in steps_of(plain)[0]
    assert len(reallocations_of(ag)) == len(reallocations_of(plain)) == 2
    shapes = Adapter.load(chosen / "adapter").shapes
    assert len(shapes) == 2 * 2 * 7 and all(".experts." in name for name in shapes)
