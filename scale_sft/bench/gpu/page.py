"""Tables of `scale-sft bench gpu`: steps, and everything else that was measured, for each GPU."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from scale_sft.bench.page import Part, Table
from scale_sft.bench.rows import Row, last_run, machine_name

STEP_COLUMNS = ("section", "contestant", "trained", "ms per step", "x frozen", "also")
FACT_COLUMNS = ("section", "measured", "figures")
_IN_COLUMNS = ("ms", "over_frozen", "trained", "quartiles_ms", "fused")
_UNSEEN = ("traceback",)


def part(rows: Sequence[Row]) -> Part:
    """Show the newest invocation on each machine: a table of steps, and a table of all other figures."""
    machines: dict[str, list[Row]] = {}
    for row in rows:
        machines.setdefault(_title(row), []).append(row)
    tables = []
    for title, of_machine in machines.items():
        shown = [row for row in last_run(of_machine) if not row["result"].keys() <= {"took_seconds"}]
        steps = [row for row in shown if "over_frozen" in row["result"]]
        facts = [row for row in shown if "over_frozen" not in row["result"]]
        tables += [Table(STEP_COLUMNS, list(map(_step, steps)), steps, title)] if steps else []
        other = f"{title}: other figures"
        tables += [Table(FACT_COLUMNS, list(map(_fact, facts)), facts, other, words=True)] if facts else []
    return Part(
        title="On a GPU",
        text=(
            "The frozen step computes the forward pass and the gradients of the inputs, the cost that no adapter can "
            "avoid. Contestants take turns, and a ratio is the median over rounds; in section cycle a step is the mean "
            "over whole cycles of reallocation, which is what a user pays. LoRA has as many trained weights as the "
            "sparse deltas."
        ),
        tables=tables,
    )


def _title(row: Row) -> str:
    sizes = row["settings"]["sizes"]
    if sizes.get("tiny"):
        return f"A dry run at tiny sizes, whose figures mean nothing: {machine_name(row['machine'])}"
    shape = f"{sizes['layers']} layers of 7B's shape, {sizes['micro_batch']} x {sizes['length']:,} tokens"
    return f"{shape}, bf16, density {sizes['density']:g}: {machine_name(row['machine'])}"


def _step(row: Row) -> list[str]:
    settings, result = row["settings"], row["result"]
    also = {name: value for name, value in result.items() if name not in _IN_COLUMNS and value is not None}
    trained = f"{result['trained']:,}" if "trained" in result else ""
    return [
        settings["section"], settings["what"], trained, f"{result['ms']:,.1f}", f"{result['over_frozen']:.2f}",
        _said(also),
    ]  # fmt: skip


def _fact(row: Row) -> list[str]:
    settings = row["settings"]
    return [settings["section"], settings["what"], _said(row["result"])]


def _said(figures: Mapping[str, Any]) -> str:
    """Write figures as 'name value, name value'."""
    return ", ".join(
        f"{name.replace('_', ' ')} {_value(value)}" for name, value in figures.items() if name not in _UNSEEN
    )


def _value(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:,.4g}" if abs(value) < 1000 else f"{value:,.0f}"
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, Mapping):
        return f"({_said(value)})"
    if isinstance(value, list):
        return f"({', '.join(map(_value, value))})"
    return str(value)
