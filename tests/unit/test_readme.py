"""README and docs keep their word: links lead somewhere, paths and names exist, commands parse as printed."""

import ast
import importlib
import importlib.util
import os
import re
import shlex
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import click
import numpy as np
import pytest
from PIL import Image

from scale_sft.cli.main import main as scale_sft_command
from scale_sft.spiel.selection import scores
from scale_sft.training import lifecycle
from tools.figures.sparse_finetuning import main as draw

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")), ROOT / "ds_configs" / "README.md"]
MEASURED = ROOT / "docs" / "benchmarks.md"  # holds commands as they were typed when rows were measured
WRITTEN = [page for page in PAGES if page != MEASURED]
NAMES = {page: str(page.relative_to(ROOT)) for page in PAGES}

LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")
PROJECT_PATH = re.compile(
    r"(?<![\w/.~-])(?:scale_sft|docs|tests|tools|launch|ds_configs|benchmarks|examples)/[\w./*-]*\w"
)
TRAINER_SCRIPTS = (
    "launch/quickstart.sh",
    "launch/single_a100.sh",
    "launch/slurm_multinode.sbatch",
    "scale_sft/train.py",
)
ACTIVATION = "source .venv/bin/activate"
PLACEHOLDER = re.compile(r"[A-Z]{2,}|\.\.\.|\|")  # ADAPTER, a|b, ...

of_pages = pytest.mark.parametrize("page", PAGES, ids=NAMES.get)
of_written_pages = pytest.mark.parametrize("page", WRITTEN, ids=NAMES.get)


@cache
def blocks(page: Path) -> list[tuple[str, str]]:
    """(language, code) of fenced and ("") of indented blocks, in their order."""
    found, fence, indented = [], None, []
    for line in [*page.read_text(encoding="utf-8").splitlines(), "end"]:
        if fence is not None:
            if line.startswith("```"):
                found.append((fence[0], "\n".join(fence[1:])))
                fence = None
            else:
                fence.append(line)
        elif line.startswith("    ") or (indented and not line.strip()):
            indented.append(line[4:])
        else:
            if indented:
                found.append(("", "\n".join(indented)))
            indented, fence = [], [line[3:].strip()] if line.startswith("```") else None
    return found


def commands(page: Path) -> Iterator[list[str]]:
    """Words of each command line, in blocks and (where it has options) between backticks; continued lines are joined,
    comments and the brackets of usage lines left out.
    """
    code = [code for language, code in blocks(page) if language in ("", "bash", "sh", "shell")]
    code += re.findall(r"`(scale-sft [^`]+ -[^`]+)`", page.read_text(encoding="utf-8"))
    for line in "\n".join(code).replace("\\\n", " ").splitlines():
        try:
            words = shlex.split(re.sub(r"\[(-[^\]]*|[A-Z. ]+)\]", r"\1", line), comments=True)
        except ValueError:  # a line of output, not of a shell
            continue
        yield [word for word in words if word != "..."]


@cache
def anchors(page: Path) -> set[str]:
    """As GitHub makes them from headings."""
    text = re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)
    headings = re.findall(r"^#+ (.*)$", text, flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@of_pages
def test_every_link_leads_to_a_file_and_a_heading(page):
    for target in LINK.findall(page.read_text(encoding="utf-8")):
        if target.startswith(("http://", "https://")):
            continue
        name, _, anchor = target.partition("#")
        file = (page.parent / name).resolve() if name else page
        assert file.exists(), target
        if anchor:
            assert anchor in anchors(file), target


@of_written_pages
def test_every_path_of_the_project_that_a_page_names_exists(page):
    named = PROJECT_PATH.findall(page.read_text(encoding="utf-8"))
    assert [path for path in named if not any(ROOT.glob(path))] == []


@of_written_pages
def test_every_name_of_the_package_that_a_page_uses_exists(page):
    for name in set(re.findall(r"\bscale_sft(?:\.[a-zA-Z_]\w*)+", page.read_text(encoding="utf-8"))):
        module, rest = "scale_sft", name.split(".")[1:]
        while rest and importlib.util.find_spec(f"{module}.{rest[0]}") is not None:
            module = f"{module}.{rest.pop(0)}"
            if not hasattr(importlib.import_module(module), "__path__"):
                break
        owner = importlib.import_module(module)
        for attribute in rest:
            assert hasattr(owner, attribute), name
            owner = getattr(owner, attribute)


@of_written_pages
def test_every_subcommand_that_a_page_mentions_exists(page):
    for mention in re.findall(r"`scale-sft ((?:[a-z][a-z-]* ?)+)[^`]*`", page.read_text(encoding="utf-8")):
        command, context = scale_sft_command, click.Context(scale_sft_command)
        for word in mention.split():
            if isinstance(command, click.Group):
                _, command, _ = command.resolve_command(context, [word])
                context = click.Context(command, parent=context)


@of_written_pages
def test_every_command_parses_as_printed(page):
    for words in commands(page):
        match words:
            case ["scale-sft", *rest]:
                parse(scale_sft_command, rest)
            case ["accelerate", "launch", *rest]:
                check_launch(rest)
            case ["sbatch", *rest]:
                script = next(place for place, word in enumerate(rest) if word.endswith(".sbatch"))
                check_script(rest[script], rest[script + 1 :])
            case ["python", "-m", module, *_]:
                assert importlib.util.find_spec(module), words
            case ["python", file, *_]:
                assert (ROOT / file).is_file(), words
            case [script, *rest] if script.startswith("./"):
                check_script(script.removeprefix("./"), rest)
                assert os.access(ROOT / script, os.X_OK), words


@pytest.mark.parametrize(
    "line",
    [
        "scale-sft mergee ADAPTER",
        "scale-sft merge ADAPTER --outptu DIR",
        "scale-sft merge ADAPTER --output",
        "scale-sft export A B --to shira --output DIR",
        "scale-sft export ADAPTER --to shiraz --output DIR",
        "accelerate launch scale_sft/train.py --densitty 0.1",
        "accelerate launch --config_file launch/zero9.yaml scale_sft/train.py",
        "python -m scale_sft.bench.swap_costs",
        "./launch/quickstat.sh",
        "sbatch launch/slurm_multinode.sbatch recipe.yaml --steeps 3",
    ],
)
def test_a_command_that_is_wrong_is_noticed(line, tmp_path):
    page = tmp_path / "page.md"
    page.write_text(f"Text.\n\n    {line}    # comment\n")
    with pytest.raises((AssertionError, click.ClickException)):
        test_every_command_parses_as_printed(page)


@of_written_pages
def test_the_environment_is_activated_before_the_first_command_that_needs_it(page):
    lines = [words for words in commands(page) if words]
    needing = [
        place for place, words in enumerate(lines) if words[0] in ("scale-sft", "accelerate", "pytest", "python")
    ]
    if needing:
        assert ACTIVATION.split() in lines[: needing[0]], f"say `{ACTIVATION}` before {' '.join(lines[needing[0]])}"


@of_written_pages
def test_every_block_of_python_parses(page):
    for language, code in blocks(page):
        if language == "python":
            ast.parse(code)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_the_examples_of_the_python_page_run_one_after_the_other(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names: dict = {}
    for language, code in blocks(ROOT / "docs" / "python.md"):
        if language == "python":
            exec(compile(code, "docs/python.md", "exec"), names)
    assert names["after"] < names["before"], "the example has learned something"
    assert {"adapter", "merged", "runs"} <= {path.name for path in tmp_path.iterdir()}


def test_the_examples_of_the_page_on_selection_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(scores, "_SCORES", dict(scores._SCORES))
    monkeypatch.setattr(lifecycle, "write_report", lambda folder: folder / "report.html")
    names: dict = {}
    for language, code in blocks(ROOT / "docs" / "selection.md"):
        if language == "python":
            quick = code.replace('"runs/steady"', '"runs/steady", exact_match_examples=0, eval_data="none"')
            exec(compile(quick.replace("steps=4", "steps=2, save_merged=False"), "docs/selection.md", "exec"), names)
    assert names["optimizer"].steps == 5 and names["result"].adapter.is_dir()


def test_the_picture_is_small_and_looks_as_its_script_draws_it(tmp_path):
    picture = ROOT / "docs" / "images" / "sparse_finetuning.png"
    assert picture.stat().st_size < 60_000
    draw(tmp_path / "again.png")
    kept, again = (np.asarray(Image.open(file).convert("RGB"), float) for file in (picture, tmp_path / "again.png"))
    assert kept.shape == again.shape
    assert abs(kept - again).mean() < 2, "python -m tools.figures.sparse_finetuning"


def parse(command: click.Command, words: list[str]) -> None:
    """As click would, without converting values, reading files or running anything."""
    context = click.Context(command)
    while isinstance(command, click.Group):
        assert words and not words[0].startswith("-"), f"{command.name} needs a subcommand, got {words}"
        name, command, words = command.resolve_command(context, words)
        context = click.Context(command, parent=context, info_name=name)
    given, left_over, _ = command.make_parser(context).parse_args(list(words))
    assert not left_over, f"{command.name}: too many arguments: {left_over}"
    for parameter in command.params:
        value = given.get(parameter.name)
        assert not parameter.required or value, f"{command.name}: {parameter.name} is missing"
        for one in value if isinstance(value, list | tuple) else [value]:
            if isinstance(parameter.type, click.Choice) and isinstance(one, str) and not PLACEHOLDER.search(one):
                parameter.type.convert(one, parameter, context)


def check_launch(words: list[str]) -> None:
    """`accelerate launch [--config_file FILE] SCRIPT|-m MODULE [options]`."""
    if words[0] == "...":
        words = words[1:]
    if words[0] == "--config_file":
        assert (ROOT / words[1]).is_file(), words
        words = words[2:]
    if words[0] == "-m":
        assert importlib.util.find_spec(words[1]), words
        parse(trainer() if words[1] == "scale_sft.train" else scale_sft_command, words[2:])
    else:
        check_script(words[0], words[1:])


def check_script(path: str, words: list[str]) -> None:
    """A script that exists; where it hands its options to the trainer, they are options of the trainer."""
    assert (ROOT / path).is_file(), path
    if path in TRAINER_SCRIPTS:
        positional = words and not words[0].startswith("-") and path != "scale_sft/train.py"
        parse(trainer(), words[1:] if positional else words)


def trainer() -> click.Command:
    """The options of `scale_sft/train.py`."""
    return importlib.import_module("scale_sft.train").main
