"""`scale-sft checkpoint`: list and verify what a run has saved."""

from __future__ import annotations

import sys
from pathlib import Path

import click

from .commands import Commands


@click.group(cls=Commands)
def checkpoint() -> None:
    r"""List and verify the checkpoints of a run.

    \b
    scale-sft checkpoint ls runs/mine
    """


@checkpoint.command("ls")
@click.argument("folder", type=click.Path(path_type=Path))
def checkpoint_ls(folder: Path) -> None:
    r"""List the checkpoints in FOLDER (a run, its checkpoints/ or one of them); checks sizes, not checksums.

    \b
    scale-sft checkpoint ls runs/mine
    """
    from scale_sft.training.checkpoint_listing import checkpoints_in, table

    click.echo(table(checkpoints_in(folder), "complete (sizes)"))


@checkpoint.command("verify")
@click.argument("folder", type=click.Path(path_type=Path))
def checkpoint_verify(folder: Path) -> None:
    r"""Read the checkpoints in FOLDER completely and compare checksums; exits with status 1 if one is damaged.

    \b
    scale-sft checkpoint verify runs/mine
    """
    from scale_sft.training.checkpoint_listing import checkpoints_in, table, verified

    found = [verified(one) for one in checkpoints_in(folder)]
    click.echo(table(found, "complete (checksums)"))
    if any(one.problem for one in found):
        sys.exit(1)


COMMANDS = (checkpoint,)
