"""The `scale-sft` command: what is done before and after training."""

from __future__ import annotations

import sys
from pathlib import Path

import click

from . import __version__, cli_adapters, cli_arithmetic, cli_bench, cli_data, cli_plan, cli_recipes
from .errors import UserError


class Commands(click.Group):
    """A group whose commands end with one line of error, and which names the nearest command to a misspelt one."""

    def invoke(self, ctx: click.Context):
        try:
            return super().invoke(ctx)
        except UserError as error:
            click.echo(f"error: {error}", err=True)
            sys.exit(1)

    def resolve_command(self, ctx: click.Context, args: list[str]):
        from .config import unknown

        if args and self.get_command(ctx, args[0]) is None and not args[0].startswith("-"):
            ctx.fail(unknown(f"command '{args[0]}'", args[0], self.list_commands(ctx)))
        return super().resolve_command(ctx, args)


@click.group(cls=Commands, context_settings={"max_content_width": 110})
@click.version_option(__version__, prog_name="scale-sft")
def main() -> None:
    """Sparse fine-tuning of large language models: tools around `accelerate launch scale_sft/train.py`."""


for _commands in (cli_adapters, cli_arithmetic, cli_recipes, cli_plan, cli_bench):
    for _command in _commands.COMMANDS:
        main.add_command(_command)


@main.command()
@click.argument("run", type=click.Path(path_type=Path))
def report(run: Path) -> None:
    """Write report.html and its pictures for a finished, running or dead RUN (its output folder)."""
    from .report import write_report

    if not (run / "metrics.jsonl").is_file():
        raise UserError(f"report: {run} holds no metrics.jsonl; expected the output folder of a run")
    click.echo(f"report: {write_report(run)}")


@main.group()
def checkpoint() -> None:
    """Checkpoints of a run: what is there, and whether it is whole."""


@checkpoint.command("ls")
@click.argument("folder", type=click.Path(path_type=Path))
def checkpoint_ls(folder: Path) -> None:
    """List the checkpoints in FOLDER (a run, its checkpoints/ or one of them); sizes are checked, checksums are not."""
    from .checkpoint_listing import checkpoints_in, table

    click.echo(table(checkpoints_in(folder), "complete (sizes)"))


@checkpoint.command("verify")
@click.argument("folder", type=click.Path(path_type=Path))
def checkpoint_verify(folder: Path) -> None:
    """Read the checkpoints in FOLDER completely and compare checksums; status 1 if one is damaged."""
    from .checkpoint_listing import checkpoints_in, table, verified

    found = [verified(one) for one in checkpoints_in(folder)]
    click.echo(table(found, "complete (checksums)"))
    if any(one.problem for one in found):
        sys.exit(1)


cli_data.register(main)


if __name__ == "__main__":
    main()
