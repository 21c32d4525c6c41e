import dataclasses

import pytest
import yaml

from scale_sft.config.loading import load, to_yaml
from scale_sft.config.options import OPTIONS, SECTIONS, Config, ConfigError


@pytest.fixture
def recipe(tmp_path):
    """(tree or text) -> path of a recipe that holds it."""

    def write(content):
        path = tmp_path / "recipe.yaml"
        path.write_text(content if isinstance(content, str) else yaml.safe_dump(content), encoding="utf-8")
        return path

    return write


def mistakes(overrides: dict, recipe=None) -> str:
    with pytest.raises(ConfigError) as error:
        load(recipe, overrides)
    return str(error.value)


def test_the_command_line_wins_over_the_recipe(recipe) -> None:
    path = recipe({"sparse": {"density": 0.1, "method": "ma"}, "run": {"steps": 10}})
    config = load(path, {"method": "static", "steps": "20", "learning_rate": None})
    assert (config.sparse.method, config.run.steps, config.sparse.density) == ("static", 20, 0.1)


def test_a_budget_or_length_given_on_the_command_line_replaces_that_of_the_recipe(recipe) -> None:
    path = recipe({"sparse": {"density": 0.1}, "run": {"steps": 10}})
    config = load(path, {"rank_equivalent": "4", "epochs": "2"})
    assert config.sparse.density is None and config.sparse.rank_equivalent == 4
    assert config.run.steps is None and config.run.epochs == 2


@pytest.mark.parametrize(
    "options",
    [
        {"density": "0.02"},
        {"tunable_weights": "1e4", "betas": "0.9,0.95", "gradient_checkpointing": "yes", "max_grad_norm": "1"},
        {"rank_equivalent": 8, "target_modules": "q_proj,v_proj", "epochs": 1.5, "base_placement": "shard"},
        {"density": 1, "target_modules": r".*\.mlp\..*", "weight_decay": "0"},
    ],
)
def test_the_resolved_configuration_reads_back_to_itself(options, recipe) -> None:
    config = load(None, options)
    assert load(recipe(to_yaml(config)), {}) == config


def test_every_option_has_one_name_a_meaning_and_a_default_that_passes_its_own_check() -> None:
    names = [field.name for kind in SECTIONS.values() for field in dataclasses.fields(kind)]
    assert len(names) == len(set(names)) == len(OPTIONS)
    for kind in SECTIONS.values():
        for field in dataclasses.fields(kind):
            assert len(field.metadata["help"]) > 10
            check, choices = field.metadata["check"], field.metadata["choices"]
            assert field.default is None or not check or check(field.default) is None
            assert not choices or field.default in choices


@pytest.mark.parametrize(
    ("given", "nearest"), [("densty", "density"), ("learning_rat", "learning_rate"), ("outputdir", "output_dir")]
)
def test_an_unknown_option_names_the_nearest(given: str, nearest: str) -> None:
    assert f"did you mean '{nearest}'?" in mistakes({given: "1", "density": "0.1"})


def test_an_unknown_key_or_section_of_a_recipe_names_the_nearest(recipe) -> None:
    said = mistakes({}, recipe({"sparse": {"densty": 0.1}, "optimiser": {"learning_rate": 1}}))
    assert "unknown key 'sparse.densty'; did you mean 'density'?" in said
    assert "unknown section 'optimiser'; did you mean 'optimizer'?" in said


def test_a_key_in_the_wrong_section_is_told_where_it_belongs(recipe) -> None:
    assert "'density' stands in section 'run'; it belongs in 'sparse'" in mistakes(
        {}, recipe({"run": {"density": 0.1}})
    )


@pytest.mark.parametrize("density", ["0", "-0.1", "1.01", "2"])
def test_a_density_outside_0_to_1_is_refused(density: str) -> None:
    said = mistakes({"density": density})
    assert said.startswith("1 mistake") and f"density: got {float(density)}" in said and "(0, 1]" in said


@pytest.mark.parametrize("density", ["two per cent", "nan", "inf", "true"])
def test_a_density_that_is_no_number_is_refused(density: str) -> None:
    said = mistakes({"density": density})
    assert said.startswith("1 mistake") and "density: got" in said and "expected a number" in said


@pytest.mark.parametrize(
    ("options", "got"),
    [
        ({}, "got none"),
        ({"density": 0.1, "tunable_weights": 100}, "got density 0.1 and tunable_weights 100"),
        ({"density": 0.1, "tunable_weights": 100, "rank_equivalent": 2}, "and rank_equivalent 2"),
    ],
)
def test_exactly_one_budget_must_be_given(options: dict, got: str) -> None:
    said = mistakes(options)
    assert got in said and "expected exactly one of density, tunable_weights, rank_equivalent" in said


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"method": "agg"}, "did you mean 'ag'?"),
        ({"steps": "ten"}, "steps: got 'ten', expected a whole number"),
        ({"steps": "1.5"}, "steps: got '1.5', expected a whole number"),
        ({"steps": "0"}, "steps: got 0, must be at least 1"),
        ({"steps": 5, "epochs": 2}, "expected one of them"),
        ({"learning_rate": "0"}, "learning_rate: got 0.0, must lie in (0, "),
        ({"learning_rate": "inf"}, "learning_rate: got 'inf', expected a number"),
        ({"betas": "0.9"}, "betas: got (0.9,), must be two numbers"),
        ({"betas": "0.9,1.0"}, "must be two numbers in [0, 1)"),
        ({"initial_replacement_fraction": 1.5}, "must lie in [0, 1]"),
        ({"estimation_steps": 30}, "estimation_steps: got 30, must not exceed update_interval_steps (20)"),
        ({"global_batch_size": 12, "micro_batch_size": 5}, "nearest that does: 4"),
        ({"global_batch_size": 4, "proposal_batch_size": 5}, "must not exceed global_batch_size"),
        ({"exact_match_examples": 5}, "needs eval_data"),
        ({"gradient_checkpointing": "maybe"}, "gradient_checkpointing: got 'maybe', expected true or false"),
    ],
)
def test_a_value_that_cannot_be_is_told_with_what_was_expected(options: dict, expected: str) -> None:
    said = mistakes({"density": 0.1, **options})
    assert said.startswith("1 mistake:") and expected in said


def test_all_mistakes_are_told_together() -> None:
    said = mistakes({"density": 2, "steps": 0, "betas": "x", "method": "sgd"})
    assert said.startswith("4 mistakes") and len(said.splitlines()) == 5


@pytest.mark.parametrize(
    ("text", "expected"),
    [("- 1\n- 2\n", "expected sections"), ("a: [1\n", "not readable as YAML"), ("sparse: 3\n", "expected options")],
)
def test_a_recipe_that_is_no_recipe_is_one_error(recipe, text: str, expected: str) -> None:
    assert expected in mistakes({"density": 0.1}, recipe(text))


def test_a_missing_recipe_is_one_error(tmp_path) -> None:
    assert "no such file" in mistakes({"density": 0.1}, tmp_path / "nothing.yaml")


def test_an_empty_recipe_is_all_defaults(recipe) -> None:
    assert load(recipe(""), {"density": 0.1}) == load(None, {"density": 0.1})
    assert isinstance(load(recipe("run:\n"), {"density": 0.1}), Config)
