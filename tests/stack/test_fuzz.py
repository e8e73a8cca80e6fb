"""Random training steps of random networks: the stack's gradient is autograd's, or it says why it is not.

`make fuzz` runs the same with thousands of networks.
"""

import pytest

from resode_cuda.module import GRADIENTS
from tests.support.fuzz.arguments import ARGUMENTS
from tests.support.fuzz.backwards import WAYS
from tests.support.fuzz.contexts import CONTEXTS
from tests.support.fuzz.events import EVENTS
from tests.support.fuzz.judge import faults, is_meaningful
from tests.support.fuzz.known import KNOWN, known
from tests.support.fuzz.networks import BLOCKS
from tests.support.fuzz.recipe import Recipe
from tests.support.fuzz.search import search

NETWORKS = {"adjoint": 900, "checkpoint": 200, "backprop": 60}
TABLES = {"block": BLOCKS, "arguments": ARGUMENTS, "context": CONTEXTS, "way": WAYS, "event": EVENTS}


@pytest.mark.parametrize("gradient", GRADIENTS)
def test_random_networks(gradient):
    search(gradient, NETWORKS[gradient])


@pytest.mark.parametrize("gradient", GRADIENTS)
@pytest.mark.parametrize("field", TABLES)
def test_every_feature_by_itself(field, gradient):
    recipes = [Recipe.of(f"{field}={name}", f"gradient={gradient}", "states=tokens") for name in TABLES[field]]
    found = {str(recipe): faults(recipe) for recipe in recipes if is_meaningful(recipe) and not known(recipe)}
    assert not {recipe: wrong for recipe, wrong in found.items() if wrong}


@pytest.mark.parametrize(
    "line",
    [
        pytest.param(line, marks=pytest.mark.xfail(reason=line.reason), id="-".join(sorted(line.features)))
        for line in KNOWN
    ],
)
def test_what_is_known_to_fail_still_does(line):
    assert faults(line.example) == []
