"""Preference tuning on 1, 2 and 4 ranks, replicated and sharded, with a base in 4 bits too: the same run."""

from __future__ import annotations

import json

import pytest

from .test_same_on_any_ranks import assert_same_run

pytestmark = [pytest.mark.distributed, pytest.mark.timeout(900)]

SHORT = {
    "objective": "dpo",
    "train_data": "demo",
    "eval_data": "demo",
    "steps": 6,
    "max_eval_examples": 9,
    "max_length": 96,
}
RUNS = {
    "dpo": SHORT | {"packing": True, "method": "ma", "proposal_batch_size": 2},
    "swapped": SHORT | {"reference": "swapped", "proposal_batch_size": 2, "max_train_examples": 29, "global_batch_size": 12},
    "kto in 4 bits": SHORT | {"objective": "kto", "reference": "swapped", "proposal_batch_size": 2, "quantization": "nf4"},
}  # fmt: skip


def evaluations(run):
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [
        {key: value for key, value in record.items() if key not in ("time", "seconds")}
        for record in records
        if record["event"] == "eval"
    ]


@pytest.fixture(scope="module")
def single(launch_runs):
    return dict(zip(RUNS, launch_runs(1, False, list(RUNS.values())), strict=True))


@pytest.mark.parametrize(
    ("ranks", "sharded", "names"), [(2, True, ("dpo", "kto in 4 bits")), (4, False, ("swapped",))], ids=str
)
def test_ranks_and_placement_do_not_change_a_run(launch_runs, single, ranks, sharded, names):
    for name, run in zip(names, launch_runs(ranks, sharded, [RUNS[name] for name in names]), strict=True):
        assert_same_run(single[name], run)
        first, *_, last = evaluations(run)
        assert first == evaluations(single[name])[0], "the bits of the reference"
        assert last["loss"] == pytest.approx(evaluations(single[name])[-1]["loss"], rel=1e-4)
