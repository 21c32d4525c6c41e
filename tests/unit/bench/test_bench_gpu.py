"""The campaign on a GPU: every section at tiny sizes on a CPU, and sections that fail without harm to the others."""

import json
import time
from multiprocessing import Pipe
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
import torch
from click.testing import CliRunner
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from scale_sft.bench import page, rows
from scale_sft.bench.gpu import campaign as module
from scale_sft.bench.gpu import steps
from scale_sft.bench.gpu.campaign import Campaign
from scale_sft.bench.gpu.lab import DRY, Lab, Sizes
from scale_sft.bench.gpu.parts import LABEL, Labels
from scale_sft.bench.gpu.sections import SECTIONS, Section, chosen
from scale_sft.cli.main import main
from scale_sft.spiel.schedules import ReallocationSchedule

CPU = torch.device("cpu")


def planted(name: str, seconds: float = 30.0) -> Section:
    return Section(name, seconds, f"tests.unit.bench.planted_sections:{name}", "")


def measured(campaign: Campaign, sections: list[Section]) -> dict[str, list[dict]]:
    """The results of each section, in the order in which they came."""
    found: dict[str, list[dict]] = {}
    for row in campaign.run(sections):
        found.setdefault(row["settings"]["section"], []).append(row["result"])
    return found


@pytest.fixture
def forked(monkeypatch) -> None:
    """Processes from the server that other tests use too."""
    monkeypatch.setattr(module, "_PRELOAD", ["tests.preload"])


@pytest.mark.slow
@pytest.mark.usefixtures("forked")
def test_a_section_that_fails_hangs_or_dies_costs_only_itself(tmp_path: Path, capfd) -> None:
    results = rows.Results(tmp_path, "gpu")
    campaign = Campaign(results, DRY, budget=120, on_gpu=False)
    names = ("raises", "dies", "hangs", "skips", "fine")
    began = time.monotonic()
    found = measured(campaign, [planted(name, 1.0 if name == "hangs" else 30.0) for name in names])
    assert time.monotonic() - began < 60
    before, raised = found["raises"]
    assert before == {"ms": 1.0} and raised["failed"] == "RuntimeError: CUDA out of memory, for example"
    assert found["dies"] == [{"failed": "killed by the system, most likely out of memory"}]
    hung, stopped = found["hangs"]
    assert stopped == {"failed": "stopped after 2 s"}
    assert not [one for one in psutil.process_iter() if _in_group(one, hung["pid"])], "nothing of it is left"
    assert found["skips"] == [{"skipped": "there is nothing to measure"}]
    figure, done = found["fine"]
    assert figure == {"device": "cpu", "shared": ["left by another"]} and list(done) == ["took_seconds"]
    assert campaign.failed == ["raises", "dies", "hangs"]
    stored = rows.read_rows(tmp_path, "gpu")
    assert [row["settings"]["section"] for row in stored] == [n for n in names for _ in found[n]]
    assert all(row["machine"]["processor"] and row["versions"]["torch"] for row in stored)
    assert "no row" not in capfd.readouterr().out


def _in_group(process: psutil.Process, group: int) -> bool:
    import os

    try:
        return os.getpgid(process.pid) == group and process.status() != psutil.STATUS_ZOMBIE
    except (psutil.Error, OSError):
        return False


def test_a_process_that_ended_before_its_turn_fails_its_section_only(tmp_path: Path) -> None:
    campaign = Campaign(rows.Results(tmp_path, "gpu"), DRY, budget=100, on_gpu=False)
    process = object.__new__(module._Process)
    process.connection, other = Pipe()
    process.process = SimpleNamespace(join=lambda seconds: None, exitcode=3)
    other.close()
    (row,) = campaign._measured(planted("fine"), process)
    assert row["result"] == {"failed": "ended with status 3, without a word"} and campaign.failed == ["fine"]


@pytest.mark.slow
@pytest.mark.usefixtures("forked")
def test_what_no_longer_fits_the_budget_is_skipped_and_said(tmp_path: Path) -> None:
    campaign = Campaign(rows.Results(tmp_path, "gpu"), Sizes(), budget=100, on_gpu=False)
    found = measured(campaign, [planted("raises", 1000.0), planted("fine", 50.0)])
    assert found["raises"] == [{"skipped": "it needs 1000 s, and 100 s are left"}]
    assert len(found["fine"]) == 2 and campaign.failed == []


@pytest.mark.slow
def test_on_a_gpu_a_process_is_not_forked_and_imports_while_another_measures(tmp_path: Path, monkeypatch) -> None:
    """A fork could not use CUDA."""
    contexts, get_context = [], module.get_context
    monkeypatch.setattr(module, "get_context", lambda how: contexts.append(how) or get_context(how))
    campaign = Campaign(rows.Results(tmp_path, "gpu"), DRY, budget=200, on_gpu=True)
    (found,) = measured(campaign, [planted("fine", 100.0)]).values()
    assert contexts == ["spawn"] and found[0]["shared"] == [] and campaign.failed == []


@pytest.mark.slow
@pytest.mark.usefixtures("forked")
def test_every_section_runs_dry_on_a_cpu(tmp_path: Path) -> None:
    sections = [section for section in SECTIONS if section.name != "kernels"]  # tests have tests of their own
    campaign = Campaign(rows.Results(tmp_path, "gpu"), DRY, budget=600, on_gpu=False)
    found = measured(campaign, sections)
    assert campaign.failed == [], json.dumps({name: found[name] for name in campaign.failed}, indent=1)
    assert set(found) == {section.name for section in sections}
    for name, results in found.items():
        figures = [one for one in results if not {"skipped", "took_seconds"} & set(one)]
        skipped = [one["skipped"] for one in results if "skipped" in one]
        assert figures or skipped, name
        assert all("not installed" in why for why in skipped), skipped
    assert found["demo_again"][0]["same_bits"] and found["demo_cpu"][0]["largest_difference_of_a_loss"] < 1e-5
    assert found["cycle"][0]["interval_steps"] == 20 and found["deterministic"][0]["same_bits"]
    assert "A dry run" in page.write_page(tmp_path).read_text(encoding="utf-8")


def test_a_cycle_counts_each_kind_of_step_as_often_as_it_happens(monkeypatch) -> None:
    schedule = ReallocationSchedule(total_steps=2000, update_interval_steps=20, estimation_steps=5)
    seconds = {"off": 1.0, "propose": 3.0, "estimate": 2.0}
    ran: list[float] = []

    def step_at(step: int, *_) -> None:
        ran.append(10.0 if schedule.reallocates_at(step) else seconds[schedule.phase(step).value])

    monkeypatch.setattr(steps, "seconds_of", lambda work, device: work() or ran.pop())
    tuning = SimpleNamespace(schedule=schedule, digests=lambda: ran.append(0.5))
    ours = SimpleNamespace(tuning=tuning, step_at=step_at, trainable=7)
    floor = SimpleNamespace(step=lambda *_: ran.append(0.8))
    found = steps._cycle(Lab(CPU, Sizes(cycles=2), Path(), lambda *_: None), ours, floor, None)
    assert found["ms"] == pytest.approx(1e3 * (15 * 1 + 3 + 3 * 2 + 10) / 20)
    assert found["over_frozen"] == pytest.approx(1.7 / 0.8, abs=1e-3)
    kinds = [found[f"{kind}_ms"] for kind in ("ordinary", "propose", "estimate", "reallocate", "digests")]
    assert kinds == [1000, 3000, 2000, 10000, 500]


def event(name: str, start: float, end: float, kernels=(), device=DeviceType.CPU) -> SimpleNamespace:
    return SimpleNamespace(
        name=name, device_type=device, kernels=kernels, time_range=SimpleNamespace(start=start, end=end)
    )


def test_launches_waits_and_time_belong_to_the_innermost_piece_around_them() -> None:
    kernel = lambda name, microseconds: SimpleNamespace(name=name, duration=microseconds)
    labels = Labels()
    labels.read(
        [
            event(LABEL + "other", 0, 100),
            event(LABEL + "optimizer", 50, 90, [kernel(LABEL + "optimizer", 40)]),
            event("aten::mul", 10, 20, [kernel("elementwise", 2000)]),
            event("cudaLaunchKernel", 12, 13),
            event("cuLaunchKernelEx", 60, 61),
            event("cudaLaunchKernelExC", 62, 63),
            event("cudaStreamSynchronize", 70, 80),
            event("adamw_kernel", 64, 90, device=DeviceType.CUDA),
            event("cudaDeviceSynchronize", 101, 102),
        ]
    )
    assert labels.launches == {"other": 1, "optimizer": 2} and labels.waits == {"optimizer": 1}
    assert labels.milliseconds == {"other": 2.0}


def test_labels_are_found_in_a_profile_of_torch() -> None:
    """As far as a CPU shows: names, devices, times and kernels are where `read` looks for them."""
    labels = Labels()
    with profile(activities=[ProfilerActivity.CPU]) as profiled, labels.piece("outer"), labels.piece("inner"):
        torch.ones(3).sum()
    events = profiled.events()
    spans = {one.name: one.time_range for one in events if one.name.startswith(LABEL)}
    assert set(spans) == {LABEL + "outer", LABEL + "inner"}
    added = next(one for one in events if one.name == "aten::sum")
    assert spans[LABEL + "inner"].start <= added.time_range.start <= spans[LABEL + "inner"].end
    assert added.device_type == DeviceType.CPU and added.kernels == []
    labels.read(events)
    assert not labels.launches


def test_on_a_cpu_operations_that_are_no_views_count_as_launches() -> None:
    labels = Labels()
    with labels.counted(CPU):
        total = torch.ones(4).view(2, 2).t().add_(1)
        with labels.piece("inner"):
            total.sum().item()
    assert labels.launches == {"other": 2, "inner": 2} and labels.waits == {"inner": 1}


def test_sections_are_chosen_by_name_in_their_own_order_and_listed_in_the_help() -> None:
    assert [section.name for section in chosen(["memory", "step"])] == ["step", "memory"]
    done = CliRunner().invoke(main, ["bench", "gpu", "--only", "stp"])
    assert done.exit_code != 0 and "did you mean 'step'?" in done.output
    told = " ".join(CliRunner().invoke(main, ["bench", "gpu", "--help"]).output.split())
    assert f"Sections: {', '.join(section.name for section in SECTIONS)}." in told
