"""The `scale-sft` command: what is done before and after training."""

from __future__ import annotations

import sys
from pathlib import Path

import click

from scale_sft.errors import UserError
from scale_sft.version import __version__

from . import adapters, arithmetic, bench, checkpoints, data, plan, recipes


class Commands(click.Group):
    """A group whose commands end with one line of error, and which names the nearest command to a misspelt one."""

    def invoke(self, ctx: click.Context):
        try:
            return super().invoke(ctx)
        except UserError as error:
            click.echo(f"error: {error}", err=True)
            sys.exit(1)

    def resolve_command(self, ctx: click.Context, args: list[str]):
        from scale_sft.config.spelling import unknown

        if args and self.get_command(ctx, args[0]) is None and not args[0].startswith("-"):
            ctx.fail(unknown(f"command '{args[0]}'", args[0], self.list_commands(ctx)))
        return super().resolve_command(ctx, args)


@click.group(cls=Commands, context_settings={"max_content_width": 110})
@click.version_option(__version__, prog_name="scale-sft")
def main() -> None:
    """Sparse fine-tuning of large language models: tools around `accelerate launch scale_sft/train.py`."""


for _commands in (adapters, arithmetic, recipes, plan, bench, checkpoints, data):
    for _command in _commands.COMMANDS:
        main.add_command(_command)


@main.command()
@click.argument("run", type=click.Path(path_type=Path))
def report(run: Path) -> None:
    """Write report.html and its pictures for a finished, running or dead RUN (its output folder)."""
    from scale_sft.reporting.run_report import write_report

    if not (run / "metrics.jsonl").is_file():
        raise UserError(f"report: {run} holds no metrics.jsonl; expected the output folder of a run")
    click.echo(f"report: {write_report(run)}")
