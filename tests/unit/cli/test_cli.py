import pytest
from click.testing import CliRunner

from scale_sft.cli.main import main
from scale_sft.version import __version__


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["mergee", "x"], "did you mean 'merge'?"),
        (["merge", "x", "--outptu", "y"], "--output"),
        (["merge", "x"], "--output"),
        (["report", "no-such-run"], "no-such-run holds no metrics.jsonl"),
    ],
)
def test_a_misspelt_command_is_one_error_that_says_what_is_meant(arguments: list[str], expected: str) -> None:
    result = CliRunner().invoke(main, arguments)
    assert result.exit_code in (1, 2) and expected in result.stderr
    assert result.stderr.lower().count("error:") == 1 and "Traceback" not in result.output


def test_help_lists_the_commands_and_the_version_is_that_of_the_package() -> None:
    assert "merge" in CliRunner().invoke(main, ["--help"]).stdout
    assert __version__ in CliRunner().invoke(main, ["--version"]).stdout
