"""Recipes that ship are valid; the schema knows every option and refuses what the trainer refuses."""

import json
from pathlib import Path

import pytest
from click.testing import CliRunner

from scale_sft.cli.main import main
from scale_sft.config import recipes
from scale_sft.config.loading import load
from scale_sft.config.options import OPTIONS, SECTIONS
from scale_sft.config.schema import schema
from scale_sft.errors import UserError

GOOD = "# A first recipe,\n# for the demo.\n#   scale-sft train --config first\nsparse:\n  density: 0.02\nrun:\n  steps: 3\n"


@pytest.fixture
def shipped(tmp_path, monkeypatch) -> Path:
    """Two shipped recipes."""
    folder = tmp_path / "shipped"
    folder.mkdir()
    (folder / "first.yaml").write_text(GOOD)
    (folder / "second.yaml").write_text("sparse:\n  density: 0.5\n")
    monkeypatch.setattr(recipes, "FOLDER", folder)
    return folder


def command(*arguments):
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


def test_recipes_that_ship_are_valid() -> None:
    for name in recipes.names():
        load(name, {})
        assert recipes.summary(recipes.path_of(name)), f"{name} does not say what it is for"


def test_recipes_are_listed_with_what_they_are_for(shipped) -> None:
    assert command("recipes", "ls").output.splitlines()[0] == "first   A first recipe, for the demo."


def test_a_recipe_is_shown_copied_and_checked(shipped, tmp_path) -> None:
    assert command("recipes", "show", "first").output == GOOD
    assert command("recipes", "cp", "first", tmp_path / "mine.yaml").exit_code == 0
    assert (tmp_path / "mine.yaml").read_text() == GOOD
    (tmp_path / "mine.yaml").write_text("# mine")
    assert "not overwritten" in command("recipes", "cp", "first", tmp_path / "mine.yaml").output
    assert (tmp_path / "mine.yaml").read_text() == "# mine"
    (tmp_path / "mine.yaml").write_text(GOOD)
    assert command("recipes", "validate", "first", tmp_path / "mine.yaml").exit_code == 0


def test_a_copy_without_a_target_is_a_new_file_here_and_says_so(shipped, tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert command("recipes", "cp", "first").output.startswith("wrote first.yaml;")
    assert command("recipes", "cp", "first", "new/").exit_code == 0
    assert (tmp_path / "new" / "first.yaml").read_text() == (tmp_path / "first.yaml").read_text() == GOOD


def test_a_name_is_a_shipped_recipe_and_a_path_a_file_if_there_is_one(shipped, tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    ours = shipped / "first.yaml"
    assert [recipes.path_of(name) for name in ("first", "first.yaml")] == [ours, ours]
    for own in ("first", "first.yaml"):
        (tmp_path / own).write_text("# own")
    assert [recipes.path_of(name) for name in ("first", "first.yaml", "./first")] == [
        ours, Path("first.yaml"), Path("first"),
    ]  # fmt: skip
    monkeypatch.setenv("HOME", str(tmp_path))
    assert recipes.path_of("~/first.yaml") == tmp_path / "first.yaml"
    for wrong, told in (("frist", "did you mean 'first'"), ("no/first.yaml", "no such file"), ("first.yml", "first")):
        with pytest.raises(UserError, match=told):
            recipes.path_of(wrong)


@pytest.mark.parametrize(
    "arguments",
    [
        ("plan", "secnd"),
        ("data", "show", "--config", "secnd"),
        ("preprocess", "--config", "secnd"),
        ("eval", "--config", "secnd"),
        ("bench", "quality", "--config", "secnd"),
        ("train", "--config", "secnd"),
    ],
)
def test_every_command_that_takes_a_recipe_takes_it_by_name(shipped, arguments) -> None:  # fmt: skip
    result = command(*arguments)
    assert result.exit_code == 1
    assert "did you mean 'second'" in result.stderr


def test_a_wrong_recipe_is_refused_with_all_its_mistakes(shipped, tmp_path) -> None:
    (tmp_path / "bad.yaml").write_text("sparse:\n  densty: 0.1\nrun:\n  steps: 0\n")
    result = command("recipes", "validate", "first", tmp_path / "bad.yaml")
    assert result.exit_code == 1 and "first: valid" in result.output
    assert "did you mean 'density'" in result.output and "steps: got 0" in result.output
    assert "did you mean 'second'" in command("recipes", "show", "secnd").output


def test_the_schema_has_every_option_with_its_help_and_default() -> None:
    found = json.loads(command("schema").output)
    properties = {name: section["properties"] for name, section in found["properties"].items()}
    assert {option: section for section, options in properties.items() for option in options} == OPTIONS
    assert properties["optimizer"]["betas"]["default"] == [0.8, 0.999]
    assert properties["sparse"]["method"]["enum"] == ["random", "static", "columns", "ag", "ma"]
    assert all(option["description"] for options in properties.values() for option in options.values())
    assert set(found["properties"]) == set(SECTIONS)


def test_the_schema_takes_resolved_configurations_and_refuses_unknown_keys(tmp_path) -> None:
    jsonschema = pytest.importorskip("jsonschema")
    import yaml

    from scale_sft.config.loading import to_yaml

    resolved = yaml.safe_load(to_yaml(load(None, {"density": 0.1, "target_modules": "q_proj,v_proj"})))
    jsonschema.validate(resolved, schema())
    for wrong in ({"sparse": {"densty": 1}}, {"sparse": {"density": "much"}}, {"sparse": {"method": "agg"}}, {"x": {}}):
        with pytest.raises(jsonschema.ValidationError):
            jsonschema.validate(wrong, schema())


def test_the_schema_is_written_to_a_file(tmp_path) -> None:
    assert command("schema", "--output", tmp_path / "deep" / "s.json").exit_code == 0
    assert json.loads((tmp_path / "deep" / "s.json").read_text()) == schema()
