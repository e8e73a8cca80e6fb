"""The depth-fused ops as they are registered: what they return, and the errors for bad operands."""

from contextlib import nullcontext

import pytest
import torch
from torch._subclasses import FakeTensorMode
from torch.autograd import forward_ad

from resode_cuda.fused.signature import KEPT, StackAdjointOperands, StackOperands
from resode_cuda.fused.storage import unfilled
from resode_cuda.method import Method
from resode_cuda.schemes import Euler
from tests.support.fused_networks import (
    TIGHT,
    network,
    plain_gradients,
    run,
    state,
    worst_error,
)


def arguments(net, x, predictor="step", anchors=()):
    solver = predictor, 0, True, False, [], False, list(anchors)
    fields = net.activation, net.norm, net.scheme, list(net.steps)
    return StackOperands(x, *net.parameters, *fields, *solver, "adjoint", "torch", None)


def nothing_stored(x):
    return unfilled(Method(Euler, (0.2,) * 5), x)


def test_increments_and_anchored_states_have_no_gradients():
    net = network()
    x_last, increments, anchored, *_ = torch.ops.resode.mlp_stack(
        *arguments(net, state(net, 7), "extrapolate", (0, 2, 4))
    )
    assert increments.shape == (2, 7, 6)
    assert anchored.shape == (3, 7, 6)
    with pytest.raises(RuntimeError, match="mlp_stack: only x_last has a gradient, got one for another result"):
        (x_last.sum() + increments.sum()).backward()


@pytest.mark.parametrize("wants_parameters", [True, False])
@pytest.mark.parametrize("wants_input", [True, False])
def test_the_adjoint_returns_what_it_is_asked_for(scheme, wants_parameters, wants_input):
    net = network(scheme, bias=False)
    x = state(net, 7).detach()
    with torch.no_grad():
        x_last = run(net, x)
        fields = *net.parameters, net.activation, net.norm, net.scheme, list(net.steps)
        solver, empty = ("step", 30, True, True, [], False, []), x.new_empty(0, 7, 6)
        g, *found, squares, x_first = torch.ops.resode.mlp_stack_adjoint(
            x_last, x_last, empty, empty, *nothing_stored(x), *fields, *solver, wants_parameters, wants_input, "torch"
        )
    exact = plain_gradients(net, x.requires_grad_())
    assert worst_error([g], exact[:1]) < TIGHT
    assert [gradient.numel() > 0 for gradient in found] == [wants_parameters, False, wants_parameters, False]
    assert squares.shape == (5, 2)
    if wants_input:
        torch.testing.assert_close(x_first, x, rtol=TIGHT, atol=TIGHT)
        torch.testing.assert_close(squares[0, 1], x.square().sum(), rtol=TIGHT, atol=0)
    else:
        assert x_first.numel() == 0


@pytest.mark.parametrize("mode", ["real", "fake"])
@pytest.mark.parametrize(
    ("name", "value", "error", "message"),
    [
        (
            "x",
            torch.zeros(7, 5, dtype=torch.float64),
            ValueError,
            r"x must have shape \[\*, 6\], as weight_in \[5, 10, 6\] says",
        ),
        (
            "x",
            torch.zeros(7, 6),
            TypeError,
            "x must be float64, the dtype of states with float64 parameters, got float32",
        ),
        (
            "weight_out",
            torch.zeros(5, 6, 9, dtype=torch.float64),
            ValueError,
            r"weight_out must have shape \[5, 6, 10\]",
        ),
        ("steps", [0.2] * 4, ValueError, "step must give h for each of 5 steps, got 4"),
        ("steps", [0.2] * 4 + [-0.2], ValueError, "step must be positive and finite in float64, got -0.2; leave it"),
        ("scheme", "midpoint", ValueError, r"scheme must be one of \('euler', 'heun'\), got 'midpoint'"),
        ("gradient", "backprop", ValueError, 'gradient must be "adjoint" or "checkpoint", got \'backprop\''),
        ("anchors", [5], ValueError, r"anchors must be ascending numbers of the 5 steps, got \[5\]"),
        ("anchors", [2, 1], ValueError, r"anchors must be ascending numbers of the 5 steps, got \[2, 1\]"),
    ],
)
def test_errors_say_what_must_hold(mode, name, value, error, message):
    net = network()
    values = arguments(net, state(net, 7).detach())._replace(**{name: value})
    where = nullcontext() if mode == "real" else FakeTensorMode(allow_non_fake_inputs=True)
    with where, pytest.raises(error, match=f"^mlp_stack: {message}"):
        torch.ops.resode.mlp_stack(*values)


@pytest.mark.parametrize("mode", ["real", "fake"])
@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"g": torch.zeros(6, 6).double()}, ValueError, r"g must have shape \[7, 6\] with a state \[7, 6\], got"),
        ({"g": torch.zeros(7, 6)}, TypeError, "g must be float64, got float32; convert it"),
        ({"increments": torch.zeros(1, 7, 6).double()}, ValueError, r"increments must have shape \[2, 7, 6\]"),
        ({"anchored": torch.zeros(2, 7, 6).double()}, ValueError, r"anchored must have shape \[1, 7, 6\]"),
        ({"anchored": torch.zeros(1, 6, 6).double()}, ValueError, r"anchored must have shape \[1, 7, 6\]"),
    ],
    ids=str,
)
def test_operands_of_the_backward_ops_must_fit(mode, change, error, message):
    net = network()
    net = net.with_parameters([p.detach() for p in net.parameters])
    x, g = state(net, 7).detach(), state(net, 7).detach()
    layers = *net.parameters, net.activation, net.norm, net.scheme, list(net.steps)
    states = torch.ops.resode.mlp_stack(*arguments(net, x, "extrapolate", (2,)))
    given = {"g": g, **dict(zip(KEPT, states[:-1], strict=True)), **change}
    solver = "extrapolate", 0, True, False, [], False, [2]
    calls = [("mlp_stack_adjoint", (*given.values(), *layers, *solver, True, True, "torch"))]
    if "g" in change:
        calls.append(("mlp_stack_exact_adjoint", (given["g"], x, *layers, True, "torch")))
    for name, operands in calls:
        where = nullcontext() if mode == "real" else FakeTensorMode(allow_non_fake_inputs=True)
        with where, pytest.raises(error, match=f"^{name}: {message}"):
            getattr(torch.ops.resode, name)(*operands)


@pytest.mark.parametrize("mode", ["real", "fake"])
@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"companions": torch.zeros(1, 7, 6).double()}, ValueError, r"companions must have shape \[2, 7, 6\]"),
        ({"units": torch.zeros(2, 7, 1)}, TypeError, "units must be float64, got float32; convert it"),
        ({"scales": torch.zeros(4, 7, 1).double()}, TypeError, "scales must be uint8, got float64"),
        ({"packed": torch.zeros(7, dtype=torch.uint8)}, ValueError, r"packed must have shape \[448\] .*, got \[7\]"),
        ({"predictor": "step"}, ValueError, "x_last must be given unless increments are stored, got None; pass x_N"),
    ],
    ids=str,
)
def test_what_is_stored_must_fit(mode, change, error, message):
    net = network()
    net = net.with_parameters([p.detach() for p in net.parameters])
    x = state(net, 7).detach()
    o = arguments(net, x, "stored", (2,))._replace(bits=[4])
    kept = dict(zip(KEPT, torch.ops.resode.mlp_stack(*o)[:-1], strict=True))
    shared = {name: value for name, value in o._asdict().items() if name in StackAdjointOperands._fields}
    given = {**shared, **kept, "g": x, "x_last": None, "wants_parameters": True, "wants_input": True, **change}
    if "predictor" in change:
        given["bits"] = []
    where = nullcontext() if mode == "real" else FakeTensorMode(allow_non_fake_inputs=True)
    with where, pytest.raises(error, match=f"^mlp_stack_adjoint: {message}"):
        torch.ops.resode.mlp_stack_adjoint(*StackAdjointOperands(**given))


def dual(f, x):
    with forward_ad.dual_level():
        return f(forward_ad.make_dual(x, x))


OTHER_DERIVATIVES = {
    "dual tensors": dual,
    "torch.func.jvp": lambda f, x: torch.func.jvp(f, (x,), (x,)),
    "torch.func.grad": lambda f, x: torch.func.grad(lambda x: f(x).sum())(x),
    "jacfwd": lambda f, x: torch.func.jacfwd(f)(x),
}


@pytest.mark.parametrize("wants_parameters", [False, True])
@pytest.mark.parametrize("transform", OTHER_DERIVATIVES.values(), ids=OTHER_DERIVATIVES)
@pytest.mark.parametrize("name", ["mlp_stack", "mlp_stack_adjoint", "mlp_stack_exact_adjoint"])
def test_derivatives_that_the_ops_lack_are_not_lost_in_silence(name, transform, wants_parameters):
    net = network()
    x, empty = state(net, 7).detach(), torch.empty(0, 7, 6, dtype=torch.float64)
    if not wants_parameters:
        net = net.with_parameters([p.detach() for p in net.parameters])
    layers = *net.parameters, net.activation, net.norm, net.scheme, list(net.steps)
    solver = "step", 0, True, False, [], False, []
    run_op = {
        "mlp_stack": lambda x: torch.ops.resode.mlp_stack(*arguments(net, x)),
        "mlp_stack_adjoint": lambda g: torch.ops.resode.mlp_stack_adjoint(
            g, x, empty, empty, *nothing_stored(x), *layers, *solver, True, True, "torch"
        ),
        "mlp_stack_exact_adjoint": lambda g: torch.ops.resode.mlp_stack_exact_adjoint(g, x, *layers, True, "torch"),
    }[name]
    expected = rf'^{name}: derivatives must be those of reverse mode, got a torch\.func .*use gradient="backprop" of a'
    with pytest.raises(RuntimeError, match=expected):
        transform(lambda x: run_op(x)[0], x)


def test_the_place_for_squares_must_fit():
    net = network()
    for squares, error in ((torch.zeros(4, 2).double(), ValueError), (torch.zeros(5, 2), TypeError)):
        with pytest.raises(error, match=r"^mlp_stack: squares must"):
            torch.ops.resode.mlp_stack(*arguments(net, state(net, 7))._replace(squares=squares))
