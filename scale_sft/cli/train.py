"""`scale-sft train`: start a run, in this process or in several."""

from __future__ import annotations

import sys

import click

from scale_sft.config.click_options import SuggestingCommand, with_config_options
from scale_sft.errors import UserError


@click.command(cls=SuggestingCommand)
@click.option(
    "--nproc",
    type=click.IntRange(min=1),
    metavar="N",
    help="Start N processes on this machine: one per GPU, or on the CPU without GPUs.  [default: 1]",
)
@with_config_options
def train(recipe: str | None, nproc: int | None, **options: str | None) -> None:
    r"""Fine-tune a causal language model sparsely: freeze the base, train a few per cent of its weights.

    \b
    scale-sft train --config demo
    scale-sft train --config llama2_7b_ag --train_data train.jsonl --output_dir runs/mine --nproc 8
    scale-sft train --base models/small --train_data train.jsonl --density 0.02 --learning_rate 0.01

    Options come from the recipe; any given here win over it. When the run finishes, it prints held-out scores before
    and after tuning, and the paths of adapter, report and merged model. The same command resumes a run that was killed.
    Several machines: see `scale-sft launch-files`.
    """
    if nproc is None or nproc == 1:
        from scale_sft.train import run_and_exit

        run_and_exit(recipe, options)
    from scale_sft.config.loading import load
    from scale_sft.distributed.launcher import launch_here
    from scale_sft.distributed.world import World

    load(recipe, options)  # all mistakes at once, before any process starts
    if World.from_environment().size > 1:
        raise UserError(f"nproc: got {nproc}, but a launcher has already started this process. Fix: leave out --nproc")
    given = [f"--{name}={value}" for name, value in options.items() if value is not None]
    sys.exit(launch_here([*([f"--config={recipe}"] if recipe else []), *given], processes=nproc))


COMMANDS = (train,)
