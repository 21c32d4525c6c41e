"""The benchmark commands: `scale-sft bench ...`."""

from __future__ import annotations

from pathlib import Path

import click

from . import bench_cost as cli_bench_cost
from . import bench_gpu as cli_bench_gpu
from . import bench_quality as cli_bench_quality
from . import bench_step as cli_bench_step
from .commands import Commands


@click.group(cls=Commands)
def bench() -> None:
    """Compare this trainer with its peers: same model, data, dtype, batch and machine, in one run.

    Contestants take turns, so that other work on the machine slows all of them alike. Each command appends JSON rows
    (machine, versions, commit, command) to a file and writes one HTML page with tables and plots.
    """


@bench.command()
@click.argument("folder", type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.option(
    "--markdown",
    type=click.Path(dir_okay=False, path_type=Path),
    help="Also write the tables to this Markdown file, followed by notes.md of FOLDER.",
)
def page(folder: Path, markdown: Path | None) -> None:
    r"""Write bench.html, with tables and plots, from the rows in FOLDER.

    \b
    scale-sft bench page bench_results
    scale-sft bench page benchmarks/results --markdown docs/benchmarks.md
    """
    from scale_sft.bench.markdown import write_markdown
    from scale_sft.bench.page import write_page

    click.echo(f"page: {write_page(folder)}")
    if markdown is not None:
        click.echo(f"tables: {write_markdown(folder, markdown)}")


for _module in (cli_bench_step, cli_bench_cost, cli_bench_quality, cli_bench_gpu):
    for _command in _module.COMMANDS:
        bench.add_command(_command)

COMMANDS = (bench,)
