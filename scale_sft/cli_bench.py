"""The commands that measure: `scale-sft bench ...`."""

from __future__ import annotations

from pathlib import Path

import click

from . import cli_bench_quality, cli_bench_step

_OUTPUT = click.option(
    "--output",
    type=click.Path(file_okay=False, path_type=Path),
    default=Path("bench_results"),
    show_default=True,
    help="Folder of the results: rows are appended to its files, its page is written anew.",
)


@click.group()
def bench() -> None:
    """Measure this trainer beside its peers: same model, data, dtype, batch and machine, in one run.

    Contestants take turns, so that a machine that is busy with other work slows all of them. Each command appends JSON
    rows (machine, versions, commit, command) to a file and writes one HTML page with tables and plots.
    """


@bench.command()
@click.argument("folder", type=click.Path(exists=True, file_okay=False, path_type=Path))
def page(folder: Path) -> None:
    """Write bench.html for the rows in FOLDER."""
    from .bench.page import write_page

    click.echo(f"page: {write_page(folder)}")


for _command in (*cli_bench_step.COMMANDS, *cli_bench_quality.COMMANDS):
    bench.add_command(_command)

@bench.command()
@_OUTPUT
@click.option("--ranks", default="1,2,4", show_default=True, help="Numbers of ranks on this machine, by commas.")
@click.option("--sharded/--replicated", default=False, show_default="replicated", help="Where the base lies (ZeRO-3).")
@click.option("--weak/--strong", default=True, show_default="weak", help="Same batch for each rank, or of all ranks.")
@click.option("--batch", type=click.IntRange(min=1), default=4, show_default=True, help="Sequences of that batch.")
@click.option("--base", default="demo", show_default=True, help="A model folder or hub id, or the embedded base.")
@click.option("--data", default="demo", show_default=True, help="Training data, as train_data of a run.")
@click.option("--max-length", type=click.IntRange(min=2), default=128, show_default=True, help="Tokens of a sequence.")
@click.option("--method", type=click.Choice(["ag", "ma", "static"]), default="ag", show_default=True)
@click.option("--density", type=click.FloatRange(0, 1, min_open=True), default=0.02, show_default=True)
def scale(output: Path, ranks: str, weak: bool, **options) -> None:
    """Time, memory and traffic of a step on several ranks, and a model of larger worlds beside them.

    Each number of ranks is a run of its own, started by `accelerate launch` as a user would; figures are its own.

    \b
    scale-sft bench scale --ranks 1,2
    scale-sft bench scale --ranks 2 --sharded --strong --batch 8
    """
    from .bench import scale as module
    from .bench.show import numbers, report

    counts = sorted(int(count) for count in numbers("--ranks", ranks, low=0, high=1024))
    worlds = module.Worlds(strong=not weak, **options)
    module.check(worlds, counts)
    count = len(counts) + sum(n > max(counts) for n in module.PREDICTED_RANKS)
    report(output, "scale", module.run(worlds, counts), count=count, columns=module.COLUMNS, cells=module.cells)


COMMANDS = (bench,)
