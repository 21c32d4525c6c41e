"""Command-line options made from the dataclasses of `config`: one per field, of the same name."""

from __future__ import annotations

import dataclasses
import typing
from collections.abc import Callable, Sequence
from copy import copy
from typing import Any

import click

from .loading import describe_type
from .options import OPTIONS, SECTIONS
from .spelling import unknown


class Option(click.Option):
    """An option with spellings that work without being shown, and a heading of the help that it stands below.

    `also`: further spellings: the same name with dashes, or an earlier one.
    """

    def __init__(self, declarations: Sequence[str], *, also: Sequence[str] = (), heading: str = "", **attributes: Any):
        super().__init__([*declarations, *also], **attributes)
        self.also, self.heading = tuple(also), heading

    def get_help_record(self, ctx: click.Context) -> tuple[str, str] | None:
        shown = copy(self)
        shown.opts = [spelling for spelling in self.opts if spelling not in self.also]
        return super(Option, shown).get_help_record(ctx)

    def get_error_hint(self, ctx: click.Context | None) -> str:
        shown = copy(self)
        shown.opts = [spelling for spelling in self.opts if spelling not in self.also]
        return super(Option, shown).get_error_hint(ctx)


def option(*declarations: str, also: Sequence[str] = (), **attributes: Any) -> Callable[[Callable], Callable]:
    """Make an `Option`, as click.option does."""
    return click.option(*declarations, cls=Option, also=also, **attributes)


def with_marks(text: str | None) -> str | None:
    r"""Turn the \b of a raw docstring into the character below which click leaves lines as they are."""
    return text and text.replace("\\b\n", "\b\n")


class SuggestingCommand(click.Command):
    """A command that answers an unknown option with the nearest one, and groups options of a recipe by section."""

    def __init__(self, *args: Any, **attributes: Any):
        super().__init__(*args, **attributes)
        self.help = with_marks(self.help)

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        try:
            return super().parse_args(ctx, args)
        except click.NoSuchOption as error:
            name = error.option_name.lstrip("-").replace("-", "_")
            raise click.UsageError(unknown(f"option --{name}", name, OPTIONS), ctx) from None

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        groups: dict[str, list[tuple[str, str]]] = {"Options": []}
        for parameter in self.get_params(ctx):
            record = parameter.get_help_record(ctx)
            if record is not None:
                groups.setdefault(getattr(parameter, "heading", "") or "Options", []).append(record)
        for heading, records in groups.items():
            if records:
                with formatter.section(heading):
                    formatter.write_dl(records)


def with_config_options(function: Callable) -> Callable:
    """Adds --config and one option per configuration field; values arrive as strings, `config.load` reads them."""
    return with_options_of(*SECTIONS)(function)


def with_options_of(*sections: str) -> Callable[[Callable], Callable]:
    """Adds --config and the options of some sections, for commands that need no more; see `config.load_sections`."""

    def decorate(function: Callable) -> Callable:
        function = with_field_options(function, *sections)
        return option(
            "--config",
            "recipe",
            metavar="RECIPE",
            help="Shipped recipe by name (demo), or a YAML file; options win over it.",
        )(function)

    return decorate


def with_field_options(function: Callable, *sections: str) -> Callable:
    """Adds one option per configuration field of some sections; of all where none is named."""
    for section in reversed(sections or tuple(SECTIONS)):
        hints = typing.get_type_hints(SECTIONS[section])
        for field in reversed(dataclasses.fields(SECTIONS[section])):
            function = option(
                f"--{field.name}",
                field.name,
                also=[f"--{field.name.replace('_', '-')}"] if "_" in field.name else [],
                heading=f"Recipe, section {section}",
                metavar="|".join(field.metadata["choices"]) or _metavar(hints[field.name]),
                help=f"{field.metadata['help']}{_default(field.default)}",
            )(function)
    return function


def _metavar(hint: Any) -> str:
    told = describe_type(hint)
    return "true|false" if told.startswith("true or false") else told.split(" or ")[0].split()[-1].upper()


def _default(value: Any) -> str:
    if value is None:
        return ""
    shown = (
        ",".join(map(str, value))
        if isinstance(value, tuple)
        else str(value).lower()
        if value in (True, False) and isinstance(value, bool)
        else value
    )
    return f"  [default: {shown}]"


class Several(click.ParamType):
    """Values of another type with commas between them; with `multiple` the option may be repeated too."""

    def __init__(self, one: click.ParamType):
        self.one, self.name = one, f"{one.name},..."

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple:
        if isinstance(value, tuple):
            return value
        return tuple(self.one.convert(text.strip(), param, ctx) for text in value.split(",") if text.strip())


def flattened(values: tuple[tuple, ...]) -> tuple:
    """Flatten the values of a repeated option of `Several`, each value once, in order."""
    return tuple(dict.fromkeys(value for some in values for value in some))
