"""Options that several of the `scale-sft bench` commands have."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import click

from scale_sft.config.click_options import Several, flattened, option

OUTPUT = option(
    "--output_dir",
    "output",
    also=["--output-dir", "--output"],
    type=click.Path(file_okay=False, path_type=Path),
    default=Path("bench_results"),
    show_default=True,
    help="Folder of the results: rows are appended to its files, its page is written again.",
)


def several(
    name: str, variable: str, one: click.ParamType, default: str, told: str, also: Sequence[str] = ()
) -> Callable:
    """Make an option that takes several values with commas between them."""
    return option(
        name, variable, also=also, type=Several(one), multiple=True, default=[default], show_default=True,
        help=f"{told}; several with commas.",
    )  # fmt: skip


_OF_CASES = (
    click.option(
        "--base",
        help="Model folder or hub id; a folder of nothing but config.json gets random weights. "
        "Default: a random Llama of 6 layers, 512 wide.",
    ),
    several("--dtype", "dtypes", click.Choice(["bfloat16", "float32"]), "bfloat16,float32", "Of the base"),
    several(
        "--quantization",
        "quantizations",
        click.Choice(["none", "nf4", "fp4", "int8"]),
        "none",
        "Keep the base in 4 or 8 bits",
    ),
    several(
        "--max_length", "lengths", click.IntRange(min=2), "128", "Tokens of a sequence", ["--max-length", "--length"]
    ),
    several(
        "--micro_batch_size",
        "micro_batches",
        click.IntRange(min=1),
        "32",
        "Sequences of a step",
        ["--micro-batch-size", "--micro-batch"],
    ),
    option(
        "--gradient_checkpointing",
        also=["--gradient-checkpointing"],
        type=click.BOOL,
        is_flag=False,
        flag_value="true",
        default="false",
        metavar="[true|false]",
        show_default=True,
        help="Recompute each block in the backward pass.",
    ),
    click.option("--no-gradient-checkpointing", is_flag=True, hidden=True, expose_value=False),  # an earlier spelling
    option(
        "--rank_equivalent",
        "rank",
        also=["--rank-equivalent", "--rank"],
        type=click.IntRange(min=1),
        help="Rank of LoRA; ours train as many parameters.  [default: 16]",
    ),
    click.option(
        "--density",
        type=click.FloatRange(min=0, max=1, min_open=True),
        help="Instead of a rank: fraction of each target weight; LoRA gets the nearest rank.",
    ),
)


def with_cases(function: Callable) -> Callable:
    """Give a command the options that say in which cases contestants are compared; `cases_from` reads them."""
    for decorate in reversed(_OF_CASES):
        function = decorate(function)
    return function


def cases_from(*, rank: int | None, density: float | None, **asked) -> list:
    """Every combination of what was asked for.

    Raises:
        click.UsageError: a rank and a density.
    """
    from scale_sft.bench.step.race import cases_of

    if rank and density:
        raise click.UsageError("give --rank_equivalent or --density, not both")
    flat: dict[str, Any] = {
        key: flattened(value) if isinstance(value, tuple) else value for key, value in asked.items()
    }
    return cases_of(**flat, rank=None if density else rank or 16, density=density)
