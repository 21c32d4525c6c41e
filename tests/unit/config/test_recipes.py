"""The shipped recipes: all load, and those of the paper hold its figures."""

from pathlib import Path

import pytest

from scale_sft.config.loading import load

ROOT = Path(__file__).parents[3]
RECIPES = sorted((ROOT / "scale_sft" / "recipes").glob("*.yaml"))

# Table 4: learning rate, rank whose parameters SFT matches, weight decay.
TABLE_4 = {
    "llama2_7b_ag": ("meta-llama/Llama-2-7b-hf", 1e-4, 64, 30),
    "llama2_7b_ma": ("meta-llama/Llama-2-7b-hf", 1e-3, 64, 0.3),
    "llama2_7b_static": ("meta-llama/Llama-2-7b-hf", 1e-4, 64, 30),
    "llama2_13b_ag": ("meta-llama/Llama-2-13b-hf", 1e-5, 64, 30),
    "llama2_13b_ma": ("meta-llama/Llama-2-13b-hf", 4e-4, 16, 0),
}


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda recipe: recipe.stem)
def test_recipe_loads_and_starts_with_the_line_that_launches_it(recipe):
    load(recipe, {})
    header = [line for line in recipe.read_text().splitlines() if line.startswith("#")]
    assert any("launch" in line and (recipe.name in line or "quickstart" in line) for line in header)


@pytest.mark.parametrize("name", TABLE_4)
def test_recipe_of_the_paper_holds_its_figures(name):
    loaded = load(ROOT / "scale_sft" / "recipes" / f"{name}.yaml", {})
    base, learning_rate, rank, weight_decay = TABLE_4[name]
    sparse, optimizer, run = loaded.sparse, loaded.optimizer, loaded.run
    assert (loaded.model.base, sparse.method) == (base, name.rsplit("_", 1)[1])
    assert (optimizer.learning_rate, optimizer.weight_decay) == (learning_rate, weight_decay)
    assert sparse.rank_equivalent == rank
    # Section 4.3
    assert (sparse.update_interval_steps, sparse.estimation_steps, sparse.initial_replacement_fraction) == (20, 5, 0.2)
    assert (optimizer.warmup_fraction, optimizer.lr_schedule, loaded.data.max_length) == (0.03, "linear", 2048)
    assert (run.epochs, run.global_batch_size) == (2, 128)
    assert sparse.target_modules is None, "all linear layers of the transformer blocks"


def test_every_recipe_of_the_paper_is_there():
    assert {recipe.stem for recipe in RECIPES} >= {"demo", *TABLE_4}
