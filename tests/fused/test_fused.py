"""The depth-fused ops in plain torch: their numbers, against autograd of the network and against `ResidualStack`.

What they cost is in test_fused_cost.py, what compilers and torch.func see of them in test_fused_compile.py.
"""

import pytest
import torch

from resode_cuda import ResidualMLP, Reverse
from resode_cuda.fused.activations import ACTIVATIONS
from resode_cuda.fused.norms import NORMS
from resode_cuda.fused.reference import passes as reference
from resode_cuda.fused.reference.plain import plain
from resode_cuda.reverse import PRESETS
from resode_cuda.schemes import SCHEMES
from tests.support.fused_networks import (
    EXACT,
    EXACT_EXTRAPOLATING,
    ROUNDING,
    TIGHT,
    fused_gradients,
    in_float64,
    network,
    plain_gradients,
    present,
    run,
    state,
    wanted,
    worst_error,
)
from tests.support.networks import block_count, gradients, half_square, parameters_of
from tests.support.stepped_network import SteppedNetwork

STEPS = (0.15, 0.3, 0.05, 0.2, 0.25)


SOLVERS = [EXACT, EXACT_EXTRAPOLATING, "checkpoint"]


SOLVER_IDS = ["step", "extrapolate", "checkpoint"]


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_converged_and_exact_gradients_are_those_of_autograd(scheme, activation, norm, bias):
    net = network(scheme, activation, norm, bias)
    x = state(net, 7)
    exact = plain_gradients(net, x)
    torch.testing.assert_close(run(net, x), plain(net, net.method(), x), rtol=ROUNDING, atol=ROUNDING)
    assert worst_error(fused_gradients(net, x), exact) < TIGHT
    assert worst_error(fused_gradients(net, x, "checkpoint"), exact) < ROUNDING


@pytest.mark.parametrize("solver", SOLVERS, ids=SOLVER_IDS)
@pytest.mark.parametrize("steps", [1, 2, 3, 5])
def test_unequal_steps_of_any_number(scheme, solver, steps):
    net = network(scheme, "gelu", "rms", steps=steps, step=STEPS[:steps])
    x = state(net, 7)
    assert worst_error(fused_gradients(net, x, solver), plain_gradients(net, x)) < TIGHT


@pytest.mark.parametrize("reverse", PRESETS)
def test_an_anchor_at_each_step_makes_every_solver_exact(scheme, reverse):
    net = network(scheme, "silu", "layer")
    x = state(net, 7)
    exact = plain_gradients(net, x)
    assert worst_error(fused_gradients(net, x, PRESETS[reverse], range(5)), exact) < ROUNDING
    assert worst_error(fused_gradients(net, x, PRESETS[reverse]), exact) > 1e-6


@pytest.mark.parametrize(
    ("solver", "activation", "norm"),
    [(EXACT, "tanh", None), (EXACT_EXTRAPOLATING, "gelu", "layer"), ("checkpoint", "silu", "rms")],
)
def test_gradcheck(scheme, solver, activation, norm):
    net = network(scheme, activation, norm, dim=2, hidden=3, steps=3)
    function = lambda x, *parameters: run(net.with_parameters(parameters), x, solver)  # noqa: E731
    assert torch.autograd.gradcheck(function, (state(net, 2), *net.parameters))


@pytest.mark.parametrize("solver", [EXACT, "checkpoint"], ids=["adjoint", "checkpoint"])
@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_narrow_dtypes_are_as_accurate_as_plain_autograd(scheme, solver, norm, dtype):
    net = network(scheme, "gelu", norm, dim=16, hidden=32, dtype=dtype)
    x = state(net, 33)
    wide, x_wide = in_float64(net, x)
    own = [plain(net, net.method(), x), *plain_gradients(net, x)]
    got = [run(net, x, solver), *fused_gradients(net, x, solver)]
    truth = [plain(wide, wide.method(), x_wide), *plain_gradients(wide, x_wide)]
    assert [tensor.dtype for tensor in got] == [x.dtype, x.dtype, *[dtype] * 4]
    for result, plain_result, exact in zip(got, own, truth, strict=True):
        band = torch.finfo(dtype).eps * exact.norm()
        assert (result - exact).norm() <= 2 * ((plain_result - exact).norm() + band)


@pytest.mark.parametrize("solver", SOLVERS, ids=SOLVER_IDS)
@pytest.mark.parametrize("needed", range(5), ids=["x", "weight_in", "bias_in", "weight_out", "bias_out"])
def test_one_gradient_alone(scheme, solver, needed):
    net = network(scheme)
    x = state(net, 7)
    for place, tensor in enumerate((x, *net.parameters)):
        tensor.requires_grad_(place == needed)
    assert worst_error(fused_gradients(net, x, solver), plain_gradients(net, x)) < TIGHT


UNCONVERGED = [
    {"reverse": "paper"},
    {"reverse": "corrected"},
    {"reverse": "extrapolated"},
    {"reverse": Reverse("step", 1, reuse=False)},
    {"reverse": Reverse("step", 2)},
    {"reverse": Reverse("step", 3, accelerate=False)},
    {"reverse": Reverse("extrapolate", 2), "anchors": 3},
    {"reverse": "paper", "anchors": 2},
    {"reverse": "corrected", "anchors": 2},
    {"reverse": "extrapolated", "anchors": 3},
    {"reverse": "corrected", "anchors": {0}},
    {"reverse": "extrapolated", "anchors": {1, 2}},
    {"reverse": "extrapolated", "anchors": {4}},
    {"reverse": "paper", "anchors": [3, 1]},
]


@pytest.mark.parametrize("step", [None, STEPS], ids=["equal", "unequal"])
@pytest.mark.parametrize("options", UNCONVERGED, ids=str)
def test_gradients_and_defects_are_those_of_a_residual_stack(float64, scheme, options, step):
    mlp = ResidualMLP(6, 10, 5, scheme, activation="silu", norm="rms", step=step, on_drift="ignore", **options)
    stack = mlp.to_blocks()
    x = torch.randn(7, 6, requires_grad=True)
    mine, theirs = ([x.grad, *run] for x, run in (gradients_and_defects(mlp, x), gradients_and_defects(stack, x)))
    for a, b in zip(mine, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=TIGHT, atol=1e-14)


def several_tiles(monkeypatch, net, x, rows=3):
    monkeypatch.setitem(reference.TILE_BYTES, "cpu", rows * net.hidden * net.weight_in.itemsize)
    assert reference._tile_rows(net, x) == rows


@pytest.mark.parametrize("norm", [None, "layer"])
@pytest.mark.parametrize("solver", [*PRESETS.values(), Reverse("step", 3), "checkpoint"], ids=str)
@pytest.mark.parametrize("anchors", [(), (0, 2, 4), (3,)])
def test_several_tiles_of_rows_give_the_same_as_one(monkeypatch, scheme, norm, solver, anchors):
    net = network(scheme, "gelu", norm)
    x, squares, tiled_squares = state(net, 7), *(torch.zeros(5, 2, dtype=torch.float64) for _ in range(2))
    whole = run(net, x, solver).detach(), *fused_gradients(net, x, solver, anchors, squares)
    several_tiles(monkeypatch, net, x)  # of 3, 3 and 1
    tiled = run(net, x, solver).detach(), *fused_gradients(net, x, solver, anchors, tiled_squares)
    assert worst_error(tiled, whole) < ROUNDING
    torch.testing.assert_close(tiled_squares.sqrt(), squares.sqrt(), rtol=TIGHT, atol=1e-14)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tiles", [1, 3])
@pytest.mark.parametrize(("steps", "length"), [(7, 1), (7, 2), (6, 3), (7, 4), (7, 7)])
def test_segments_of_the_depth_give_the_same_as_all_of_it(monkeypatch, scheme, dtype, tiles, steps, length):
    net = network(scheme, "tanh", "rms", steps=steps, dtype=dtype)
    x = state(net, 7)
    whole = fused_gradients(net, x, "checkpoint")
    monkeypatch.setattr(reference, "_segmented", lambda *_: (7 if tiles == 1 else 3, length))
    # In 16 bits the tiles' gradients are rounded before they are added up.
    tolerance = ROUNDING if dtype == torch.float64 else 20 * torch.finfo(dtype).eps
    assert worst_error(fused_gradients(net, x, "checkpoint"), whole) < tolerance


@pytest.mark.parametrize("rows", [1, 5, 2048])
@pytest.mark.parametrize("steps", [1, 2, 7, 64, 1000])
def test_what_the_exact_adjoint_keeps_is_bounded(scheme, rows, steps):
    layers = block_count(scheme, steps)
    weights = torch.empty(layers, 128, 64), torch.empty(layers, 64, 128)
    net = SteppedNetwork(weights[0], None, weights[1], None, "tanh", None, scheme, (1 / steps,) * steps)
    most, length = reference._segmented(net, net.method(), torch.empty(rows, 64))
    assert 1 <= length <= steps
    assert 1 <= most <= rows
    states = length * SCHEMES[scheme].blocks_per_step * (64 + 128) + -(-steps // length) * 64 * (length < steps)
    assert 4 * most * states <= reference.KEPT_BYTES["cpu"]


@pytest.mark.parametrize("solver", [*PRESETS.values(), EXACT, "checkpoint"], ids=str)
@pytest.mark.parametrize("shape", [(), (1,), (0,), (2, 3), (2, 0, 3), (1, 2, 1, 3)], ids=str)
def test_any_leading_shape(scheme, solver, shape):
    net = network(scheme, norm="layer")
    x = state(net, *shape)
    rows = x.detach().reshape(-1, 6).requires_grad_()
    out = run(net, x, solver, (0, 2))
    assert out.shape == x.shape
    assert out.is_contiguous()
    got, expected = fused_gradients(net, x, solver, (0, 2)), fused_gradients(net, rows, solver, (0, 2))
    assert [a.shape for a in got] == [x.shape, *(p.shape for p in net.parameters)]
    # Accelerated, rows of one sample are mixed together, and end where they would end alone.
    tolerance = TIGHT if solver is EXACT else 0
    expected = [expected[0].view(x.shape), *expected[1:]]
    torch.testing.assert_close(list(got), expected, rtol=tolerance, atol=tolerance)
    if not x.numel():
        assert not any(gradient.any() for gradient in got)


LAYOUTS = {
    "transposed": lambda t: t.detach().mT.contiguous().mT if t.dim() > 1 else t.detach(),
    "every second": lambda t: torch.stack([t.detach(), t.detach()], -1).flatten(-2)[..., ::2],
    "expanded": lambda t: t.detach()[:1].expand(t.shape),
}


@pytest.mark.parametrize("solver", SOLVERS, ids=SOLVER_IDS)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("which", ["x", "parameters"])
def test_operands_that_are_not_contiguous(scheme, solver, layout, which):
    net = network(scheme)
    x = state(net, 7)
    if which == "x":
        x = LAYOUTS[layout](x).requires_grad_()
        assert not x.is_contiguous()
    else:
        net = net.with_parameters([LAYOUTS[layout](p).requires_grad_() for p in net.parameters])
        assert not any(p.is_contiguous() for p in present(net))
    assert worst_error(fused_gradients(net, x, solver), plain_gradients(net, x)) < TIGHT


@pytest.mark.parametrize("solver", [*PRESETS.values(), Reverse("step", 3), "checkpoint"], ids=str)
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_nothing_of_the_users_is_overwritten(scheme, solver, dtype):
    net = network(scheme, norm="rms", dtype=dtype)
    x, out = state(net, 7), None
    out = run(net, x, solver, (0, 2))
    g = torch.randn_like(out)
    theirs = [x, out, g, *present(net)]
    before = [(tensor.detach().clone(), tensor._version) for tensor in theirs]
    torch.autograd.grad(out, wanted(net, x), g)
    for tensor, (values, version) in zip(theirs, before, strict=True):
        assert torch.equal(tensor, values)
        assert tensor._version == version
    assert len({tensor.untyped_storage().data_ptr() for tensor in (x, out)}) == 2


@pytest.mark.parametrize("solver", [*PRESETS.values(), "checkpoint"], ids=str)
def test_a_second_backward_pass_through_a_retained_graph_gives_the_same(solver):
    net = network()
    x = state(net, 7)
    loss = half_square(run(net, x, solver))
    first, second = (torch.autograd.grad(loss, wanted(net, x), retain_graph=True) for _ in range(2))
    assert all(map(torch.equal, first, second))


@pytest.mark.parametrize("solver", SOLVERS, ids=SOLVER_IDS)
@pytest.mark.parametrize("place", range(4))
def test_parameters_must_not_change_between_forward_and_backward(solver, place):
    net = network()
    loss = half_square(run(net, state(net, 7), solver))
    with torch.no_grad():
        net.parameters[place].mul_(2)
    with pytest.raises(RuntimeError, match=r"^mlp_stack: between forward and backward neither .* nor a parameter may"):
        loss.backward()


@pytest.mark.parametrize("norm", NORMS)
def test_small_cotangents_in_float16_are_not_lost_to_the_step(scheme, norm):
    """Ten of its smallest values, which h = 1/200 would round away."""
    net = network(scheme, "silu", norm, steps=4, step=(1 / 200,) * 4, dtype=torch.float16)
    x = state(net, 50)
    g = 10 * torch.finfo(torch.float16).smallest_normal * torch.randn(50, net.dim)
    wide, wide_x = in_float64(net, x)
    exact = torch.autograd.grad(plain(wide, wide.method(), wide_x), present(wide), g.double())
    found = torch.autograd.grad(run(net, x, "checkpoint"), present(net), g)
    # In units that float16 has: the gradients are smaller than its own.
    torch.testing.assert_close(found[0].double(), exact[0], rtol=0.02, atol=2 * 2.0**-24)


def gradients_and_defects(module, x):
    """Gradients of the parameters, stacked over layers, of either kind of module, and the defects."""
    out = module(x)
    if isinstance(module, ResidualMLP):
        x_grad, *found = gradients(lambda: out, [x, *module.parameters()])
    else:
        parameters = parameters_of(list(module))
        x_grad, *each = gradients(lambda: out, [x, *parameters])
        found = [torch.stack(each[place::4]) for place in range(4)]
    measures = module.reverse.reuse  # a stack tells of its increments without it, a ResidualMLP of nothing
    return x_grad, [out, *found, *([module.drift.defects] if measures else [])]
