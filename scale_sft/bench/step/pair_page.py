"""Show the results of `scale-sft bench step --objective dpo`: a table for the console and the page."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from scale_sft.bench.page import Part, Table
from scale_sft.bench.rows import Row, by_case, last_run, machine_name

from .page import describe

PEERS = ("ours-sft", "trl-dpo")
"""The contestants that steps are compared with: our step of sft on the same tokens, and TRL's with a precomputed
reference."""

_NOT_OF_A_CASE = ("contestant", "rounds", "together")


def table_of(rows: Sequence[Row]) -> tuple[list[str], list[list[str]]]:
    """Tabulate the results, one line per row: columns, lines."""
    columns = ["contestant", "trainable", "tokens", "ms per step", "quartiles", *(f"x {peer}" for peer in PEERS)]
    lines = []
    for row in rows:
        result = row["result"]
        low, high = (1e3 * value for value in result["quartiles_seconds"])
        relative = [result["relative"].get(peer) for peer in PEERS]
        lines.append(
            [
                row["settings"]["contestant"],
                f"{result['trainable']:,}",
                f"{result['tokens']:,}" if "tokens" in result else "-",
                f"{1e3 * result['median_seconds']:,.1f}",
                f"{low:,.0f} to {high:,.0f}",
                *(f"{found['median']:.3f}" if found else "-" for found in relative),
                f"{result['peak_bytes'] / 2**20:,.1f}" if "peak_bytes" in result else "-",
            ]
        )
    return [*columns, "peak, MiB"], lines


def part(rows: list[Row]) -> Part:
    """Show each case on each machine as it was last measured there."""
    groups = [last_run(group) for group in by_case(rows, _NOT_OF_A_CASE)]
    return Part(
        title="One optimizer step on pairs",
        text=(
            "Each pair is two sequences of equal length with a common prompt; ours-sft trains on the same sequences. "
            "dpo has its reference precomputed, packed computes each prompt once, and swapped runs the reference in "
            "each step: ours without deltas, TRL without adapters. trl-dpo is TRL's DPOTrainer with LoRA: collate, "
            "training step, clip and update, without callbacks and logs. All update with AdamW and keep what they "
            "train in float32, but TRL in bfloat16 on a quantised base. The peak is the memory that one step adds, "
            "and tokens are those that it computes with gradient."
        ),
        tables=[_table(group) for group in groups],
    )


def _table(group: Sequence[Row]) -> Table:
    columns, lines = table_of(group)
    settings = group[0]["settings"]
    title = f"{_describe(settings)}: {machine_name(group[0]['machine'])}"
    return Table(columns=columns, rows=lines, sources=group, title=title)


def _describe(settings: Mapping[str, Any]) -> str:
    """Describe a case in one line."""
    return f"{describe(settings)}, prompts of {settings['prompt_tokens']} tokens"
