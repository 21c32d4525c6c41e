"""The command that measures a GPU in one go: `scale-sft bench gpu`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click

from scale_sft.config.click_options import Several, flattened, option


@click.command()
@click.option(
    "--budget",
    type=click.FloatRange(min=1),
    default=540,
    show_default=True,
    help="Seconds for everything; sections that no longer fit are skipped.",
)
@click.option(
    "--only", "names", type=Several(click.STRING), multiple=True, help="Sections; separate several with commas."
)
@click.option("--dry-run", is_flag=True, help="Run every section at tiny sizes on the CPU, as without a GPU.")
@click.option("--layers", type=click.IntRange(min=1), default=4, show_default=True, help="Layers of Llama 7B.")
@option(
    "--max_length",
    "length",
    also=["--max-length"],
    type=click.IntRange(min=2),
    default=2048,
    show_default=True,
    help="Tokens per sequence.",
)
@option(
    "--micro_batch_size",
    "micro_batch",
    also=["--micro-batch-size"],
    type=click.IntRange(min=1),
    default=4,
    show_default=True,
    help="Sequences per step; fewer on a small GPU.",
)
@option(
    "--output_dir",
    "output",
    also=["--output-dir", "--out"],
    type=click.Path(file_okay=False, path_type=Path),
    envvar="OUT",
    default=Path("bench_results"),
    show_default=True,
    help="Folder of gpu.jsonl, to which rows are appended; default: the environment's OUT, or",
)
@click.pass_context
def gpu(context: click.Context, budget: float, names: tuple, dry_run: bool, output: Path, **sizes: Any) -> None:
    r"""Measure all that matters about training on this GPU, the most valuable first, within --budget seconds.

    Sections: device, kernels, step, cycle, parts, demo, demo_again, demo_cpu, memory, memory_lora, four_bits,
    low_density, reallocation, attention, repeated, deterministic, vocabulary, checkpointing, compiled.

    Each runs in a process of its own: a crash, a hang or a lack of memory costs that section only. Rows are printed and
    stored at once. The exit status is 1 if a section failed.

    \b
    scale-sft bench gpu
    scale-sft bench gpu --budget 200 --only step,cycle --micro_batch_size 1
    scale-sft bench gpu --dry-run
    """
    import torch

    from scale_sft.bench.gpu.campaign import Campaign
    from scale_sft.bench.gpu.lab import DRY, Sizes
    from scale_sft.bench.gpu.sections import chosen
    from scale_sft.bench.rows import Results

    sections = chosen(flattened(names))
    on_gpu = not dry_run and torch.cuda.is_available()
    if not on_gpu and not dry_run:
        click.echo("there is no GPU: tiny sizes on the CPU, whose figures mean nothing", err=True)
    campaign = Campaign(Results(output, "gpu"), Sizes(**sizes) if on_gpu else DRY, budget=budget, on_gpu=on_gpu)
    for row in campaign.run(sections):
        shown: dict[str, Any] = {"section": row["settings"]["section"], "what": row["settings"]["what"]}
        click.echo(json.dumps({**shown, **row["result"]}, ensure_ascii=False))
    click.echo(f"rows: {campaign.results.path}", err=True)
    if campaign.failed:
        click.echo(f"failed: {', '.join(campaign.failed)}", err=True)
        context.exit(1)


COMMANDS = (gpu,)
