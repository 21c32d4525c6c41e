"""The `scale-sft` command: training, and the steps before and after it."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import click

from scale_sft.errors import UserError
from scale_sft.version import __version__

from . import adapters, arithmetic, bench, chat, checkpoints, data, launch_files, models, plan, recipes, train
from .commands import Commands

_SECTIONS = {
    "Train": ["train", "recipes", "schema"],
    "Before training": ["plan", "preprocess", "data", "models", "launch-files"],
    "During and after a run": ["report", "checkpoint", "eval"],
    "The result, an adapter": ["chat", "merge", "export", "inspect"],
    "Arithmetic with adapters": ["add", "scale", "negate", "intersect", "difference", "prune", "overlap"],
    "Benchmarks": ["bench"],
}


@click.group(cls=Commands, sections=_SECTIONS, context_settings={"max_content_width": 110})
@click.version_option(__version__, prog_name="scale-sft")
def main() -> None:
    r"""Fine-tune large language models sparsely: a frozen base, a few per cent of its weights moved.

    \b
    scale-sft train --config demo            train the small model that ships, in about a minute on a CPU
    scale-sft plan llama2_7b_ag --shape 7b   will it fit?
    scale-sft COMMAND --help                 options and examples of a command
    """
    if not sys.stderr.isatty():  # before libraries read them: no carriage returns in pipes and log files
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
        os.environ.setdefault("TQDM_DISABLE", "1")


for _commands in (train, chat, adapters, arithmetic, recipes, plan, bench, checkpoints, data, models, launch_files):
    for _command in _commands.COMMANDS:
        main.add_command(_command)


@main.command()
@click.argument("run", type=click.Path(path_type=Path))
def report(run: Path) -> None:
    r"""Write report.html and its pictures for RUN, the output folder of a finished, running or dead run.

    \b
    scale-sft report runs/mine
    """
    from scale_sft.reporting.run_report import write_report

    if not (run / "metrics.jsonl").is_file():
        raise UserError(f"report: {run} holds no metrics.jsonl; expected the output folder of a run")
    click.echo(f"report: {write_report(run)}")
