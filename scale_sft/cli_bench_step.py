"""`scale-sft bench step`: one optimizer step of each contestant in turn."""

from __future__ import annotations

from pathlib import Path

import click

from .options import Several, flattened


@click.command()
@click.option(
    "--base",
    help="Model folder or hub id; a folder of nothing but config.json gets random weights. "
    "Default: a random Llama of 6 layers, 512 wide.",
)
@click.option(
    "--dtype",
    "dtypes",
    type=Several(click.Choice(["bfloat16", "float32"])),
    multiple=True,
    default=["bfloat16,float32"],
    show_default=True,
    help="Of the base; several with commas.",
)
@click.option(
    "--quantization",
    "quantizations",
    type=Several(click.Choice(["none", "nf4", "fp4", "int8"])),
    multiple=True,
    default=["none"],
    show_default=True,
    help="Keep the base in 4 or 8 bits; several with commas.",
)
@click.option(
    "--length",
    "lengths",
    type=Several(click.IntRange(min=2)),
    multiple=True,
    default=["256"],
    show_default=True,
    help="Tokens of a sequence; several with commas.",
)
@click.option(
    "--micro-batch",
    "micro_batches",
    type=Several(click.IntRange(min=1)),
    multiple=True,
    default=["4"],
    show_default=True,
    help="Sequences of a step; several with commas.",
)
@click.option(
    "--gradient-checkpointing/--no-gradient-checkpointing",
    default=False,
    show_default=True,
    help="Recompute each block in the backward pass.",
)
@click.option("--rank", type=click.IntRange(min=1), help="Rank of LoRA; ours train as many parameters.  [default: 16]")
@click.option(
    "--density",
    type=click.FloatRange(min=0, max=1, min_open=True),
    help="Instead of a rank: fraction of each target weight; LoRA gets the nearest rank.",
)
@click.option(
    "--contestants",
    "names",
    type=Several(click.STRING),
    multiple=True,
    help="Some of ours-ag, ours-ma, ours-static, peft-lora, peft-lora-bf16, peft-ia3, peft-shira, full, "
    "full-adamw, frozen; several with commas.  [default: all]",
)
@click.option(
    "--kernels",
    type=click.Choice(["off", "auto"]),
    default="off",
    show_default=True,
    help="Of ours, as in a run: auto takes the fastest kernels of a GPU.",
)
@click.option("--rounds", type=click.IntRange(min=1), default=8, show_default=True, help="Steps of each contestant.")
@click.option(
    "--warm-up",
    "warm_up_steps",
    type=click.IntRange(min=0),
    default=2,
    show_default=True,
    help="Steps of each contestant that do not count.",
)
@click.option(
    "--breakdown/--no-breakdown", default=True, show_default=True, help="Time the pieces of our steps as well."
)
@click.option(
    "--together/--one-by-one",
    default=None,
    help="All contestants stay in memory, or each is made anew in each round.  [default: together where they fit]",
)
@click.option("--threads", type=click.IntRange(min=1), help="Of torch on a CPU.  [default: torch's]")
@click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True, help="Of weights, data and order.")
@click.option(
    "--output",
    type=click.Path(file_okay=False, path_type=Path),
    default=Path("bench_results"),
    show_default=True,
    help="Folder of the results: rows are appended to its files, its page is written anew.",
)
def step(
    names: tuple, rounds: int, warm_up_steps: int, breakdown: bool, together: bool | None, threads: int | None,
    rank: int | None, density: float | None, output: Path, **asked,
) -> None:  # fmt: skip
    """Time one optimizer step: ours, PEFT's adapters, dense fine-tuning, and the floor of any adapter.

    \b
    scale-sft bench step
    scale-sft bench step --dtype bfloat16 --length 512 --contestants ours-ag,peft-lora,full
    """
    import torch
    from rich.console import Console

    from .bench.page import write_page
    from .bench.rows import read_rows
    from .bench.step import Effort, cases_of, run

    if rank and density:
        raise click.UsageError("give --rank or --density, not both")
    if threads:
        torch.set_num_threads(threads)
    flat = {key: flattened(value) if isinstance(value, tuple) else value for key, value in asked.items()}
    cases = cases_of(**flat, rank=None if density else rank or 16, density=density)
    effort = Effort(rounds=rounds, warm_up_steps=warm_up_steps, breakdown=breakdown, together=together)
    try:
        run(cases, flattened(names) or None, effort, output, Console(width=110, highlight=False))
    except KeyboardInterrupt:
        if read_rows(output, "step"):
            click.echo(f"rows of the finished rounds are in {write_page(output)}")
        raise
    click.echo(f"page: {write_page(output)}")


COMMANDS = (step,)
