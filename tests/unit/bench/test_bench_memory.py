"""State is counted by part, each storage once; peaks and limits are found."""

import subprocess
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from torch import nn

from scale_sft.bench import page, rows
from scale_sft.bench.child import ask
from scale_sft.bench.contestants import Sparse
from scale_sft.bench.memory import measure as memory
from scale_sft.bench.memory import worker as memory_worker
from scale_sft.bench.memory.state import bytes_by_part
from scale_sft.bench.workload import Base, Batches, Case
from scale_sft.cli.main import main
from scale_sft.errors import UserError

CPU = torch.device("cpu")
ROOT = Path(__file__).resolve().parents[3]


@pytest.fixture
def case(tiny_model) -> Case:
    return Case(base=str(tiny_model("llama")), dtype="float32", length=8, micro_batch=1, rank=2)


class Holder:
    def __init__(self, **attributes):
        self.__dict__ |= attributes


def test_storage_that_is_shared_counts_once_and_that_of_the_base_never() -> None:
    weight, flat, moments = torch.zeros(100), torch.zeros(10), torch.zeros(10, dtype=torch.uint8)
    store = Holder(flat=flat, _deltas={"w": Holder(deltas=flat[:4], indices=torch.zeros(4, dtype=torch.int32))})
    layer = nn.Linear(3, 3)
    resident = Holder(store=store, entries=lambda: weight, _base={"w": torch.zeros(4)}, view=weight[2:], layer=layer)
    parts = bytes_by_part({"store": store, "optimizer": [moments], "resident": resident}, [weight])
    assert parts == {"deltas": 40, "indices": 16, "moments": 10, "base values": 16}


def test_what_a_part_is_not_known_by_name_is_called_by_its_attribute() -> None:
    assert bytes_by_part({"store": Holder(codes=torch.zeros(3))}, []) == {"codes": 12}


def test_objects_that_refer_to_each_other_are_walked_once() -> None:
    one, other = Holder(flat=torch.zeros(2)), Holder()
    one.other, other.one = other, one
    assert bytes_by_part({"store": one}, []) == {"deltas": 8}


@pytest.mark.parametrize("method", ["ag", "ma"])
def test_the_state_of_ours_is_what_its_tensors_take(case: Case, method: str) -> None:
    base = Base(case, CPU)
    ours = Sparse(base, method)
    batches = Batches(case, base.model_config.vocab_size, CPU)
    ours.step(batches, 0)
    parts, store = memory_worker._kept(ours), ours.tuning.store
    places, rows = store.places, vars(store.places.rows)
    kept = [places._row_starts, places._columns, ours.tuning.recorder.places._row_starts]
    kept += [rows[name] for name in ("first_entries", "columns_before") if name in rows]
    assert parts["indices"] == sum(tensor.nbytes for tensor in kept)
    assert parts["deltas"] == store.flat.nbytes
    assert parts["gradients"] == ours.tuning.recorder.flat.untyped_storage().nbytes()
    assert parts["base values"] == ours.resident.bytes
    assert ("moments" in parts, "accumulators" in parts) == (method == "ag", method == "ma")
    assert sum(parts.values()) < base.bytes
    ours.step_at(1, batches, 1)
    inside = memory_worker._kept(ours)
    if method == "ag":
        assert inside["candidates"] > 0 and inside["gradients"] == 2 * parts["gradients"]
    else:
        assert inside == parts


def test_lora_in_fp32_takes_sixteen_bytes_for_each_parameter(case: Case) -> None:
    pytest.importorskip("peft")
    found = memory_worker.main({"name": "peft-lora", "case": asdict(case), "device": "cpu"})
    of = {part: count / found["trainable"] for part, count in found["outside"]["parts"].items()}
    assert of["adapter"] == of["gradients"] == 4 and 8 <= of["moments"] < 8.5
    assert found["inside"] is None


@pytest.mark.parametrize("needed", [1, 2, 7, 24, None])
def test_the_smallest_limit_is_the_first_under_which_a_run_passes(needed: int | None) -> None:
    asked = []

    def passes(limit: int) -> bool:
        asked.append(limit)
        return needed is not None and limit >= needed

    assert memory.smallest_limit(passes, 24) == needed
    assert len(asked) <= 6


def test_a_contestant_that_cannot_take_part_is_left_out_with_its_reason(case: Case) -> None:
    packed = Case(**asdict(case) | {"quantization": "nf4"})
    ((settings, result),) = memory.run(["full-adamw"], [packed], device=CPU, limit_steps=None)
    assert "no dense weights to train" in result["left_out"]
    assert "left out" in memory.cells(settings, result)[2]


def test_a_contestants_error_is_told_with_its_name(monkeypatch, case: Case) -> None:
    monkeypatch.setattr(memory, "ask", lambda *words, **more: {"error": "no such model"})
    with pytest.raises(UserError, match="bench memory: ours-ag in float32: no such model"):
        memory.measure("ours-ag", case, device=CPU, limit_steps=None)


def test_a_measurement_that_dies_says_its_last_word(monkeypatch) -> None:
    def died(words, **options):
        return subprocess.CompletedProcess(words, 1, "", "Traceback\nKeyError: 'name'")

    monkeypatch.setattr(subprocess, "run", died)
    with pytest.raises(UserError, match="^here: ended with status 1: KeyError: 'name'$"):
        ask("memory.worker", {}, what="here", timeout_seconds=60)


@pytest.mark.slow
def test_the_command_writes_rows_and_a_page_and_says_what_needs_a_gpu(tmp_path: Path, case: Case) -> None:
    words = ["--base", case.base, "--dtype", "float32", "--contestants", "ours-ag,full-adamw", "--length", "8"]
    done = CliRunner().invoke(main, ["bench", "memory", *words, "--rank", "2", "--output", str(tmp_path)])
    assert done.exit_code == 0, done.output + done.stderr
    assert "smallest limit under which 30 steps pass: left out, needs a GPU" in done.stderr
    ours, full = rows.read_rows(tmp_path, "memory")
    assert ours["result"]["outside"]["peak_bytes"] > 0 and ours["result"]["smallest_limit_gib"] is None
    assert full["result"]["trainable"] > 5 * ours["result"]["trainable"]
    assert (tmp_path / page.PAGE).read_text().count("<svg") == 2


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU, whose allocator can be given a limit")
def test_thirty_steps_pass_under_a_whole_gpu_and_not_under_next_to_nothing(case: Case) -> None:
    request = {"name": "ours-ag", "case": asdict(case), "device": "cuda", "steps": 30}
    fits = lambda limit: ask("memory.worker", request | {"limit_bytes": limit}, what="", timeout_seconds=300)["fits"]
    assert fits(torch.cuda.get_device_properties(0).total_memory) and not fits(1 << 20)


@pytest.mark.parametrize("command", ["memory", "reallocate"])
def test_a_gpu_is_named_with_its_index(command: str, monkeypatch, tmp_path: Path) -> None:
    """torch.cuda.set_per_process_memory_fraction takes no device without one."""
    from scale_sft.bench import reallocate

    asked = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 3)
    monkeypatch.setattr(reallocate, "available_bytes", lambda device: 1 << 60)
    for module in (memory, reallocate):
        monkeypatch.setattr(module, "run", lambda *_, device, **options: asked.append(device) or iter(()))
    done = CliRunner().invoke(main, ["bench", command, "--output_dir", str(tmp_path)])
    assert done.exit_code == 0, done.output
    assert asked == [torch.device("cuda", 3)]
