from pathlib import Path

import pytest

from align.recipe.recipe import load

RECIPES = sorted({path.parent for path in (Path(__file__).parents[2] / "recipes").glob("*/[0-9]*_*.yaml")})


def test_there_are_recipes():
    assert "demo" in [folder.name for folder in RECIPES]


@pytest.mark.parametrize("folder", RECIPES, ids=lambda folder: folder.name)
def test_every_recipe_loads(folder):
    recipe = load(folder)
    names = [step.name for step in recipe.steps]
    assert sorted(folder.glob("*.yaml")) == sorted(step.file for step in recipe.steps)
    for step in recipe.steps:
        assert all(names.index(needed) < names.index(step.name) for needed in step.needs)


@pytest.mark.parametrize("folder", RECIPES, ids=lambda folder: folder.name)
def test_the_seed_of_every_stage_can_be_set_at_once(folder):
    assert {step.config.seed for step in load(folder, ["*.seed=7"]).steps} == {7}
