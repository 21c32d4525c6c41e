"""Options shared by several `scale-sft bench` commands."""

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
    help="Folder of results; rows are appended to its files, and its page is rewritten.",
)


def several(
    name: str, variable: str, one: click.ParamType, default: str, told: str, also: Sequence[str] = ()
) -> Callable:
    """Make an option that takes several values, separated by commas."""
    return option(
        name, variable, also=also, type=Several(one), multiple=True, default=[default], show_default=True,
        help=f"{told}; separate several with commas.",
    )  # fmt: skip


_OF_CASES = (
    click.option(
        "--base",
        help="Model folder or hub id; a folder with only a config.json gets random weights. "
        "Default: a random Llama of 6 layers, 512 wide.",
    ),
    several("--dtype", "dtypes", click.Choice(["bfloat16", "float32"]), "bfloat16,float32", "Dtype of the base"),
    several(
        "--quantization",
        "quantizations",
        click.Choice(["none", "nf4", "fp4", "int8"]),
        "none",
        "Keep the base in 4 or 8 bits",
    ),
    several(
        "--max_length", "lengths", click.IntRange(min=2), "128", "Tokens per sequence", ["--max-length", "--length"]
    ),
    several(
        "--micro_batch_size",
        "micro_batches",
        click.IntRange(min=1),
        "32",
        "Sequences per step",
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
        help="Rank of LoRA; our methods train as many parameters.  [default: 16]",
    ),
    click.option(
        "--density",
        type=click.FloatRange(min=0, max=1, min_open=True),
        help="Fraction of each target weight to train, instead of a rank; LoRA gets the nearest rank.",
    ),
)


def with_cases(function: Callable) -> Callable:
    """Add the options that choose the cases of a comparison; `cases_from` reads them."""
    for decorate in reversed(_OF_CASES):
        function = decorate(function)
    return function


def cases_from(*, rank: int | None, density: float | None, **asked) -> list:
    """List every combination of the requested settings.

    Raises:
        click.UsageError: both a rank and a density are given.
    """
    from scale_sft.bench.step.race import cases_of

    if rank and density:
        raise click.UsageError("give --rank_equivalent or --density, not both")
    flat: dict[str, Any] = {
        key: flattened(value) if isinstance(value, tuple) else value for key, value in asked.items()
    }
    return cases_of(**flat, rank=None if density else rank or 16, density=density)
