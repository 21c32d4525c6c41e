"""The command that compares the quality of methods: `scale-sft bench quality`."""

from __future__ import annotations

from pathlib import Path

import click

from scale_sft.config.click_options import SuggestingCommand, option, with_options_of
from scale_sft.errors import UserError

from .bench_options import OUTPUT


@click.command(cls=SuggestingCommand)
@click.option("--methods", metavar="A,B,...", help="Contestants; default: all.")
@click.option(
    "--variant",
    "variants",
    metavar="NAME=METHOD,KEY=VALUE,...",
    multiple=True,
    help="Another contestant: one of our methods with other training options, such as ag-8bit=ours-ag,moments=int8. "
    "Can be repeated.",
)
@option(
    "--learning_rates",
    "grids",
    also=["--learning-rates"],
    metavar="METHOD=A,B,...",
    multiple=True,
    help="Another grid of learning rates for one contestant. Can be repeated.",
)
@click.option("--seeds", type=click.IntRange(min=1), default=3, show_default=True, help="Runs at the best rate.")
@click.option("--steps", type=click.IntRange(min=1), help="Optimizer steps of a run; default: 150, or the recipe's.")
@option(
    "--rank_equivalent",
    also=["--rank-equivalent", "--rank"],
    type=click.IntRange(min=1),
    help="Rank of LoRA; sparse deltas train as many weights. Default: 2 (for the demo, as 64 is for a 7B model), or "
    "the recipe's rank_equivalent.",
)
@option(
    "--global_batch_size",
    also=["--global-batch-size"],
    type=click.IntRange(min=1),
    help="Sequences per step; default: 16, or the recipe's.",
)
@option(
    "--micro_batch_size",
    also=["--micro-batch-size"],
    type=click.IntRange(min=1),
    help="Sequences per forward pass; default: all.",
)
@option(
    "--validation_examples",
    also=["--validation-examples"],
    type=click.IntRange(min=1),
    default=256,
    show_default=True,
    help="Training examples held back to choose the learning rates.",
)
@click.option(
    "--jobs", type=click.IntRange(min=1), help="Simultaneous runs; default: one per core, at most 4; 1 on a GPU."
)
@OUTPUT
@with_options_of("model", "data")
def quality(
    methods: str | None,
    variants: tuple[str, ...],
    grids: tuple[str, ...],
    seeds: int,
    validation_examples: int,
    jobs: int | None,
    output: Path,
    recipe: str | None,
    **options: str | int | None,
) -> None:
    r"""Compare the quality of methods: held-out loss and exact match, each at its best learning rate.

    Contestants: ours-ag, ours-ma, ours-static; random-mask, entries drawn once; peft-lora on the same layers, all of
    equal trained weights; peft-ia3; and full, the same layers densely. All see the same batches, the same loss and the
    same schedule of the learning rate. Each tries a grid of rates with one seed; the best, by the loss on
    --validation_examples held back from the training data, runs with the other seeds. Reported figures come from the
    eval data, which are not used for any choice. The report warns of a best rate at the edge of its grid.

    Without options it trains the small model on the task that ships, in float32: about 10 minutes on two cores.

    \b
    scale-sft bench quality
    scale-sft bench quality --base models/a --train_data a.jsonl --eval_data b.jsonl --rank_equivalent 16 --steps 500
    scale-sft bench quality --methods ours-ag,peft-lora --variant ag-8bit=ours-ag,moments=int8

    Every finished run is a row in OUTPUT_DIR/quality.jsonl and is not repeated: after Ctrl-C the same command resumes.
    Runs share the cores, so compare their seconds only with each other.
    """
    from scale_sft.bench.page import write_page
    from scale_sft.bench.quality import measure as benchmark
    from scale_sft.bench.quality.contestants import choose

    settings = benchmark.Settings(
        contestants=choose(methods.split(",") if methods else [], variants, grids),
        recipe=recipe,
        options=options,
        seeds=seeds,
        validation_examples=validation_examples,
    )
    try:
        rows = benchmark.measure(settings, output, processes=jobs or benchmark.default_processes(), say=click.echo)
    except KeyboardInterrupt:
        raise UserError(f"interrupted; finished runs are in {output}: the same command resumes") from None
    table, remarks = benchmark.report(rows)
    _print(table)
    for remark in remarks:
        click.echo(remark)
    click.echo(f"page: {write_page(output)}")


def _print(lines: list[list[str]]) -> None:
    """Print a table whose first line is its columns: the first left-aligned, all others right-aligned."""
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    for first, *others in lines:
        numbers = (cell.rjust(width) for cell, width in zip(others, widths[1:], strict=True))
        click.echo("  ".join([first.ljust(widths[0]), *numbers]))


COMMANDS = (quality,)
