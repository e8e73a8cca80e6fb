"""Leaves that blocks make themselves are their own affair; tensors with gradients from elsewhere are refused."""

import math

import numpy as np
import pytest
import torch
from torch import nn

from resode_cuda import ResidualStack
from resode_cuda.schemes import SCHEMES
from tests.support.exact import EXACT
from tests.support.networks import block_count, half_square, mlp, parameters_of, plain, relative_error
from tests.support.stateful import assert_same_buffers, plain_twin, train_step

pytestmark = [
    pytest.mark.usefixtures("float64"),
    pytest.mark.parametrize("scheme", SCHEMES),
]

MODES = {
    "adjoint": {"reverse": EXACT},
    "paper": {"reverse": "paper", "anchors": 1},
    "extrapolated": {"reverse": "extrapolated", "anchors": 1},
    "checkpoint": {"gradient": "checkpoint"},
}
STEPS = 4


class WithBody(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = mlp()


class Energy(WithBody):
    """Minus the gradient of an energy at a copy of the state."""

    def forward(self, x):
        with torch.enable_grad():
            point = x.clone().requires_grad_()
            return -torch.autograd.grad(self.body(point).square().sum(), point, create_graph=True)[0]


class DetachedEnergy(WithBody):
    """The same at a leaf of its own, through which nothing depends on the state."""

    def forward(self, x):
        with torch.enable_grad():
            point = x.detach().requires_grad_()
            force = torch.autograd.grad(self.body(point).square().sum(), point, create_graph=True)[0]
        return x.tanh() - force


class Hamiltonian(WithBody):
    """A Hamiltonian's vector field, at the state itself where that has gradients."""

    def forward(self, x):
        with torch.enable_grad():
            point = x if x.requires_grad else x.clone().requires_grad_()
            gradient = torch.autograd.grad(self.body(point).square().sum(), point, create_graph=True)[0]
        position, momentum = gradient.chunk(2, dim=-1)
        return torch.cat([momentum, -position], dim=-1)


class Perturbed(WithBody):
    """Two leaves made from nothing: one that is used as it is, and one that is differentiated for."""

    def forward(self, x):
        shift = torch.ones(6, requires_grad=True)
        with torch.enable_grad():
            scale = torch.ones(6, requires_grad=True)
            slope = torch.autograd.grad(self.body(x * scale).sum(), scale, create_graph=True)[0]
        return (self.body(x) + shift) * slope.tanh()


class Counted(nn.Module):
    """Depends on a counter, and on NumPy's numbers."""

    def __init__(self):
        super().__init__()
        self.calls = 0

    def forward(self, x):
        self.calls += 1
        return x * math.cos(self.calls) + np.random.rand()


BLOCKS = [Energy, DetachedEnergy, Hamiltonian, Perturbed]


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("block", BLOCKS)
@pytest.mark.parametrize("needs", [True, False], ids=["input with gradients", "input without"])
def test_leaves_of_the_blocks_own_are_right(scheme, mode, block, needs):
    blocks = [block() for _ in range(block_count(scheme, STEPS))]
    x = torch.randn(5, 6, requires_grad=needs)
    inputs = parameters_of(blocks) + [x] * needs
    out = plain(blocks, scheme, x)
    exact = torch.autograd.grad(half_square(out), inputs)
    got = ResidualStack(blocks, scheme, **MODES[mode])(x)
    assert torch.equal(got, out)
    assert relative_error(torch.autograd.grad(half_square(got), inputs), exact) < 1e-11


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("block", [Energy, DetachedEnergy])
@pytest.mark.parametrize("state", [lambda: nn.Dropout(0.5), lambda: nn.BatchNorm1d(6), Counted])
def test_blocks_that_differentiate_inside_may_have_state(scheme, mode, block, state):
    """Under checkpointing an inner gradient runs the step again while it still runs for the first time."""
    blocks, x = [block() for _ in range(block_count(scheme, STEPS))], torch.randn(5, 6)
    for each in blocks:
        each.body.append(state())
    stack, (twin, run) = ResidualStack(blocks, scheme, **MODES[mode]), plain_twin(blocks, scheme)
    found = []
    for module, forward in ((twin, run), (stack, stack)):
        np.random.seed(0)
        found.append((train_step(forward, module, x), torch.get_rng_state(), np.random.rand()))
    assert relative_error(found[1][0], found[0][0]) < 1e-9
    assert torch.equal(found[1][1], found[0][1])
    assert found[1][2] == found[0][2]
    assert_same_buffers(stack, twin)


class Smuggling(WithBody):
    """Uses a tensor that the stack does not know of, beside a leaf of its own."""

    def __init__(self, secret):
        super().__init__()
        self.secrets = [secret]

    def forward(self, x):
        return self.body(x) * torch.ones(6, requires_grad=True) * self.secrets[0]


@pytest.mark.parametrize("needs", [True, False], ids=["input with gradients", "input without"])
@pytest.mark.parametrize("place", [0, 2])
def test_a_smuggled_tensor_is_refused_beside_a_leaf_of_the_blocks_own(scheme, needs, place):
    leaf = torch.randn(6, requires_grad=True)
    for secret in (leaf, leaf * 2):
        blocks = [mlp() for _ in range(block_count(scheme, STEPS))]
        blocks[place] = Smuggling(secret)
        stack, x = ResidualStack(blocks, scheme), torch.randn(5, 6, requires_grad=needs)
        with pytest.raises(RuntimeError, match=r"of shape \[6\] that needs gradients and is neither their parameter"):
            half_square(stack(x)).backward()
        blocks[place].secrets = [secret.detach()]
        half_square(stack(x)).backward()


class Ungraded(WithBody):
    """Differentiates inside without a word about gradients, as one may where they are always on."""

    def forward(self, x):
        x = x.clone().requires_grad_()
        return torch.autograd.grad(self.body(x).sum(), x, create_graph=True)[0]


def test_blocks_that_differentiate_where_gradients_are_off_are_told_how(scheme):
    stack = ResidualStack([Ungraded() for _ in range(3)], scheme)
    with pytest.raises(
        RuntimeError, match=r"block 0 must enable gradients where it differentiates, .* torch.enable_grad"
    ):
        stack(torch.randn(4, 6))
