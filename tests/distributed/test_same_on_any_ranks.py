"""The same global batches on 1, 2 and 4 ranks, sharded and replicated: the same indices, losses and deltas."""

import json

import pytest
from safetensors.torch import load_file

pytestmark = [pytest.mark.distributed, pytest.mark.timeout(900)]

METHODS = {
    f"{method}{'-checkpointing' * checkpointing}": {
        "method": method,
        "gradient_checkpointing": checkpointing,
        "max_grad_norm": 0.5,
    }
    for method, checkpointing in (("ag", False), ("ag", True), ("ma", False), ("ma", True), ("static", False))
}
METHODS["random"] = {"method": "random"}
METHODS["columns"] = {"method": "columns", "selection_batches": 2, "draw": "sample", "max_grad_norm": 0.5}
METHODS["ag-columns"] = {"granularity": "column", "density": 0.1, "max_grad_norm": 0.5, "learning_rate": 1e-3}
METHODS["ag-sampled"] = {"selection_batches": 2, "score": "gradient_weight", "draw": "sample"}
METHODS["ag-sampled"]["selection_pool"] = 5
METHODS["static-sampled"] = {"method": "static", "selection_batches": 2, "score": "balanced", "draw": "sample"}
METHODS["static-sampled"] |= {"temperature": 0.5, "row_quota": 3.0}
METHODS["ag-embeddings"] = {"method": "ag", "train_embeddings": "both", "density": 0.2}  # tied
METHODS["ma-embeddings"] = {"method": "ma", "target_modules": ["embed_tokens"]}
UNEVEN = {"epochs": 1, "steps": None, "max_train_examples": 29, "global_batch_size": 8, "density": 0.0002}
"""The last batch has 5 sequences, and most shards of a weight hold no active entry."""


def steps_of(run):
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [record for record in records if record["event"] == "step"]


def reallocations_of(run):
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [record for record in records if record["event"] == "reallocation"]


def assert_same_run(one, other):
    for mine, theirs in zip(steps_of(one), steps_of(other), strict=True):
        assert theirs["loss"] == pytest.approx(mine["loss"], rel=1e-5)
    a, b = (load_file(run / "adapter" / "adapter_model.safetensors") for run in (one, other))
    assert a.keys() == b.keys()
    for name in a:
        if name.endswith(".indices"):
            assert a[name].equal(b[name]), f"{name} differs between {one} and {other}"
        else:
            assert (a[name] - b[name]).abs().max() < 1e-4


@pytest.fixture(scope="module")
def single(launch_runs):
    """The runs of one process."""
    names = [*METHODS, "uneven"]
    return dict(zip(names, launch_runs(1, False, [*METHODS.values(), UNEVEN]), strict=True))


# Four ranks cut batches and weights once more; how methods and checkpointing meet, two ranks show.
RUNS = {2: [*METHODS, "uneven"], 4: ["ag-checkpointing", "ma", "uneven"]}


@pytest.mark.parametrize("sharded", [False, True], ids=["replicated", "sharded"])
@pytest.mark.parametrize("ranks", RUNS)
def test_ranks_and_placement_do_not_change_a_run(launch_runs, single, ranks, sharded):
    names = RUNS[ranks]
    found = launch_runs(ranks, sharded, [(METHODS | {"uneven": UNEVEN})[name] for name in names])
    runs = dict(zip(names, found, strict=True))
    for name in names:
        assert_same_run(single[name], runs[name])
    assert all(len(reallocations_of(run)) >= 3 for name, run in runs.items() if name.startswith(("ag", "ma")))


def test_in_bfloat16_rounding_moves_a_few_indices_between_numbers_of_ranks_and_the_runs_stay_equally_good(launch_runs):
    """docs/cluster.md has the figures of a larger base."""
    runs = [{"dtype": "bfloat16", "method": method} for method in ("ag", "ma")]
    for one, two in zip(launch_runs(1, False, runs), launch_runs(2, False, runs), strict=True):
        a, b = (load_file(run / "adapter" / "adapter_model.safetensors") for run in (one, two))
        names = [name for name in a if name.endswith(".indices")]
        shared = sum(len(set(a[name].tolist()) & set(b[name].tolist())) for name in names)
        assert shared / sum(a[name].numel() for name in names) > 0.95
        for mine, theirs in zip(steps_of(one), steps_of(two), strict=True):
            assert theirs["loss"] == pytest.approx(mine["loss"], rel=0.03)


def test_candidates_do_not_depend_on_the_cut_into_micro_batches_when_their_number_is_given(launch_runs):
    whole, cut = {"proposal_batch_size": 4}, {"proposal_batch_size": 4, "micro_batch_size": 2}
    one, one_cut = launch_runs(1, False, [whole, cut | {"micro_batch_size": 4}])
    two, two_cut = launch_runs(2, True, [whole, cut])
    for other in (one_cut, two, two_cut):
        assert_same_run(one, other)


def test_bytes_on_the_wire_are_four_per_active_entry_and_candidate_besides_the_proposal(launch_runs):
    plan = [{"method": "ag"}, {"gradient_dtype": "bfloat16", "moments": "int8"}]
    run, lean = launch_runs(2, True, plan, report=True)
    assert (run / "report.html").is_file()
    active = reallocations_of(run)[0]["active"]
    steps = {record["step"]: record for record in steps_of(run)}
    assert steps[3]["comm_gradients_bytes"] == 4 * active  # no estimation at step 3
    assert "comm_proposal_bytes" not in steps[3]
    assert steps[2]["comm_gradients_bytes"] == 8 * active  # step 2 ends an estimation phase: K + C entries
    assert steps[1]["comm_proposal_bytes"] > 0  # step 1 proposes
    assert [record["comm_gradients_bytes"] for record in steps_of(lean)] == [
        record["comm_gradients_bytes"] // 2 for record in steps.values()
    ]
    for mine, theirs in zip(steps.values(), steps_of(lean), strict=True):  # the indices differ in time: about as good
        assert theirs["loss"] == pytest.approx(mine["loss"], rel=0.1)
