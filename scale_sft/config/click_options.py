"""Command-line options made from the dataclasses of `config`: one per field, of the same name."""

from __future__ import annotations

import dataclasses
import typing
from collections.abc import Callable

import click

from .loading import describe_type
from .options import OPTIONS, SECTIONS
from .spelling import unknown


class SuggestingCommand(click.Command):
    """A command that answers an unknown option with the nearest one."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        try:
            return super().parse_args(ctx, args)
        except click.NoSuchOption as error:
            name = error.option_name.lstrip("-").replace("-", "_")
            raise click.UsageError(unknown(f"option --{name}", name, OPTIONS), ctx) from None


def with_config_options(function: Callable) -> Callable:
    """Adds --config and one option per configuration field; values arrive as strings, `config.load` reads them."""
    return with_options_of(*SECTIONS)(function)


def with_options_of(*sections: str) -> Callable[[Callable], Callable]:
    """Adds --config and the options of some sections, for commands that need no more; see `config.load_sections`."""

    def decorate(function: Callable) -> Callable:
        function = with_field_options(function, *sections)
        return click.option(
            "--config", "recipe", metavar="RECIPE", help="YAML recipe; options given here win over it."
        )(function)

    return decorate


def with_field_options(function: Callable, *sections: str) -> Callable:
    """Adds one option per configuration field of some sections; of all where none is named."""
    for section in reversed(sections or tuple(SECTIONS)):
        hints = typing.get_type_hints(SECTIONS[section])
        for field in reversed(dataclasses.fields(SECTIONS[section])):
            function = click.option(
                *_spellings(field.name),
                field.name,
                metavar="|".join(field.metadata["choices"]) or _metavar(hints[field.name]),
                help=f"[{section}] {field.metadata['help']}{_default(field.default)}",
            )(function)
    return function


def _spellings(name: str) -> list[str]:
    return [f"--{name}"] + ([f"--{name.replace('_', '-')}"] if "_" in name else [])


def _metavar(hint: typing.Any) -> str:
    return describe_type(hint).split(" or ")[0].split()[-1].upper()


def _default(value: typing.Any) -> str:
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

    def convert(self, value: typing.Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple:
        if isinstance(value, tuple):
            return value
        return tuple(self.one.convert(text.strip(), param, ctx) for text in value.split(",") if text.strip())


def flattened(values: tuple[tuple, ...]) -> tuple:
    """What a repeated option of `Several` was given, each value once, in order."""
    return tuple(dict.fromkeys(value for some in values for value in some))
