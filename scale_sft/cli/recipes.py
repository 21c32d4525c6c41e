"""Commands about recipes and the configuration's schema."""

from __future__ import annotations

import json
from pathlib import Path

import click

from scale_sft.errors import UserError

from .commands import Commands


@click.group(cls=Commands)
def recipes() -> None:
    """List, show, copy and check the recipes that ship with the package."""


@recipes.command("ls")
def list_recipes() -> None:
    """List the shipped recipes with their purposes."""
    from scale_sft.config import recipes as shipped

    found = shipped.names()
    width = max(map(len, found), default=0)
    for name in found:
        click.echo(f"{name:<{width}}  {shipped.summary(shipped.path_of(name))}")


@recipes.command()
@click.argument("recipe")
def show(recipe: str) -> None:
    r"""Print RECIPE, a shipped name or a file.

    \b
    scale-sft recipes show llama2_7b_ag
    """
    from scale_sft.config import recipes as shipped

    click.echo(shipped.path_of(recipe).read_text(encoding="utf-8"), nl=False)


@recipes.command("cp")
@click.argument("recipe")
@click.argument("target", default=".")
def copy(recipe: str, target: str) -> None:
    r"""Copy RECIPE to TARGET, a new file or a folder, to change it there. Nothing is overwritten.

    Without TARGET the copy is ./RECIPE.yaml.

    \b
    scale-sft recipes cp demo mine.yaml
    scale-sft train --config mine.yaml --density 0.05
    """
    from scale_sft.config import recipes as shipped

    if target.endswith("/"):
        Path(target).mkdir(parents=True, exist_ok=True)
    written = shipped.copy(recipe, Path(target))
    click.echo(f"wrote {written}; train with it: scale-sft train --config {written}")


@recipes.command()
@click.argument("files", metavar="RECIPE...", nargs=-1, required=True)
def validate(files: tuple[str, ...]) -> None:
    r"""Check each RECIPE (a shipped name or a file) as the trainer would, and report all mistakes.

    \b
    scale-sft recipes validate mine.yaml
    """
    from scale_sft.config.loading import load

    wrong = []
    for recipe in files:
        try:
            load(recipe, {})
            click.echo(f"{recipe}: valid")
        except UserError as error:
            wrong.append(str(error))
    if wrong:
        raise UserError("\n".join(wrong))


@click.command()
@click.option("--output", type=click.Path(path_type=Path), help="Write it to this file instead of printing it.")
def schema(output: Path | None) -> None:
    r"""Print the JSON Schema of recipes, for editors: it completes keys, explains options and marks mistakes.

    \b
    scale-sft schema --output recipe.schema.json
    # first line of a recipe, for editors with a YAML language server:
    # yaml-language-server: $schema=recipe.schema.json
    """
    from scale_sft.config.schema import schema as make
    from scale_sft.files import write_json

    if output is None:
        click.echo(json.dumps(make(), indent=2, ensure_ascii=False))
        return
    output.parent.mkdir(parents=True, exist_ok=True)
    write_json(output, make())
    click.echo(f"schema: {output}")


COMMANDS = (recipes, schema)
