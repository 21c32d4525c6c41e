"""Worlds of several ranks: what is asked of them, and the arithmetic that models them."""

import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from scale_sft.bench import page, rows
from scale_sft.bench.scale import measure as scale
from scale_sft.bench.scale import worker as scale_worker
from scale_sft.bench.show import report
from scale_sft.distributed.cluster import Cluster
from scale_sft.errors import UserError
from scale_sft.model.loading import load_model_config
from scale_sft.planning.planner import Planner
from tests.processes import ends

ROOT = Path(__file__).resolve().parents[3]


@pytest.fixture
def worlds(tiny_model, pairs_file) -> scale.Worlds:
    return scale.Worlds(base=str(tiny_model("llama")), data=str(pairs_file), max_length=16)


def records(worlds: scale.Worlds, ranks: int) -> list[dict]:
    """What a run would log: 10 ms a step, 30 in the phase, whose first step proposes."""
    config = worlds.config(ranks)
    first, interval = config.sparse.estimation_steps, config.sparse.update_interval_steps
    lines = []
    for step in range(1, first + interval + 1):
        inside = step <= first or step > interval
        lines.append(
            {"event": "step", "step": step, "seconds": 0.03 if inside else 0.01, "tokens": 100, "memory_bytes": step}
            | {"comm_gradients_bytes": 8.0 if inside else 4.0}
            | ({"comm_proposal_bytes": 60.0} if step in (1, interval + 1) else {})
        )
    return [{"event": "start"}, *lines]


def test_a_cycle_counts_from_the_step_after_the_first_reallocation(worlds: scale.Worlds) -> None:
    found = scale.of_cycle(records(worlds, 2), worlds.config(2))
    assert found["step_seconds"] == 0.01 and found["phase_step_seconds"] == 0.03
    assert found["cycle_seconds"] == pytest.approx(15 * 0.01 + 5 * 0.03)
    assert found["payload_bytes"] == pytest.approx({"gradients": 5.0, "proposal": 3.0})
    assert found["memory_bytes"] == 25


def test_weak_worlds_grow_the_batch_and_strong_ones_keep_it(worlds: scale.Worlds) -> None:
    strong = scale.Worlds(**vars(worlds) | {"strong": True, "batch": 16})
    assert [worlds.global_batch(n) for n in (1, 2, 4)] == [4, 8, 16]
    assert [strong.global_batch(n) for n in (1, 2, 4)] == [16, 16, 16]
    assert scale.predicted(strong, [1, 2]) == [8, 16] and scale.predicted(worlds, [1, 2])[-1] == 1024
    with pytest.raises(UserError, match="16 sequences do not divide over 3 ranks"):
        scale.check(strong, [1, 3])


def test_more_ranks_than_gpus_are_refused(worlds: scale.Worlds, monkeypatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(UserError, match="--ranks: got 4, but there are 2 GPUs"):
        scale.check(worlds, [1, 4])


def test_the_model_of_what_goes_into_collectives_is_the_ranks_own_arithmetic(worlds: scale.Worlds) -> None:
    """4 bytes per active entry, as many per candidate inside the phase, and the proposal, once in S steps."""
    planner = Planner(load_model_config(worlds.config(1).model))
    config = worlds.config(2)
    shapes = planner.facts(config).shapes
    active = [max(1, int(worlds.density * o * i)) for o, i in shapes.values()]
    for ranks in (2, 128):
        found = scale.modelled(planner, worlds, ranks)
        phase = config.sparse.estimation_steps / config.sparse.update_interval_steps
        assert found["modelled_payload_bytes"]["gradients"] == pytest.approx(4 * sum(active) * (1 + phase), rel=1e-3)
        summed = 4 * ranks * sum(-(-o * i // ranks) for o, i in shapes.values())  # with padding
        chosen = 4 * sum(active) + len(shapes) * 4 * (2 * 2**11 + 2**9 + 1)  # indices, and histograms
        assert found["modelled_payload_bytes"]["proposal"] == (summed + chosen) / config.sparse.update_interval_steps
    assert scale.modelled(planner, worlds, 1)["sent_bytes"] == {}


def test_measured_and_modelled_worlds_become_a_page(worlds: scale.Worlds, monkeypatch, tmp_path: Path) -> None:
    clock = {"collective_seconds": 0.0025}
    monkeypatch.setattr(scale, "measure", lambda w, ranks: scale.of_cycle(records(w, ranks), w.config(ranks)) | clock)
    report(tmp_path, "scale", scale.run(worlds, [1, 2]), count=10, columns=scale.COLUMNS, cells=scale.cells)
    found = rows.read_rows(tmp_path, "scale")
    assert [row["settings"]["ranks"] for row in found if row["settings"]["measured"]] == [1, 2]
    assert len(found) == 10
    html = (tmp_path / page.PAGE).read_text()
    assert html.count("<svg") == 2 and html.count("<td>2.5 ms</td>") == 2 and "<th>in collectives</th>" in html


def test_the_rank_that_waits_longest_counts_in_the_median_of_plain_steps(worlds: scale.Worlds) -> None:
    config = worlds.config(2)
    first, interval = config.sparse.estimation_steps, config.sparse.update_interval_steps
    plain = lambda step: first < step <= interval
    quick, slow = ({str(n): each if plain(n) else 9.0 for n in range(1, 26)} for each in (0.1, 0.3))
    slow[str(first + 1)] = 5.0
    assert scale.slowest_in_collectives([quick, slow], config) == 0.3


def test_a_collective_inside_another_counts_once_and_none_counts_before_the_first_step(monkeypatch) -> None:
    now = iter([1.0, 3.0, 10.0, 14.0])
    monkeypatch.setattr(scale_worker.time, "perf_counter", lambda: next(now))
    cluster = SimpleNamespace(size=2, device=torch.device("cpu"))
    clock = scale_worker.Clock()
    inner = clock.around(lambda cluster: "done")
    outer = clock.around(lambda cluster: inner(cluster))
    assert inner(cluster) == "done" and not clock.seconds
    for step in (1, 2):
        clock.begin(step)
        assert outer(cluster) == "done"
    assert clock.seconds == {1: 2.0, 2: 4.0}


def test_collectives_of_the_worker_are_methods_of_the_cluster() -> None:
    assert all(callable(getattr(Cluster, name)) for name in scale_worker.COLLECTIVES)


def test_far_more_ranks_than_cores_are_refused(worlds: scale.Worlds, monkeypatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(scale, "_cores", lambda: 2)
    scale.check(worlds, [1, 8])
    with pytest.raises(UserError, match="--ranks: got 9, but this machine has 2 cores.* give at most 8"):
        scale.check(worlds, [1, 9])


def test_ranks_that_fail_say_why(worlds: scale.Worlds) -> None:
    words = [sys.executable, "-c", "import sys; print('error: the base is gone'); sys.exit(1)"]
    with pytest.raises(UserError, match="^here: ended with status 1: error: the base is gone$"):
        scale._launch(words, "here")


def test_ranks_that_do_not_finish_are_ended_with_their_launcher(tmp_path: Path) -> None:
    code = (
        "import subprocess, sys; child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)']); "
        f"open({str(tmp_path / 'pid')!r}, 'w').write(str(child.pid)); child.wait()"
    )
    with pytest.raises(UserError, match="not finished within 3 seconds"):
        scale._launch([sys.executable, "-c", code], "here", timeout_seconds=3)
    pid = int((tmp_path / "pid").read_text())
    assert ends(pid, 10), "a rank was left behind"
