"""The command that checks which models train: `scale-sft models check`."""

from __future__ import annotations

import datetime
import sys
from collections.abc import Iterator
from pathlib import Path

import click

from scale_sft.errors import UserError

from .commands import Commands
from .tokens import add_tokens


@click.group(cls=Commands)
def models() -> None:
    """Check what works with a type of model; give a base new tokens."""


models.add_command(add_tokens)


@models.command()
@click.argument("types", nargs=-1)
@click.option(
    "--base", help="Check a tiny random model with the switches of this base's config.json (folder or hub id)."
)
@click.option(
    "--write",
    type=click.Path(file_okay=False, path_type=Path),
    help="Keep the findings in FOLDER/models.jsonl, and write the table of all that are kept to FOLDER/models.md.",
    metavar="FOLDER",
)
@click.option(
    "--again", is_flag=True, help="Also check types that FOLDER has findings of this version of the code for."
)
@click.option("--ranks/--no-ranks", default=True, show_default=True, help="Also train on two ranks, under ZeRO-3.")
@click.option("--seconds", type=click.IntRange(min=1), default=120, show_default=True, help="Time for one model.")
def check(types: tuple[str, ...], base: str | None, write: Path | None, again: bool, ranks: bool, seconds: int) -> None:
    r"""Check TYPES of models (as in config.json: llama, qwen3_moe ...; default: all that transformers has).

    Of each type a tiny random model goes through the trainer's own code on the CPU: training with drop and grow,
    gradients, merging, checkpointing, packing, 4 bits, ZeRO-3 on two ranks, generation. That takes some seconds for a
    type. Nothing is downloaded but the config.json of a --base of the hub, and no weights are needed. Ctrl-C ends it;
    the same command continues what --write keeps. The status is 1 if anything failed; a clear refusal is a result.

    \b
    scale-sft models check llama qwen3_moe
    scale-sft models check --base path/to/your/model
    scale-sft models check --write docs
    """
    import time

    from scale_sft.model_check.findings import Findings
    from scale_sft.model_check.walk import Walk

    if base is not None and not base.strip():
        raise click.UsageError("--base: got nothing, expected a folder or a hub id, or no --base at all")
    if base and (types or write):
        raise click.UsageError("--base goes without TYPES and --write: it checks one model")
    like = _config_of(base) if base else None
    kept = _Kept(write)
    wanted = [like.model_type] if like is not None else kept.unchecked(_known(types), again=again or bool(types))
    found: list[Findings] = []
    began = time.perf_counter()
    with Walk(seconds=seconds, ranks=ranks) as walk:
        for number, model_type in enumerate(wanted, 1):
            found.append(walk.check(model_type, like))
            kept.add(found[-1])
            left = (time.perf_counter() - began) / number * (len(wanted) - number)
            for line in _told(found[-1], f"{number}/{len(wanted)}", left):
                click.echo(line)
            sys.stdout.flush()
    kept.report(found)
    if any(one.failures for one in found):
        sys.exit(1)


def _known(types: tuple[str, ...]) -> list[str]:
    """Return the types to check.

    Raises:
        UserError: one of them is unknown.
    """
    from transformers import CONFIG_MAPPING

    from scale_sft.config.spelling import unknown
    from scale_sft.model_check.tiny import types as every_type

    for name in types:
        if name not in CONFIG_MAPPING:
            raise UserError(unknown(f"type '{name}'", name, every_type()))
    return list(types) or every_type()


def _config_of(base: str):
    from scale_sft.config.options import ModelConfig
    from scale_sft.model.loading import load_model_config

    return load_model_config(ModelConfig(base=base))


class _Kept:
    """The findings that a folder keeps, if there is one."""

    def __init__(self, folder: Path | None):
        from scale_sft.model_check import findings

        self.folder = folder
        self.rows = findings.read(folder / "models.jsonl") if folder else {}

    def unchecked(self, types: list[str], *, again: bool) -> list[str]:
        """Return the types without findings of this version of the code."""
        from scale_sft.model_check.findings import code_version

        done = {name for name, row in self.rows.items() if row.code == code_version() and not again}
        if skipped := done & {*types}:
            click.echo(f"{len(skipped)} types are checked already, with this version of the code (--again: once more)")
        return [name for name in types if name not in done]

    def add(self, found) -> None:
        """Keep findings, and write both files."""
        from scale_sft.files import disk_errors_in_one_line, write_text
        from scale_sft.model_check import findings
        from scale_sft.model_check.page import page

        if self.folder is None:
            return
        self.rows[found.model_type] = found
        with disk_errors_in_one_line("write", self.folder):
            self.folder.mkdir(parents=True, exist_ok=True)
            findings.write(self.folder / "models.jsonl", self.rows.values())
            write_text(self.folder / "models.md", page([*self.rows.values()], f"on {datetime.date.today():%Y-%m-%d} "))

    def report(self, found) -> None:
        """Print the counts of what was found, and where the table is."""
        from scale_sft.model_check.page import summary

        if len(found) > 1:
            click.echo(summary(found))
            for one in found:
                if not one.clean:
                    click.echo(f"  {one.model_type}: {', '.join(one.failures) or 'not trained'}")
        if self.folder:
            click.echo(f"table: {self.folder / 'models.md'}")


def _told(found, number: str, left: float) -> Iterator[str]:
    """Write findings in a few lines: all cells, then why."""
    until = f", about {left / 60:.0f} min left" if left >= 60 else ""
    yield f"{found.model_type}  ({number}, {found.seconds:.0f} s{until})"
    yield "  " + "  ".join(f"{name}: {cell}" for name, cell in found.cells.items())
    if found.remark:
        yield f"  {found.remark.strip()}"


COMMANDS = (models,)
