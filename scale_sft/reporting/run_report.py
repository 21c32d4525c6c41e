"""Write `report.html`, one file that needs nothing else, and the same pictures as PNG files next to it."""

import math
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from markupsafe import Markup

from scale_sft.files import write_bytes

from .html import details, heading, listed, page_of, pairs, preformatted, render, section, table, titled
from .plots import PLOTS
from .preference_plots import PREFERENCE_PLOTS
from .records import Run, load_run, overview
from .weight_names import KindOfWeight, by_kind, by_parameter

REPORT_FILE = "report.html"


def write_report(output_dir: Path) -> Path:
    """Write `report.html` and its PNGs from the records of a finished, running or dead run; returns the page's path.

    A picture without data is left out, and removed if an earlier report drew it.

    Raises:
        FileNotFoundError: the folder has no records.
    """
    output_dir = Path(output_dir)
    run = load_run(output_dir)
    sections, missing = [], {}
    preferences = any("reward_chosen" in record or "reward_rejected" in record for record in run.steps)
    for plot in [*PLOTS[:1], *(PREFERENCE_PLOTS if preferences else ()), *PLOTS[1:]]:
        figure = plot.figure(run)
        picture = output_dir / f"{plot.name}.png"
        if isinstance(figure, str):
            picture.unlink(missing_ok=True)
            missing[plot.title] = figure
            continue
        png, svg = render(figure, plot)
        write_bytes(picture, png)
        sections.append(section(plot, svg))
    page = _page(run, sections, missing)
    write_bytes(output_dir / REPORT_FILE, page.encode("utf-8"))
    return output_dir / REPORT_FILE


def _page(run: Run, sections: Sequence[Markup], missing: Mapping[str, str]) -> str:
    written = time.strftime("%Y-%m-%d %H:%M:%S %Z")
    left_out = listed(f"{title}: {reason}." for title, reason in missing.items())
    parts = [
        heading(run.name, f"Sparse fine-tuning with scale_sft. Report of {written}."),
        pairs(overview(run)),
        *sections,
        _kinds(by_kind(run)),
        titled("Left out", left_out) if missing else "",
        _description(run),
        details("Every weight", _weights(run)) if run.per_weight else "",
        details("Configuration", preformatted(run.config_text)) if run.config_text else "",
    ]
    return page_of(f"{run.name}: sparse fine-tuning", parts)


def _description(run: Run) -> Markup | str:
    if run.description is None:
        return ""
    rows, kinds = run.description.get("rows") or {}, run.description.get("table") or []
    columns = list(dict.fromkeys(name for row in kinds for name in row))
    content = pairs(rows)
    if columns:
        content += table(columns, ([row.get(name, "") for name in columns] for row in kinds))
    return details(run.description.get("title") or "What was trained", content)


def _kinds(kinds: Mapping[str, KindOfWeight]) -> Markup | str:
    if not kinds:
        return ""
    columns = ["module", "weights", "entries", "active", "density", "L2 norm of deltas", "largest |delta|"]
    rows = (
        [
            name,
            f"{kind.weights:,}",
            f"{kind.numel:,}",
            f"{kind.active:,}",
            f"{kind.active / kind.numel:.3%}" if kind.numel else "",
            _figures(kind.square_delta**0.5),
            _figures(kind.max_abs_delta),
        ]
        for name, kind in kinds.items()
    )
    return titled("Deltas by kind of module", table(columns, rows))


def _weights(run: Run) -> Markup:
    columns = ["weight", "entries", "active", "L2 norm of deltas", "largest |delta|"]
    rows = (
        [
            f"{name} ({weight.weights} experts)" if weight.weights > 1 else name,
            f"{weight.numel:,}",
            f"{weight.active:,}",
            _figures(weight.square_delta**0.5),
            _figures(weight.max_abs_delta),
        ]
        for name, weight in by_parameter(run).items()
    )
    return table(columns, rows)


def _figures(value: float | None) -> str:
    return "" if value is None or math.isnan(value) else f"{value:.4g}"
