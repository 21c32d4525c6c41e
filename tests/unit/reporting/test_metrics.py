import inspect
import io
import json
import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from scale_sft.reporting.metrics import Metrics, NullMetrics, read_metrics


def plain() -> Console:
    """A console as in a log file."""
    return Console(file=io.StringIO(), force_terminal=False, width=80)


def terminal(width: int = 100) -> Console:
    return Console(file=io.StringIO(), force_terminal=True, width=width, _environ={"TERM": "xterm-256color"})


def run_steps(metrics: Metrics, steps: Iterator[int] | range, **changes: Any) -> None:
    for step in steps:
        values = {"loss": float(step), "learning_rate": 8.1e-3, "grad_norm": 1.0, "tokens": 1000, "seconds": 0.1}
        metrics.step(step, target_tokens=600, **{**values, **changes})


def reallocate(metrics: Metrics, step: int, number: int) -> None:
    metrics.reallocation(
        step, number=number, active=1000, replaced=32, grown=40, dropped=40, seconds=0.2,
        cohort_counts=[0, 968, 32], cohort_steps=[0, 5, 25],
    )  # fmt: skip


def of(path: Path, event: str) -> list[dict]:
    return [record for record in read_metrics(path / "metrics.jsonl") if record["event"] == event]


def test_the_first_every_tenth_and_the_last_step_are_logged(tmp_path: Path) -> None:
    with Metrics(tmp_path, total_steps=25, console=plain()) as metrics:
        run_steps(metrics, range(1, 26))
    assert [record["step"] for record in of(tmp_path, "step")] == [1, 10, 20, 25]


def test_every_step_counts_in_exactly_one_line(tmp_path: Path) -> None:
    with Metrics(tmp_path, total_steps=25, console=plain()) as metrics:
        run_steps(metrics, range(1, 26))
    records = of(tmp_path, "step")
    assert [record["loss"] for record in records] == [1, (2 + 10) / 2, (11 + 20) / 2, (21 + 25) / 2]
    assert [record["steps"] for record in records] == [1, 9, 10, 5]
    assert sum(record["tokens"] for record in records) == 25_000
    assert all(record["tokens_per_second"] == pytest.approx(10_000) for record in records)


def test_steps_before_an_interruption_are_written_at_close(tmp_path: Path) -> None:
    metrics = Metrics(tmp_path, total_steps=100, console=plain())
    run_steps(metrics, range(1, 14))
    metrics.close()
    assert of(tmp_path, "step")[-1]["step"] == 13


def test_closing_twice_changes_nothing(tmp_path: Path) -> None:
    metrics = Metrics(tmp_path, total_steps=3, console=plain())
    run_steps(metrics, range(1, 3))
    metrics.close()
    content = (tmp_path / "metrics.jsonl").read_bytes()
    metrics.close()
    assert (tmp_path / "metrics.jsonl").read_bytes() == content


def test_a_resumed_run_never_holds_a_step_twice(tmp_path: Path) -> None:
    with Metrics(tmp_path, total_steps=40, log_every_steps=5, console=plain()) as metrics:
        metrics.evaluation(0, loss=3.0, perplexity=20.0, target_tokens=10, seconds=0.1)
        run_steps(metrics, range(1, 6))
        reallocate(metrics, 5, 1)
        run_steps(metrics, range(6, 26))
        reallocate(metrics, 25, 2)
        run_steps(metrics, range(26, 31))
        metrics.summary(seconds=3.0)
    with Metrics(tmp_path, total_steps=40, first_step=20, log_every_steps=5, console=plain()) as metrics:
        run_steps(metrics, range(21, 41), loss=0.5)
        reallocate(metrics, 25, 2)
        metrics.summary(seconds=2.0)
    steps = [record["step"] for record in of(tmp_path, "step")]
    assert steps == [1, 5, 10, 15, 20, 21, 25, 30, 35, 40]
    assert [record["number"] for record in of(tmp_path, "reallocation")] == [1, 2]
    assert [record["seconds"] for record in of(tmp_path, "end")] == [2.0]
    assert len(of(tmp_path, "eval")) == 1


def test_a_resumed_run_goes_on_after_a_torn_line(tmp_path: Path) -> None:
    with Metrics(tmp_path, total_steps=4, log_every_steps=1, console=plain()) as metrics:
        run_steps(metrics, range(1, 4))
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(path.read_bytes()[:-20])
    with Metrics(tmp_path, total_steps=4, first_step=2, log_every_steps=1, console=plain()) as metrics:
        run_steps(metrics, range(3, 5))
    assert [record["step"] for record in of(tmp_path, "step")] == [1, 2, 3, 4]


def test_a_new_run_keeps_the_records_of_an_earlier_one_under_another_name(tmp_path: Path) -> None:
    for _ in range(2):
        with Metrics(tmp_path, total_steps=2, log_every_steps=1, console=plain()) as metrics:
            run_steps(metrics, range(1, 3))
    assert [record["step"] for record in of(tmp_path, "step")] == [1, 2]
    assert len(read_metrics(tmp_path / "metrics.previous.jsonl")) == 3
    assert sorted(path.name for path in tmp_path.iterdir()) == ["metrics.jsonl", "metrics.previous.jsonl"]


def test_steps_must_increase(tmp_path: Path) -> None:
    metrics = Metrics(tmp_path, total_steps=9, first_step=4, console=plain())
    with metrics, pytest.raises(ValueError, match="got step 4 after step 4"):
        run_steps(metrics, range(4, 5))


@pytest.mark.parametrize("loss", [math.nan, math.inf, -math.inf])
def test_numbers_that_are_not_finite_are_null_in_the_file(tmp_path: Path, loss: float) -> None:
    with Metrics(tmp_path, total_steps=1, console=plain()) as metrics:
        run_steps(metrics, range(1, 2), loss=loss)
        metrics.evaluation(1, loss=loss, perplexity=loss, target_tokens=1, seconds=0.0)
        metrics.summary(per_weight={"a": {"l2_delta": loss}})
    for line in (tmp_path / "metrics.jsonl").read_text().splitlines():
        json.loads(line, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
    assert of(tmp_path, "step")[0]["loss"] is None
    assert of(tmp_path, "end")[0]["per_weight"]["a"]["l2_delta"] is None


def test_tensor_and_numpy_scalars_are_numbers_in_the_file(tmp_path: Path) -> None:
    np = pytest.importorskip("numpy")
    with Metrics(tmp_path, total_steps=1, console=plain()) as metrics:
        run_steps(metrics, range(1, 2), loss=np.float32(1.5), tokens=np.int64(7))
        metrics.summary(cohort_counts=np.array([1, 2]), path=tmp_path)
    assert of(tmp_path, "step")[0]["loss"] == 1.5
    assert of(tmp_path, "step")[0]["tokens"] == 7
    assert of(tmp_path, "end")[0]["cohort_counts"] == [1, 2]


def test_a_record_can_be_read_as_soon_as_it_is_written(tmp_path: Path) -> None:
    with Metrics(tmp_path, total_steps=5, console=plain()) as metrics:
        run_steps(metrics, range(1, 2))
        assert len(of(tmp_path, "step")) == 1


def test_memory_is_the_maximum_communication_the_mean_and_the_rest_the_last_value(tmp_path: Path) -> None:
    with Metrics(tmp_path, total_steps=3, console=plain()) as metrics:
        run_steps(metrics, range(1, 2), memory_bytes=1, comm_bytes=1, epoch=0.1)
        run_steps(metrics, range(2, 3), memory_bytes=9, comm_bytes=2, epoch=0.2)
        run_steps(metrics, range(3, 4), memory_bytes=5, comm_bytes=6, epoch=0.3)
    last = of(tmp_path, "step")[-1]
    assert (last["memory_bytes"], last["comm_bytes"], last["epoch"]) == (9, 4, 0.3)


def test_turnover_is_replaced_over_active(tmp_path: Path) -> None:
    with Metrics(tmp_path, total_steps=30, console=plain()) as metrics:
        reallocate(metrics, 25, 2)
    (record,) = of(tmp_path, "reallocation")
    assert record["turnover"] == 0.032
    assert record["cohort_counts"] == [0, 968, 32]


def test_the_tracker_gets_finite_numbers_at_their_step(tmp_path: Path) -> None:
    tracked: list[tuple[dict[str, float], int]] = []
    track = lambda values, step: tracked.append((values, step))
    with Metrics(tmp_path, total_steps=20, track=track, console=plain()) as metrics:
        metrics.evaluation(0, loss=2.0, perplexity=math.nan, target_tokens=5, seconds=1.0)
        run_steps(metrics, range(1, 11))
        reallocate(metrics, 10, 1)
    (evaluated, at_0), (first, at_1), (_, at_10), (reallocated, _) = tracked
    assert (at_0, at_1, at_10) == (0, 1, 10)
    assert evaluated == {"eval/loss": 2.0, "eval/target_tokens": 5.0, "eval/seconds": 1.0}
    assert first["train/loss"] == 1.0
    assert reallocated["reallocation/turnover"] == 0.032
    assert all(isinstance(value, float) for values, _ in tracked for value in values.values())


def test_a_log_file_gets_plain_lines_without_control_codes(tmp_path: Path) -> None:
    console = plain()
    with Metrics(tmp_path, total_steps=40, console=console) as metrics:
        with metrics.phase("loading the base"):
            pass
        metrics.describe("SFT-AG", {"base": "x" * 100}, [{"weights": "q_proj", "count": "8"}])
        run_steps(metrics, range(1, 26))
        reallocate(metrics, 25, 2)
        run_steps(metrics, range(26, 31))
        metrics.evaluation(30, loss=1.2, perplexity=3.3, target_tokens=5, seconds=12.0, exact_match=0.25)
        metrics.note("adapter [saved]")
        metrics.summary()
    lines = console.file.getvalue().splitlines()
    assert not any(ord(character) < 32 for line in lines for character in line)
    assert "  base  " + "x" * 100 in lines
    assert "loading the base ..." in lines
    assert "adapter [saved]" in lines
    assert [line.split()[1] for line in lines if line.startswith("step ") and "/40" in line] == [
        "1/40",
        "10/40",
        "20/40",
        "30/40",
    ]
    (step_30,) = [line for line in lines if line.startswith("step 30/40")]
    assert step_30.startswith("step 30/40  loss 25.500  lr 8.1e-03  10,000 tok/s  turnover 3.2%  eta 0:")
    assert "step 25  reallocation 2  replaced 32 of 1,000 (3.2%)  in 0.20 s" in lines
    assert "step 30  held-out loss 1.2000  perplexity 3.30  exact match 25.0%  in 0:12" in lines


def test_a_terminal_has_one_bar_and_no_line_per_step(tmp_path: Path) -> None:
    console = terminal()
    with Metrics(tmp_path, total_steps=20, console=console) as metrics:
        metrics.describe("SFT-AG", {"base": "llama"}, [{"weights": "q_proj", "count": "8"}])
        with metrics.phase("loading"):
            pass
        run_steps(metrics, range(1, 21))
        with metrics.phase("evaluating"):
            pass
        metrics.summary()
    shown = console.file.getvalue()
    assert "20/20" in shown
    assert "eta" in shown
    assert "step 10/20  loss" not in shown
    assert shown.count("\x1b[?25l") == shown.count("\x1b[?25h"), "a hidden cursor must be shown again"


@pytest.mark.parametrize("width", [50, 66, 80, 200])
def test_the_bar_fits_any_terminal_and_keeps_step_and_remaining_time(tmp_path: Path, width: int) -> None:
    console = terminal(width)
    with Metrics(tmp_path, total_steps=20_000, console=console) as metrics:
        reallocate(metrics, 0, 1)
        run_steps(metrics, range(1, 3), tokens=1_000_000)
    last = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", console.file.getvalue()).rstrip().splitlines()[-1]
    assert len(last) <= width
    assert "2/20000" in last
    assert re.search(r"eta \d+:\d\d", last)


@pytest.mark.parametrize("console", [plain(), terminal()])
def test_a_failing_phase_passes_its_error_on(tmp_path: Path, console: Console) -> None:
    metrics = Metrics(tmp_path, total_steps=1, console=console)
    with pytest.raises(KeyError, match="missing"), metrics, metrics.phase("loading"):
        raise KeyError("missing")


def test_a_broken_line_that_is_not_the_last_is_an_error_naming_it(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"event": "step", "step": 1}\n{"event": "st\n{"event": "step", "step": 3}\n')
    with pytest.raises(ValueError, match=r"metrics.jsonl, line 2"):
        read_metrics(path)


@pytest.mark.parametrize("torn", [b'{"event": "step", "st', b"12", b'{"loss": "\xe2\x82', b"\0\0\0\0"])
def test_a_torn_last_line_is_ignored(tmp_path: Path, torn: bytes) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"event": "step", "step": 1}\n' + torn)
    assert read_metrics(path) == [{"event": "step", "step": 1}]


def test_null_metrics_take_every_call_of_metrics_and_write_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    public = {name for name, _ in inspect.getmembers(Metrics, inspect.isfunction) if not name.startswith("_")}
    assert public == {name for name, _ in inspect.getmembers(NullMetrics, inspect.isfunction) if name[0] != "_"}
    with NullMetrics() as metrics:
        metrics.describe("title", {"a": "b"}, [{"c": "d"}])
        with metrics.phase("evaluating"):
            run_steps(metrics, range(1, 3), memory_bytes=1)
        reallocate(metrics, 5, 1)
        metrics.evaluation(5, loss=1.0, perplexity=2.0, target_tokens=3, seconds=4.0)
        metrics.summary(total=1)
        metrics.note("nothing")
        metrics.close()
    assert capsys.readouterr().out == ""
