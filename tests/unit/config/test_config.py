import dataclasses

import pytest
import yaml

from scale_sft.config.loading import load, to_yaml
from scale_sft.config.options import FREE, MAY_CHANGE, OPTIONS, SECTIONS, Config, ConfigError


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
        ({"method": "agg"}, "method: unknown 'agg'; did you mean 'ag'? Known: random, static, columns, ag, ma"),
        ({"kernels": "cuda"}, "kernels: unknown 'cuda'; did you mean 'cpu'? Known: off, cpu, auto"),
        ({"target_modules": []}, "target_modules: got [], expected at least one item"),
        ({"steps": "ten"}, "steps: got 'ten', expected a whole number"),
        ({"steps": "1.5"}, "steps: got '1.5', expected a whole number"),
        ({"steps": "0"}, "steps: got 0, must be at least 1"),
        ({"steps": 5, "epochs": 2}, "expected one of them"),
        ({"learning_rate": "0"}, "learning_rate: got 0.0, must be in (0, "),
        ({"learning_rate": "inf"}, "learning_rate: got 'inf', expected a number"),
        ({"betas": "0.9"}, "betas: got (0.9,), must be two numbers"),
        ({"betas": "0.9,1.0"}, "must be two numbers in [0, 1)"),
        ({"initial_replacement_fraction": 1.5}, "must be in [0, 1]"),
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


# --- a value is what was meant, however it was written --------------------------------------------------------------


@pytest.mark.parametrize(
    ("section", "name", "text", "meant"),
    [
        ("run", "kernels", "off", "off"),  # a boolean in YAML 1.1
        ("run", "kernels", "'off'", "off"),
        ("run", "save_merged", "on", True),
        ("run", "save_merged", "No", False),
        ("run", "save_merged", "true", True),
        ("run", "tracker", "~", None),
        ("run", "tracker", "", None),
        ("run", "steps", "1_000", 1000),
        ("run", "steps", "1e3", 1000),
        ("model", "revision", "0123", "0123"),  # an octal number
        ("model", "revision", "1.10", "1.10"),  # 1.1
        ("model", "revision", "12:30", "12:30"),  # 750
        ("model", "revision", "2024-01-31", "2024-01-31"),  # a date
        ("model", "revision", "yes", "yes"),
        ("optimizer", "learning_rate", "1e-3", 1e-3),  # text
        ("optimizer", "betas", "[0.9, 0.95]", (0.9, 0.95)),
        ("optimizer", "betas", "0.9, 0.95", (0.9, 0.95)),
        ("sparse", "target_modules", "q_proj, v_proj,", ("q_proj", "v_proj")),
        ("sparse", "target_modules", "[q_proj, v_proj]", ("q_proj", "v_proj")),
        ("sparse", "target_modules", r"layers\.\d{1,2}\.self_attn", r"layers\.\d{1,2}\.self_attn"),
        ("sparse", "target_modules", "layers.[0,1].q_proj", "layers.[0,1].q_proj"),
        ("sparse", "target_modules", r"a\d{1,2}, b", (r"a\d{1,2}", "b")),
    ],
)
def test_yaml_guesses_no_types(section, name, text, meant, recipe) -> None:
    config = load(recipe(f"{section}:\n  {name}: {text}\n"), {"density": "0.1"})
    assert getattr(getattr(config, section), name) == meant


@pytest.mark.parametrize(("word", "meant"), [("on", True), ("off", False), ("ON", True), ("0", False), ("yes", True)])
def test_a_switch_is_told_on_or_off_on_the_command_line(word: str, meant: bool) -> None:
    assert load(None, {"density": "0.1", "packing": word}).data.packing is meant


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (
            "sparse:\n  density: 0.1\n  method: ag\n  density: 0.2\n",
            "line 4: 'density' is given again, first in line 2",
        ),
        (
            "run:\n  steps: 1\nsparse:\n  density: 1\nrun:\n  steps: 2\n",
            "line 5: 'run' is given again, first in line 1",
        ),
        (
            "sparse: {density: 0.1}\ndata: {train_data: {a.jsonl: 2}}\n",
            "train_data: got {'a.jsonl': '2'}, expected a list",
        ),
        ("sparse: {density: 0.1}\nmodel: {base: [a, b]}\n", "base: got ['a', 'b'], expected text"),
        ("sparse: {density: 0.1, target_modules: [a, [b]]}\n", "target_modules: got ['a', ['b']], expected"),
        ("sparse: {density: 0.1, target_modules: []}\n", "target_modules: got [], expected"),
        ("sparse: {density: 0.1}\nrun: {output_dir: ''}\n", "output_dir: got '', expected text"),
        ("sparse: {density: 0.1}\nrun: {output_dir:}\n", "output_dir: got None, expected text"),
    ],
)
def test_what_would_be_lost_without_a_word_is_refused(text: str, said: str, recipe) -> None:
    assert said in mistakes({}, recipe(text))


@pytest.mark.parametrize(
    "name", [f.name for kind in SECTIONS.values() for f in dataclasses.fields(kind) if f.metadata["path"]]
)
@pytest.mark.parametrize("text", ["~/x", "$PLACE/x", "${PLACE}/x"])
def test_home_and_environment_are_expanded_in_every_path(name: str, text: str, monkeypatch, recipe) -> None:
    monkeypatch.setenv("HOME", "/somewhere")
    monkeypatch.setenv("PLACE", "/somewhere")
    objective = "dpo" if OPTIONS[name] == "objective" else "sft"
    tree = {"sparse": {"density": 0.1}, "objective": {"objective": objective}}
    tree.setdefault(OPTIONS[name], {})[name] = text
    for config in (load(recipe(tree), {}), load(None, {"density": "0.1", "objective": objective, name: text})):
        assert getattr(getattr(config, OPTIONS[name]), name) == "/somewhere/x"
    assert f"{name}: got '~no-such-user/x', but this machine has no user 'no-such-user'" in mistakes(
        {name: "~no-such-user/x"}
    )
    assert f"{name}: got '$NO_SUCH/x', but the environment variable NO_SUCH is not" in mistakes({name: "$NO_SUCH/x"})


def test_every_one_of_several_sources_is_expanded_but_not_its_details(monkeypatch) -> None:
    monkeypatch.setenv("HOME", "/home/me")
    given = "~/a.jsonl?keep=kind:~/$b, data/~c.jsonl"
    assert load(None, {"density": "0.1", "train_data": given}).data.train_data == (
        "/home/me/a.jsonl?keep=kind:~/$b", "data/~c.jsonl",
    )  # fmt: skip


# --- resume -------------------------------------------------------------------------------------------------------


def test_what_a_resumed_run_may_change_is_a_promise() -> None:
    free = """
        resume save_every_steps keep_last on_save_failure log_every_steps eval_every_steps save_merged tracker
        output_dir skip_nonfinite_steps collective_timeout_seconds base_placement ds_config gradient_checkpointing
        micro_batch_size eval_batch_size trust_remote_code preprocess_workers cache_dir streaming answer_pattern
        generation_samples keep_best early_stopping_steps allow_randomness best_by
    """
    by_effect = """
        base revision train_data eval_data steps epochs density tunable_weights rank_equivalent target_modules
        chat_template start_from attention exclude_modules reference_adapter train_embeddings learning_rate
        warmup_fraction
    """
    assert set(free.split()) == FREE
    assert {*free.split(), *by_effect.split()} == MAY_CHANGE


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, ("random", "gradient", 0, None)),
        ({"method": "static"}, ("static", "balanced", 20, None)),
        ({"method": "static", "score": "snr", "learning_rate": "0.1"}, ("static", "snr", 20, 0.1)),
        ({"method": "static", "start_from": "."}, ("static", "gradient", 0, None)),
        ({"method": "static", "start_from": "none"}, ("static", "balanced", 20, None)),
        ({"method": "ag", "learning_rate": 0.5}, ("ag", "gradient", 0, 0.5)),
    ],
)
def test_a_method_brings_its_own_options_and_those_that_are_given_win(options, expected) -> None:
    config = load(None, {"density": 0.1, **options})
    sparse = config.sparse
    assert (sparse.method, sparse.score, sparse.selection_batches, config.optimizer.learning_rate) == expected


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({}, 8),
        ({"selection_pool": 3}, 3),
        ({"selection_pool": "none"}, None),
        ({"row_quota": 4}, None),
        ({"granularity": "column"}, None),
        ({"selection_batches": 0}, None),
    ],
)
def test_static_looks_at_a_pool_of_entries_unless_its_choice_needs_all(given, expected) -> None:
    assert load(None, {"method": "static", "density": 0.1, **given}).sparse.selection_pool == expected


@pytest.mark.parametrize(
    "given",
    [
        {"method": "ag"},
        {"method": "static", "column_quota": 4},
        {"method": "columns", "selection_batches": 2},
        {"method": "static", "selection_batches": 0},
    ],
)
def test_a_pool_that_nothing_is_chosen_from_is_refused(given) -> None:
    with pytest.raises(ConfigError, match="selection_pool: got"):
        load(None, {"density": 0.1, "selection_pool": 4, **given})
