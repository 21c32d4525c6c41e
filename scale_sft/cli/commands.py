"""A group of commands: errors in one line, whole descriptions, the nearest name to a misspelt one."""

from __future__ import annotations

import errno
import inspect
import re
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import click

from scale_sft.config.click_options import with_marks
from scale_sft.errors import UserError, explain


class Commands(click.Group):
    """A group whose commands end with one line of error, and whose help cuts no description.

    `sections`: headings of the help with the names of the commands below each; without them there is one list.
    """

    def __init__(self, *args: Any, sections: Mapping[str, Sequence[str]] | None = None, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.sections = sections or {}
        self.help = with_marks(self.help)

    def add_command(self, cmd: click.Command, name: str | None = None) -> None:
        cmd.help = with_marks(cmd.help)
        super().add_command(cmd, name)

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except UserError as error:
            click.echo(f"error: {error}", err=True)
            sys.exit(1)
        except OSError as error:
            if error.errno == errno.EPIPE:  # the reader of our output has gone; click ends quietly
                raise
            click.echo(f"error: {explain(error)}", err=True)
            sys.exit(1)
        except KeyboardInterrupt:
            click.echo("interrupted", err=True)
            sys.exit(130)

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        from scale_sft.config.spelling import unknown

        if args and self.get_command(ctx, args[0]) is None and not args[0].startswith("-"):
            ctx.fail(unknown(f"command '{args[0]}'", args[0], self.list_commands(ctx)))
        return super().resolve_command(ctx, args)

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Return the names in the order in which help shows them."""
        placed = [name for names in self.sections.values() for name in names]
        return placed + sorted(name for name in self.commands if name not in placed)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        sections = dict(self.sections) or {"Commands": self.list_commands(ctx)}
        names = [name for section in sections.values() for name in section]
        width = max(map(len, names), default=0)
        for heading, members in sections.items():
            rows = [(f"{name:<{width}}", sentence(self.commands[name].help)) for name in members]
            with formatter.section(heading):
                formatter.write_dl(rows)


def sentence(text: str | None) -> str:
    """Return the first sentence of a help text, on one line, without its full stop."""
    paragraph = " ".join(inspect.cleandoc(text or "").split("\n\n")[0].replace("\b", "").split())
    return re.split(r"(?<=[a-z)])\. (?=[A-Z])", paragraph, maxsplit=1)[0].rstrip(".")
