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
    help="Another contestant: a method with other training options, such as ag-8bit=ag,moments=int8; LoRA and full "
    "with those of their optimizer, such as warm=lora,warmup_fraction=0.1. Can be repeated.",
)
@option(
    "--learning_rates",
    "grids",
    also=["--learning-rates"],
    metavar="METHOD=A,B,...",
    multiple=True,
    help="Another grid of learning rates for one contestant. Can be repeated.",
)
@option(
    "--more_rungs",
    also=["--more-rungs"],
    type=click.IntRange(min=0),
    default=3,
    show_default=True,
    help="Rates by which a grid may grow while its best rate is the first or last; a grid of one rate never grows.",
)
@click.option(
    "--task",
    "tasks",
    metavar="NAME=TRAIN,EVAL,KEY=VALUE,...",
    multiple=True,
    help="A task to learn: training data, held-out data, and options of its own. Can be repeated: each task has "
    "its own grids and table. Default: one task, by train_data and eval_data.",
)
@click.option(
    "--retain",
    metavar="NAME=DATA,KEY=VALUE,...",
    multiple=True,
    help="Also measure the loss on other data, before and after training: what the model still knows. In plain text "
    "all tokens count. NAME alone: the held-out data of another --task. Can be repeated.",
)
@click.option(
    "--merging",
    "of_merging",
    is_flag=True,
    help="Then add the adapters of each pair of tasks, and measure both losses of the sum; trains them again.",
)
@click.option(
    "--drift",
    "of_drift",
    is_flag=True,
    help="Then merge each adapter into the base in bfloat16 and unmerge it, 1,000 times, and measure how far the "
    "weights move; trains one run of each again.",
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
    "--jobs",
    type=click.IntRange(min=1),
    help="Simultaneous runs, which share the cores or the GPU; default: one per core, at most 4; 1 on a GPU.",
)
@OUTPUT
@with_options_of("model", "data")
def quality(
    methods: str | None,
    variants: tuple[str, ...],
    grids: tuple[str, ...],
    more_rungs: int,
    tasks: tuple[str, ...],
    retain: tuple[str, ...],
    of_merging: bool,
    of_drift: bool,
    seeds: int,
    validation_examples: int,
    jobs: int | None,
    output: Path,
    recipe: str | None,
    **options: str | int | None,
) -> None:
    r"""Compare the quality of methods, each at its best learning rate: what they learn, and what the model still knows.

    Contestants: random, entries from the seed; static-sampled, fixed entries sampled by balanced score (temperature
    0.5); ag-sampled, SFT-AG that samples its first choice and its growth, with moments from 0; columns and
    columns-sampled, whole columns from the seed or sampled; columns-grown, sampled columns that SFT-AG moves; ag and
    ma, the paper's methods; static, the largest gradients; lora and lora-rs (rank-stabilised) on the same layers, all
    of equal trained weights; ia3; and full, the same layers densely. All see the same batches and the same loss. The
    learning rate rises and falls as in training, but LoRA's has no warm-up: so it ended better. LoRA, ia3 and full
    have AdamW's usual decay rates, 0.9 and 0.999.

    Each tries a grid of rates with one seed, which grows while the best rate is at its end. The best, by the loss on
    --validation_examples held back from the training data, runs with the other seeds. Reported figures come from the
    eval data, which are not used for any choice.

    Without options it trains the small model on the task that ships, in float32: about half an hour on two cores.

    \b
    scale-sft bench quality
    scale-sft bench quality --base models/a --train_data a.jsonl --eval_data b.jsonl --rank_equivalent 16 --steps 500
    scale-sft bench quality --methods ag,lora --variant ag-8bit=ag,moments=int8
    scale-sft bench quality --base models/a --task maths=a.jsonl,b.jsonl --task qa=c.jsonl,d.jsonl,max_length=256 \
        --retain maths --retain qa --retain news=news.txt

    Every finished run is a row in OUTPUT_DIR/quality.jsonl (merging.jsonl, drift.jsonl) and is not repeated: after
    Ctrl-C the same command resumes. quality.csv holds the tables. Runs share the machine, so compare their seconds only
    with each other.
    """
    from scale_sft.bench.page import write_page
    from scale_sft.bench.quality import measure as benchmark
    from scale_sft.bench.quality.contestants import choose
    from scale_sft.bench.quality.extras import measure_extras, refuse_impossible
    from scale_sft.bench.quality.tasks import read_retained, read_tasks

    chosen = read_tasks(tasks)
    settings = benchmark.Settings(
        contestants=choose(methods.split(",") if methods else [], variants, grids),
        recipe=recipe,
        options=options,
        seeds=seeds,
        validation_examples=validation_examples,
        tasks=chosen,
        retained=read_retained(retain, chosen),
        more_rungs=more_rungs,
    )
    refuse_impossible(settings, of_merging=of_merging, of_drift=of_drift)
    processes = jobs or benchmark.default_processes()
    try:
        rows = benchmark.measure(settings, output, processes=processes, say=click.echo)
        measure_extras(
            settings, rows, output, of_merging=of_merging, of_drift=of_drift, processes=processes, say=click.echo
        )
    except KeyboardInterrupt:
        raise UserError(f"interrupted; finished runs are in {output}: the same command resumes") from None
    for task, tables, remarks in benchmark.report(rows):
        for title, (columns, lines) in tables:
            click.echo(f"\n{title or task}".rstrip())
            _print([columns, *lines])
        for remark in remarks:
            click.echo(remark)
    click.echo(f"page: {write_page(output)}, table: {benchmark.write_csv(output)}")


def _print(lines: list[list[str]]) -> None:
    """Print a table whose first line is its columns: the first left-aligned, all others right-aligned."""
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    for first, *others in lines:
        numbers = (cell.rjust(width) for cell, width in zip(others, widths[1:], strict=True))
        click.echo("  ".join([first.ljust(widths[0]), *numbers]))


COMMANDS = (quality,)
