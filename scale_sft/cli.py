"""The `scale-sft` command: what is done before and after training."""

from __future__ import annotations

import sys
from pathlib import Path

import click

from . import __version__, commands_data
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


@main.command()
@click.argument("adapter", type=click.Path(path_type=Path))
@click.option("--output", required=True, type=click.Path(path_type=Path), help="New folder for the merged model.")
@click.option("--base", help="Folder or hub id of the base, if it is not where the adapter says.")
@click.option(
    "--quantize",
    type=click.Choice(["nf4", "fp4", "int8"]),
    help="Of an adapter to a quantised base: write the result in few bits again; says what is lost.",
)
def merge(adapter: Path, output: Path, base: str | None, quantize: str | None) -> None:
    """Write base + ADAPTER as a plain transformers folder (ADAPTER: the adapter/ folder of a run).

    Its logits are those of the trained model, bit for bit. Needs the memory of one safetensors file at a time. A base
    in 4 or 8 bits is dequantised, and the result is written in bfloat16.
    """
    from .export import merge as merge_adapter

    if quantize:
        from .requantize import merge_into_few_bits

        click.echo(merge_into_few_bits(adapter, output, quantize, base))
        return
    click.echo(f"merged model: {merge_adapter(adapter, output, base)}")


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


commands_data.register(main)


if __name__ == "__main__":
    main()
