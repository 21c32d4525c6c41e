import io
import json
import re
from pathlib import Path

import pytest
from rich.console import Console

from scale_sft.reporting.html import render
from scale_sft.reporting.metrics import Metrics
from scale_sft.reporting.plots import PLOTS
from scale_sft.reporting.records import load_run, overview
from scale_sft.reporting.run_report import write_report
from scale_sft.reporting.weight_names import by_kind, by_layer_and_kind

_EXTERNAL = re.compile(r"""(?:src|href)\s*=\s*["'](?!#|data:)|url\((?!#|["']?data:)|@import|<script|<link""")
_KINDS = ("self_attn.q_proj", "mlp.down_proj")


def record_run(folder: Path, *, reallocations: int = 4, end: bool = True, extra: bool = True) -> None:
    """A run of 40 steps with a reallocation at steps 5, 15, 25, 35."""
    counts = [1000]
    with Metrics(folder, total_steps=40, log_every_steps=2, console=Console(file=io.StringIO())) as metrics:
        metrics.describe("SFT-AG", {"base": "tiny <model>"}, [{"weights": "q_proj", "count": "3"}])
        metrics.evaluation(0, loss=3.0, perplexity=20.1, target_tokens=10, seconds=0.1, exact_match=0.0)
        for step in range(1, 41):
            values = {"memory_bytes": 2**30, "comm_deltas_bytes": 2**20, "comm_seconds": 0.01} if extra else {}
            metrics.step(
                step, loss=3.0 - step / 40, learning_rate=1e-2, grad_norm=1.0, tokens=1000, target_tokens=500,
                seconds=0.1, **values,
            )  # fmt: skip
            number = (step + 5) // 10
            if step % 10 == 5 and number <= reallocations:
                moved = counts[0] if number == 1 else 100
                counts[0 if number == 1 else 1] -= moved
                counts.append(moved)
                metrics.reallocation(
                    step, number=number, active=1000, replaced=moved, grown=moved, dropped=moved, seconds=0.1,
                    cohort_counts=list(counts), cohort_steps=[0, 5, 15, 25, 35][: number + 1],
                )  # fmt: skip
        metrics.evaluation(40, loss=2.0, perplexity=7.4, target_tokens=10, seconds=0.1, exact_match=0.25)
        if end:
            names = [f"model.layers.{layer}.{kind}.weight" for layer in range(3) for kind in _KINDS]
            weight = {"active": 100, "numel": 5000, "cohort_counts": counts, "max_abs_delta": 0.1}
            weight |= {"spread_rows": [0.1, 0.6], "spread_columns": [0.2, 0.7]}
            metrics.summary(
                per_weight={name: {**weight, "l2_delta": 3.0 + i} for i, name in enumerate(names)},
                adapter_bytes=2**20,
                spread_fractions=[0.1, 0.5],
            )


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The report of a finished run."""
    folder = tmp_path_factory.mktemp("finished")
    record_run(folder)
    return write_report(folder)


def pictures(folder: Path) -> set[str]:
    return {path.stem for path in folder.glob("*.png")}


def test_a_finished_run_has_every_picture(finished: Path) -> None:
    assert finished.name == "report.html"
    assert pictures(finished.parent) == {
        "loss", "exact_match", "ages", "survival", "turnover", "per_layer", "spread", "learning_rate", "grad_norm",
        "throughput", "memory", "communication",
    }  # fmt: skip
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in finished.parent.glob("*.png"))
    assert "Left out" not in finished.read_text()


def test_the_report_needs_no_other_file(finished: Path) -> None:
    page = finished.read_text()
    assert page.count("<svg") == len(pictures(finished.parent))
    assert _EXTERNAL.search(page) is None


def test_texts_of_a_run_cannot_become_markup(tmp_path: Path) -> None:
    odd = "<b>&\"'"
    (tmp_path / odd).mkdir()
    with Metrics(tmp_path / odd, total_steps=1, console=Console(file=io.StringIO())) as metrics:
        metrics.describe(odd, {odd: odd}, [{odd: odd}])
        metrics.summary(per_weight={odd: {"active": 1, "numel": 2}}, **{odd: odd})
    (tmp_path / odd / "config.yaml").write_text(f"model: {{base: {json.dumps(odd)}}}")
    page = write_report(tmp_path / odd).read_text()
    assert "<b>" not in page
    assert page.count("&lt;b&gt;&amp;&#34;&#39;") == 12


def test_identifiers_of_one_picture_do_not_reach_into_another(finished: Path) -> None:
    page = finished.read_text()
    clip_paths = re.findall(r'<clipPath id="([^"]+)"', page)
    assert len(clip_paths) == len(set(clip_paths))


def test_the_pictures_follow_the_theme_of_the_reader(finished: Path) -> None:
    page = finished.read_text()
    svgs = "".join(re.findall(r"<svg.*?</svg>", page, flags=re.DOTALL))
    assert "prefers-color-scheme: dark" in page
    assert "var(--ink)" in svgs
    assert "#000000" not in svgs
    assert "#24292f" not in svgs


def test_sections_without_data_are_left_out_with_a_reason(tmp_path: Path) -> None:
    record_run(tmp_path, reallocations=1, extra=False)
    page = write_report(tmp_path).read_text()
    assert pictures(tmp_path).isdisjoint({"ages", "survival", "turnover", "memory", "communication"})
    left_out = page[page.index("Left out") :]
    for title in ("Parameter ages", "Survival", "Turnover", "Memory", "Communication"):
        assert f"<li>{title}: " in left_out


def test_a_dead_run_with_a_torn_line_has_a_report(tmp_path: Path) -> None:
    record_run(tmp_path, end=False)
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b"\n".join(path.read_bytes().split(b"\n")[:15]) + b'\n{"event": "st')
    page = write_report(tmp_path).read_text()
    assert "running, or stopped before its end" in page
    assert "loss" in pictures(tmp_path)


@pytest.mark.parametrize("lines", [0, 2, 4])
def test_a_run_that_has_hardly_begun_has_a_report(tmp_path: Path, lines: int) -> None:
    record_run(tmp_path)
    path = tmp_path / "metrics.jsonl"
    path.write_text("".join(path.read_text().splitlines(keepends=True)[:lines]))
    assert write_report(tmp_path).is_file()


def test_a_folder_without_records_is_an_error_that_names_the_file(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"metrics\.jsonl: not found"):
        write_report(tmp_path)


def test_a_second_report_leaves_no_picture_of_the_first(tmp_path: Path) -> None:
    (tmp_path / "loss.png").write_bytes(b"of an earlier report")
    (tmp_path / "metrics.jsonl").write_text("")
    write_report(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"metrics.jsonl", "report.html"}


def test_null_losses_and_missing_values_are_gaps(tmp_path: Path) -> None:
    record_run(tmp_path)
    path = tmp_path / "metrics.jsonl"
    records = [json.loads(line) for line in path.read_text().splitlines()]
    for record in records:
        if record["event"] in ("step", "eval"):
            record["loss"] = None
        record.pop("grad_norm", None)
        for weight in record.get("per_weight", {}).values():
            weight["l2_delta"] = None
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    assert "L2 norm of deltas" in write_report(tmp_path).read_text()


def test_text_of_the_run_is_escaped(tmp_path: Path) -> None:
    record_run(tmp_path)
    (tmp_path / "config.yaml").write_text("model:\n  base: <img src=x>\n")
    page = write_report(tmp_path).read_text()
    assert "tiny &lt;model&gt;" in page
    assert "<img" not in page


def test_the_overview_tells_before_from_after(tmp_path: Path) -> None:
    record_run(tmp_path)
    (tmp_path / "config.yaml").write_text("model: {base: llama}\nsparse: {method: ag, density: 0.02}\n")
    rows = overview(load_run(tmp_path))
    assert rows["State"] == "finished"
    assert rows["Base"] == "llama"
    assert rows["Budget"] == "2.000% of each target weight"
    assert rows["Active entries"] == "600 of 30,000 (2.000%)"
    assert rows["Optimizer steps"] == "40 of 40"
    assert rows["Held-out loss"] == "3.0000 → 2.0000 (step 0 → 40)"
    assert rows["Exact match"] == "0.0% → 25.0% (step 0 → 40)"
    assert rows["Peak memory"] == "1.00 GiB"
    assert rows["Adapter"] == "1.00 MiB"


def test_wall_time_leaves_out_the_time_between_two_processes(tmp_path: Path) -> None:
    times = {"start": [100, 1000], "step": [110, 1020]}
    records = [
        {"event": event, "step": step, "time": times[event][step], "total_steps": 2, "loss": 1.0}
        for step in (0, 1)
        for event in ("start", "step")
    ]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    run = load_run(tmp_path)
    assert run.wall_seconds == 10 + 20
    assert run.resumed_at == [1]


def test_weights_are_sorted_by_layer_and_kind_and_experts_are_added_up(tmp_path: Path) -> None:
    weight = {"active": 2, "numel": 100, "cohort_counts": [0, 2], "l2_delta": 3.0, "max_abs_delta": 0.5}
    names = [
        "transformer.h.0.attn.c_proj.weight",
        "transformer.h.0.mlp.c_proj.weight",
        "transformer.h.1.mlp.experts.0.w1.weight",
        "transformer.h.1.mlp.experts.1.w1.weight",
        "transformer.wte.weight",
    ]
    record = {"event": "end", "step": 1, "per_weight": dict.fromkeys(names, weight)}
    (tmp_path / "metrics.jsonl").write_text(json.dumps(record) + "\n")
    run = load_run(tmp_path)
    table = by_layer_and_kind(run)
    assert set(table) == {(0, "attn.c_proj"), (0, "mlp.c_proj"), (1, "w1"), (None, "wte")}
    experts = table[1, "w1"]
    assert (experts.weights, experts.active, experts.numel, experts.square_delta) == (2, 4, 200, 18.0)
    assert experts.cohort_counts == (0, 4)
    assert sum(kind.active for kind in by_kind(run).values()) == 10


def test_a_report_of_the_same_records_has_the_same_pictures(finished: Path) -> None:
    (plot,) = [plot for plot in PLOTS if plot.name == "turnover"]
    figures = [plot.figure(load_run(finished.parent)) for _ in range(2)]
    first, second = (render(figure, plot) for figure in figures if not isinstance(figure, str))
    assert first == second
    assert first[0] == (finished.parent / "turnover.png").read_bytes()
