"""Chains of steps in loops that begin and end them anywhere, under every solver."""

import copy

import pytest
import torch

from resode_cuda import Reverse, convert
from tests.models import test_loops as loops
from tests.models.layers import Model
from tests.support.loops import rows
from tests.support.networks import relative_error

SOLVERS = {
    "8 bits, kept states": ({"anchors": {0, 3}}, 1e-3),
    "4 bits": ({"reverse": Reverse("stored", bits=4)}, 1e-2),
    "paper": ({"reverse": "paper"}, 1e-2),
    "corrected": ({"reverse": "corrected"}, 5e-3),
    "corrected, kept states": ({"reverse": "corrected", "anchors": {0, 3}}, 5e-3),
    "three corrections": ({"reverse": Reverse("step", 3)}, 1e-6),
    "extrapolated": ({"reverse": "extrapolated"}, 0.2),
}
"""Settings, and what their gradients are off by at most: about ten times what was measured."""


def nearly_at_rest():
    """A network that can be rebuilt: its layers move the state little."""
    torch.manual_seed(0)
    model = Model(6, dropout=0.2).double()
    with torch.no_grad():
        for layer in model.layers:
            layer.body[2].weight.mul_(0.05)
            layer.body[2].bias.mul_(0.05)
    return model


def trained(model, loop):
    model.loop = loop
    torch.manual_seed(2)
    model(rows()).square().sum().backward()
    return [parameter.grad for parameter in model.parameters()]


@pytest.mark.parametrize(
    "loop",
    [
        loops.collected,
        loops.scaled_between,
        loops.state_before_used,
        loops.left_early,
        loops.twins,
        loops.one_twice,
        loops.backwards,
        loops.stopped_gradients,
        loops.last_input_kept,
    ],
)
@pytest.mark.parametrize("solver", SOLVERS)
def test_gradients_are_as_good_as_the_solver(solver, loop):
    settings, most = SOLVERS[solver]
    plain = nearly_at_rest()
    model = convert(copy.deepcopy(plain), ["layers"], **settings)
    found, exact = trained(model, loop), trained(plain, loop)
    assert [a is None for a in found] == [b is None for b in exact]
    pairs = [(a, b) for a, b in zip(found, exact, strict=True) if b is not None]
    assert relative_error(*map(list, zip(*pairs, strict=True))) < most


def test_a_state_that_a_chain_ends_with_must_not_be_written():
    """Increments stored for it have a companion of their own; a solver that rebuilds needs the state itself."""
    model = convert(nearly_at_rest(), ["layers"], reverse="corrected")
    with pytest.raises(RuntimeError, match="modified in place"):
        trained(model, loops.written_between)
    stored = convert(nearly_at_rest(), ["layers"])
    assert (
        relative_error(trained(stored, loops.written_between), trained(nearly_at_rest(), loops.written_between)) < 1e-3
    )


def test_a_gradient_that_begins_where_nobody_holds_the_state_is_refused():
    model = convert(nearly_at_rest(), ["layers"])
    x = model.embedding(rows())
    for n, layer in enumerate(model.layers):
        x = layer(x)
        if n == 2:
            loss = (x * 1).sum()
    with pytest.raises(RuntimeError, match="rebuilt state must reach every step"):
        loss.backward()
