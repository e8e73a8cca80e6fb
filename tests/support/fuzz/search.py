"""The search for a recipe with faults, which hypothesis reduces to a simple one."""

from __future__ import annotations

import hypothesis
from hypothesis import HealthCheck, Phase, given, settings

from tests.support.fuzz.judge import faults
from tests.support.fuzz.recipe import Recipe
from tests.support.fuzz.strategies import recipes


def search(gradient: str, count: int, seed: int = 0) -> None:
    """Run `count` recipes, always the same for one seed.

    Raises:
        AssertionError: with the faults of a recipe. Its note is the recipe, to be pasted into `faults(...)`.
    """

    @hypothesis.seed(seed)
    @settings(
        max_examples=count,
        derandomize=True,
        deadline=None,
        database=None,
        phases=(Phase.generate, Phase.shrink),
        suppress_health_check=list(HealthCheck),
    )
    @given(recipe=recipes(gradient))
    def run(recipe: Recipe) -> None:
        found = faults(recipe)
        assert not found, found

    run()
