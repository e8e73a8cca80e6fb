"""A third scheme, one class and an entry in `SCHEMES`, as CONTRIBUTING says: right in a stack, refused elsewhere."""

import itertools

import pytest
import torch

from resode_cuda import ResidualMLP, ResidualStack, Reverse, functional
from resode_cuda.fused.network import Network
from resode_cuda.method import Method
from resode_cuda.reverse import PRESETS
from resode_cuda.schemes import SCHEMES
from tests.support.exact import EXACT, TIGHT
from tests.support.networks import Midpoint, gradients, mlps, parameters_of, relative_error

pytestmark = pytest.mark.usefixtures("float64")


@pytest.fixture(autouse=True)
def _registered(monkeypatch):
    monkeypatch.setitem(SCHEMES, Midpoint.name, Midpoint)


def plain(blocks, x):
    h = 1 / (len(blocks) - 1)
    for f, f_next in itertools.pairwise(blocks):
        x = x + h * f_next(x + 0.5 * h * f(x))
    return x


@pytest.mark.parametrize(
    "options", [{"anchors": {0, 2}}, {"gradient": "checkpoint"}, {"gradient": "backprop"}, {}], ids=str
)
def test_a_stack_computes_it(options):
    blocks, x = mlps("heun", 5), torch.randn(4, 6, requires_grad=True)
    stack, wanted = ResidualStack(blocks, "midpoint", reverse=EXACT, **options), [x, *parameters_of(blocks)]
    torch.testing.assert_close(stack(x), plain(blocks, x))
    exact = gradients(lambda: plain(blocks, x), wanted)
    assert relative_error(gradients(lambda: stack(x), wanted), exact) < TIGHT


@pytest.mark.parametrize("reverse", PRESETS)
def test_every_solver_rebuilds_it(reverse):
    blocks, x = mlps("heun", 32), torch.randn(4, 6)
    stack = ResidualStack(blocks, "midpoint", reverse=reverse, on_drift="ignore")
    exact = gradients(lambda: plain(blocks, x), parameters_of(blocks))
    assert 0 < relative_error(gradients(lambda: stack(x), parameters_of(blocks)), exact) < 0.2
    assert relative_error([stack.invert(stack(x))], [x]) < 0.2


def test_the_depth_fused_formulas_refuse_what_they_do_not_have():
    with pytest.raises(ValueError, match=r"^ResidualMLP: scheme must be one of \('euler', 'heun'\), got 'midpoint'"):
        ResidualMLP(6, 10, 3, "midpoint")
    weights, x = (torch.randn(4, 10, 6), None, torch.randn(4, 6, 10), None), torch.randn(2, 6)
    with pytest.raises(ValueError, match=r"^residual_mlp: scheme must be one of \('euler', 'heun'\), got 'midpoint'"):
        functional.residual_mlp(x, *weights, "midpoint")
    network, method = Network(*weights, "relu", None), Method(Midpoint, (0.3,) * 3, Reverse())
    with pytest.raises(ValueError, match=r"^here: scheme must be one of \('euler', 'heun'\), got 'midpoint'"):
        network.check("here", method, x)
    solver = "step", 0, True, False, [], False, []
    with pytest.raises(ValueError, match=r"^mlp_stack: scheme must be one of \('euler', 'heun'\), got 'midpoint'"):
        torch.ops.resode.mlp_stack(
            x, *weights, "relu", None, "midpoint", method.steps, *solver, "adjoint", "auto", None
        )
    with pytest.raises(ValueError, match=r"got 'midpoint'"):
        ResidualMLP.from_blocks(ResidualStack(ResidualMLP(6, 10, 4).to_blocks(), "midpoint"))
