"""Help: whole descriptions, examples as they are typed, one name per thing; earlier spellings still work."""

import click
import pytest
from click.testing import CliRunner

from scale_sft.cli import bench_options
from scale_sft.cli.commands import sentence
from scale_sft.cli.main import _SECTIONS, main
from scale_sft.config.click_options import SuggestingCommand


def commands(group: click.Group, path: tuple[str, ...] = ()):
    """(path, command) of every command below a group."""
    for name, command in group.commands.items():
        yield (*path, name), command
        if isinstance(command, click.Group):
            yield from commands(command, (*path, name))


ALL = dict(commands(main))


def helped(*path: str) -> str:
    return CliRunner().invoke(main, [*path, "--help"], terminal_width=110).output


@pytest.mark.parametrize("path", [(), *ALL], ids=" ".join)
def test_help_shows_examples_as_typed_and_cuts_nothing(path) -> None:
    shown = helped(*path)
    assert "\\b" not in shown
    command = ALL[path] if path else main
    for child in getattr(command, "commands", {}).values():
        assert sentence(child.help) in " ".join(shown.split())
    for line in command.help.splitlines():
        if line.startswith("scale-sft "):
            assert line in shown, "an example was wrapped"


@pytest.mark.parametrize(
    "path",
    [path for path, command in ALL.items() if any(isinstance(one, click.Argument) for one in command.params)],
    ids=" ".join,
)
def test_a_command_with_arguments_shows_how_it_is_typed(path) -> None:
    assert f"\n  scale-sft {' '.join(path)} " in helped(*path)


def test_every_command_has_a_place_in_the_help() -> None:
    assert sorted(name for names in _SECTIONS.values() for name in names) == sorted(main.commands)


def test_options_of_a_recipe_stand_below_their_section_in_one_spelling() -> None:
    shown = helped("train")
    assert (
        shown.index("Recipe, section model") < shown.index("--base_placement") < shown.index("Recipe, section sparse")
    )
    assert "--base-placement" not in shown
    assert "--gradient_checkpointing true|false" in shown


@pytest.mark.parametrize(
    ("earlier", "now"),
    [
        ("--length 64", "--max_length 64"),
        ("--max-length 64", "--max_length 64"),
        ("--micro-batch 2,4", "--micro_batch_size 2,4"),
        ("--rank 3", "--rank_equivalent 3"),
        ("--gradient-checkpointing", "--gradient_checkpointing true"),
        ("--gradient-checkpointing --no-gradient-checkpointing --dtype float32", "--gradient_checkpointing --dtype float32"),
        ("--no-gradient-checkpointing", "--gradient_checkpointing false"),
        ("--output there", "--output_dir there"),
    ],
)  # fmt: skip
def test_earlier_spellings_of_bench_still_work_unseen(earlier, now) -> None:
    seen = []

    @click.command(cls=SuggestingCommand)
    @bench_options.with_cases
    @bench_options.OUTPUT
    def command(**given) -> None:
        seen.append(given)

    for arguments in (earlier, now):
        result = CliRunner().invoke(command, arguments.split(), standalone_mode=False)
        assert result.exception is None, result.exception
    assert seen[0] == seen[1]
    shown = CliRunner().invoke(command, ["--help"]).output
    assert now.split()[0] in shown
    assert f"{earlier.split()[0]} " not in shown
