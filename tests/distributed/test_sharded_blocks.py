"""Stacks whose blocks torch's `fully_shard` shards one by one, on two and three ranks."""

import pytest

from resode_cuda.schemes import SCHEMES
from tests.support.modes import MODES
from tests.support.sharded import KINDS, WAYS, assert_same, errors


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("mode", MODES)
def test_gradients_are_those_of_the_joined_batch(ranks, scheme, kind, mode):
    assert_same(ranks.run(errors, scheme, MODES[mode], kind), mode)


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("mode", ["exact", "stored", "checkpoint"])
def test_however_modules_are_sharded(ranks, scheme, way, mode):
    assert_same(ranks.run(errors, scheme, MODES[mode], "twice", way, count=3), mode)
