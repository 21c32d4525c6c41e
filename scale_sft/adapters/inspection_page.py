"""An inspected adapter on paper: a console table, and one HTML page with pictures."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from markupsafe import Markup
from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table

from scale_sft.files import write_text
from scale_sft.model.coverage import Coverage
from scale_sft.reporting.html import details, heading, page_of, pairs, picture, table, titled
from scale_sft.reporting.plots import Plot
from scale_sft.reporting.spread import SPREAD_CAPTION, draw_spread
from scale_sft.reporting.style import BLUE, WIDTH_INCHES, heat_map
from scale_sft.reporting.weight_names import kind_of, layer_of
from scale_sft.spiel.selection.spread import FRACTIONS

from .inspection import Inspection, WeightFacts

_COLUMNS = ("weights", "active", "density", "norm", "largest", "in 1 % of rows", "in 1 % of columns")


def print_inspection(found: Inspection, console: Console | None = None) -> None:
    """Print provenance and tables on the console."""
    console = console or Console(width=120, highlight=False)
    for name, value in facts(found).items():
        console.print(f"[bold]{name}[/]: {value}", soft_wrap=True)
    for title, rows in (("layer", found.by_layer), ("kind", found.by_kind)):
        shown = Table(title, *_COLUMNS, show_edge=False)
        for column in shown.columns[1:]:
            column.justify = "right"
        for name, one in [*rows.items(), ("all", found.total)]:
            shown.add_row(name, *_cells(one))
        console.print(shown)
    moved = Table("most moved weights", "row", "column", "delta", show_edge=False)
    for entry in found.moved:
        moved.add_row(entry["weight"], str(entry["row"]), str(entry["column"]), f"{entry['delta']:+.4g}")
    console.print(moved)


def write_page(found: Inspection, path: Path) -> None:
    """Write one self-contained HTML file with pictures."""
    parts = [heading("Adapter"), pairs(facts(found))]
    plots = [
        Plot("magnitudes", "Magnitudes of the deltas", "", lambda _: magnitudes(found)),
        Plot("density", "Density and size of the deltas by layer", "", lambda _: densities(found)),
        Plot("spread", "Where the entries are", SPREAD_CAPTION, lambda _: _spread(found)),
    ]
    parts += [picture(plot) for plot in plots]
    for title, rows in (("Layers", found.by_layer), ("Kinds of module", found.by_kind)):
        parts.append(titled(title, _html_rows(rows)))
    moved = ([e["weight"], str(e["row"]), str(e["column"]), f"{e['delta']:+.4g}"] for e in found.moved)
    parts.append(titled("Most moved", table(["weight", "row", "column", "delta"], moved)))
    parts.append(details("Every weight", _html_rows(found.by_parameter)))
    write_text(path, page_of(f"{found.folder}: adapter", parts))


def facts(found: Inspection) -> dict[str, str]:
    """Collect provenance and the main figures, by name."""
    info, total = found.info, found.total
    quantiles = "  ".join(f"{float(q):.0%} {value:.3g}" for q, value in found.quantiles.items())
    rows = {
        "adapter": found.folder,
        "base": f"{info['base']}" + (f", revision {info['revision']}" if info.get("revision") else ""),
        "hash of the base's target weights": info["base_hash"][:16],
        "dtype of the base": info["dtype"],
        **_reach(info),
        "method": info.get("method"),
        "granularity": f"whole {info['granularity']}s" if "granularity" in info else None,
        "made from": info.get("made_from"),
        "scale_sft": info.get("scale_sft_version"),
        "entries": f"{total.active:,} of {total.numel:,} in {total.weights} weights ({total.density:.3%})",
        "norm of all deltas": f"{total.norm:.4g}",
        "|delta| at quantiles": quantiles,
        "deltas visible in bfloat16": f"{visible:.1%}"
        if (visible := info.get("visible_in_bfloat16")) is not None
        else None,
        "deltas that are 0": f"{total.zeros:,}" if total.zeros else None,
    }
    return {name: str(value) for name, value in rows.items() if value is not None}


def _reach(info: dict[str, Any]) -> dict[str, str]:
    """Say what share of the base's blocks the adapter's training reached, where it was recorded."""
    return {"reach": Coverage.of_document(info["block_weights"]).line()} if "block_weights" in info else {}


def magnitudes(found: Inspection) -> Figure:
    """Draw a histogram of |delta| over a logarithmic axis."""
    figure = Figure(figsize=(WIDTH_INCHES, 2.8), layout="constrained")
    ax = figure.subplots()
    values = found.sample[found.sample > 0].numpy()
    if len(values):
        ax.hist(values, bins=np.geomspace(values.min(), values.max() * 1.0001, 60).tolist(), color=BLUE)
        ax.set_xscale("log")
    ax.set_xlabel("|delta|")
    ax.set_ylabel("entries (sampled)")
    return figure


def densities(found: Inspection) -> Figure:
    """Draw density and size of the deltas by layer and kind of module."""
    kinds = kind_of(found.by_parameter)
    layers = sorted({layer_of(name) for name in found.by_parameter}, key=lambda n: -1 if n is None else n)
    names = list(dict.fromkeys(kinds.values()))
    grids = {key: np.full((len(names), len(layers)), np.nan) for key in ("density", "size")}
    for name, one in found.by_parameter.items():
        place = names.index(kinds[name]), layers.index(layer_of(name))
        grids["density"][place] = 100 * one.density
        grids["size"][place] = one.norm / max(1, one.active) ** 0.5
    figure = Figure(figsize=(WIDTH_INCHES, 1.4 + 0.56 * len(names)), layout="constrained")
    above, below = figure.subplots(2, sharex=True)
    labels = ["-" if layer is None else str(layer) for layer in layers]
    heat_map(above, grids["density"], labels, names, "density", " %")
    heat_map(below, grids["size"], labels, names, "root mean square of the deltas", "")
    below.set_xlabel("layer")
    return figure


def _spread(found: Inspection) -> Figure:
    weights = {name: (one.active, one.spread_rows, one.spread_columns) for name, one in found.by_parameter.items()}
    return draw_spread(FRACTIONS, weights)


def _cells(one: WeightFacts) -> list[str]:
    return [
        f"{one.weights:,}", f"{one.active:,}", f"{one.density:.3%}", f"{one.norm:.4g}", f"{one.largest:.4g}",
        f"{one.top_rows:.1%}", f"{one.top_columns:.1%}",
    ]  # fmt: skip


def _html_rows(rows: dict[str, WeightFacts]) -> Markup:
    return table(["", *_COLUMNS], ([name, *_cells(one)] for name, one in rows.items()))
