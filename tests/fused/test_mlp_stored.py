"""`ResidualMLP` with stored increments, in plain torch: its numbers, against autograd and against `ResidualStack`."""

import pytest
import torch

from resode_cuda import ResidualMLP, Reverse, stored
from resode_cuda.functional import residual_mlp
from resode_cuda.fused.reference import passes as reference
from resode_cuda.fused.reference.plain import layer_function
from resode_cuda.method import Method
from resode_cuda.schemes import SCHEMES, Euler
from tests.support.fused_networks import (
    ROUNDING,
    TIGHT,
    fused_gradients,
    in_float64,
    network,
    plain_gradients,
    run,
    state,
    wanted,
    worst_error,
)
from tests.support.networks import gradients, half_square

WILD = (1.0,) * 5
ANCHORS = [(), (0,), (0, 1, 4), (2,), (4,), range(5)]


def bits(number, **options):
    return Reverse("stored", bits=number, **options)


@pytest.mark.parametrize("dim", [1, 7, 32, 33, 96])
def test_the_gradients_error_halves_with_each_bit(scheme, dim):
    net = network(scheme, "silu", "rms" if dim > 1 else None, dim=dim, hidden=24, step=WILD)
    x = state(net, 16)
    exact = plain_gradients(net, x)
    errors = {b: worst_error(fused_gradients(net, x, bits(b)), exact) for b in stored.BITS}
    assert errors[8] < 4e-3
    # A single value is as large as its group's largest, which has the finest integers.
    assert 0.4 < errors[2] / errors[8] / 2**6 < (2.5 if dim > 1 else 10)
    assert errors[1] < 0.7


@pytest.mark.parametrize("anchors", ANCHORS, ids=str)
@pytest.mark.parametrize("solver", [bits(4), bits((8, 1, 3, 2, 6)), bits(6, rounded_forward=True)], ids=str)
@pytest.mark.parametrize(("dim", "norm"), [(7, None), (33, "layer")])
def test_gradients_and_defects_are_those_of_a_residual_stack(float64, scheme, solver, anchors, dim, norm):
    mlp = ResidualMLP(dim, 10, 5, scheme, norm=norm, step=1.0, reverse=solver, anchors=anchors, on_drift="ignore")
    stack = mlp.to_blocks()
    x = torch.randn(9, dim, requires_grad=True)
    x_gradient, *each = gradients(lambda: stack(x), [x, *stack.parameters()])
    expected = [x_gradient, *(torch.stack(each[place::4]) for place in range(4))]
    got = gradients(lambda: mlp(x), [x, *mlp.parameters()])
    torch.testing.assert_close(list(got), expected, rtol=TIGHT, atol=TIGHT)
    torch.testing.assert_close(mlp.drift.defects, stack.drift.defects, rtol=TIGHT, atol=1e-15)
    assert (mlp.drift.defects > 0).tolist() == [n not in anchors for n in range(5)]


class RoundingAsIdentity(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, rounded):
        return rounded

    @staticmethod
    def backward(ctx, g):
        return g, None


def rounded_network(net, x, method):
    """x_N by the network whose layers see the companion, for autograd."""
    functions = [layer_function(net, n) for n in range(net.layers)]
    companion = unit = None
    for n, h in enumerate(method.steps):
        if method.is_anchored(n):
            start = x
        else:
            if companion is None:
                companion, unit = stored.start(x.detach())
            start = RoundingAsIdentity.apply(x, companion)
        x = method.scheme.add(x, method.scheme.stages(functions[method.blocks_of(n)], start, h), h)
        if method.is_anchored(n):
            companion, unit = stored.start(x.detach())
        else:
            companion, _, _ = stored.store(x.detach(), companion, unit, method.solver.bits_of(n))
    return x


@pytest.mark.parametrize("solver", [*map(bits, stored.BITS), bits((8, 1, 3, 2, 6))], ids=str)
@pytest.mark.parametrize("anchors", ANCHORS, ids=str)
def test_the_rounded_networks_gradient_is_exact(scheme, solver, anchors):
    net = network(scheme, "gelu", "layer", dim=33, step=WILD)
    x, rounded = state(net, 5), Reverse("stored", bits=solver.bits, rounded_forward=True)
    expected = rounded_network(net, x, net.method(rounded, anchors))
    torch.testing.assert_close(run(net, x, rounded, anchors), expected, rtol=TIGHT, atol=TIGHT)
    exact = torch.autograd.grad(half_square(expected), wanted(net, x))
    assert worst_error(fused_gradients(net, x, rounded, anchors), exact) < TIGHT


def test_without_gradients_the_plain_network_runs():
    mlp = ResidualMLP(33, 10, 5, step=1.0, reverse=bits(2, rounded_forward=True), on_drift="ignore")
    x = torch.randn(5, 33)
    with torch.no_grad():
        exact = mlp(x)
    rounded = mlp(x)
    mlp.reverse = bits(2)
    assert torch.equal(mlp(x), exact)
    assert not torch.equal(rounded, exact)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("number", stored.BITS)
def test_companions_come_back_to_the_last_bit(monkeypatch, scheme, dtype, number):
    seen = []
    monkeypatch.setattr(reference.RowTile, "store", recording(seen, reference.RowTile.store, 1))
    monkeypatch.setattr(reference.RowTile, "take_back", recording(seen, reference.RowTile.take_back))
    net = network(scheme, dim=40, steps=9, step=(1.0,) * 9, dtype=dtype)
    x = state(net, 6)
    half_square(run(net, x, bits(number), (3,))).backward()
    forward, backward = seen[:8], seen[8:][::-1]
    assert len(backward) == 8
    assert all(map(torch.equal, forward, backward))
    assert len({tuple(companion.flatten().tolist()) for companion in forward}) == 8


def recording(seen, method, place=None):
    """The method, after which its operand at a place, or what it returned, is among those seen."""

    def call(self, *operands):
        result = method(self, *operands)
        seen.append((result if place is None else operands[place]).clone())
        return result

    return call


@pytest.mark.parametrize("solver", [bits(4), bits((8, 1, 3, 2, 6), rounded_forward=True)], ids=str)
def test_several_tiles_of_rows_give_the_same_as_one(monkeypatch, scheme, solver):
    net = network(scheme, "gelu", "layer", dim=33)
    x, squares, tiled_squares = state(net, 7), *(torch.zeros(5, 2, dtype=torch.float64) for _ in range(2))
    whole = run(net, x, solver).detach(), *fused_gradients(net, x, solver, (2,), squares)
    monkeypatch.setattr(reference, "_tile_rows", lambda *_: 3)
    tiled = run(net, x, solver).detach(), *fused_gradients(net, x, solver, (2,), tiled_squares)
    assert worst_error(tiled, whole) < ROUNDING
    torch.testing.assert_close(tiled_squares.sqrt(), squares.sqrt(), rtol=TIGHT, atol=1e-14)


@pytest.mark.parametrize("shape", [(), (0,), (1,), (2, 3), (2, 0, 3)], ids=str)
def test_a_row_is_a_sample_whatever_the_shape(float64, scheme, shape):
    mlp = ResidualMLP(33, 10, 4, scheme, step=1.0, reverse=bits(3), on_drift="ignore")
    x = torch.randn(*shape, 33, requires_grad=True)
    rows = x.detach().reshape(-1, 33).requires_grad_()
    got, expected = (gradients(lambda y=y: mlp(y), [y, *mlp.parameters()]) for y in (x, rows))
    assert torch.equal(got[0].view(rows.shape), expected[0])
    assert all(map(torch.equal, got[1:], expected[1:]))
    assert got[0].isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_narrow_dtypes_are_as_accurate_as_plain_autograd(scheme, dtype):
    net = network(scheme, "gelu", "rms", dim=40, hidden=32, dtype=dtype)
    x = state(net, 33)
    wide, x_wide = in_float64(net, x)
    exact = plain_gradients(wide, x_wide)
    own, got = plain_gradients(net, x), fused_gradients(net, x, bits(8))
    rounding = worst_error(fused_gradients(wide, x_wide, bits(8)), exact)
    assert [tensor.dtype for tensor in got] == [x.dtype, *[dtype] * 4]
    for result, plain_result, truth in zip(got, own, exact, strict=True):
        band = (torch.finfo(dtype).eps + rounding) * truth.norm()
        assert (result - truth).norm() <= 2 * ((plain_result - truth).norm() + band)


def test_autocast_narrows_products_alone(scheme):
    mlp, x = ResidualMLP(33, 10, 4, scheme, step=1.0, norm="rms"), torch.randn(5, 33, requires_grad=True)
    narrow = ResidualMLP(33, 10, 4, scheme, step=1.0, norm="rms", dtype=torch.bfloat16)
    narrow.load_state_dict(mlp.state_dict())
    with torch.autocast("cpu", torch.bfloat16):
        got = gradients(lambda: mlp(x), [x, *mlp.parameters()])
    expected = gradients(lambda: narrow(x), [x, *narrow.parameters()])
    assert all(torch.equal(a, b.float()) for a, b in zip(got, expected, strict=True))


def test_defaults():
    assert ResidualMLP(6, 10, 4).reverse == Reverse("step")
    assert ResidualMLP(6, 10, 1).reverse == Reverse("step")
    assert ResidualMLP(6, 10, 4, step=1.0).reverse == Reverse("stored", bits=8)
    assert ResidualMLP(6, 10, 2, "heun", step=[1.0, 1.0]).reverse == Reverse("stored")
    assert ResidualMLP(6, 10, 4, step=1.0, reverse="corrected").reverse == Reverse("step")


def test_the_function_is_the_module(float64, scheme):
    mlp = ResidualMLP(33, 10, 4, scheme, step=1.0)
    x, inputs = torch.randn(5, 33), list(mlp.parameters())
    function = lambda: residual_mlp(x, *inputs, scheme, step=1.0)  # noqa: E731
    assert all(map(torch.equal, gradients(function, inputs), gradients(lambda: mlp(x), inputs)))


def test_bits_must_be_one_or_one_for_each_step():
    for make in (
        lambda: ResidualMLP(6, 10, 4, reverse=bits((8, 4))),
        lambda: residual_mlp(
            torch.zeros(2, 6), torch.zeros(4, 10, 6), None, torch.zeros(4, 6, 10), None, reverse=bits((8, 4))
        ),
    ):
        with pytest.raises(ValueError, match=r"^Reverse: bits must be one number or 4, one for each step, got 2"):
            make()


def test_kernels_for_few_rows_say_that_they_store_nothing():
    expected = (
        r"backend='cuda' can't compute this: kernels in CUDA C\+\+, which are made for few rows, store no increments"
    )
    with pytest.raises(ValueError, match=expected):
        ResidualMLP(6, 10, 4, step=1.0, backend="cuda")(torch.randn(5, 6))


@pytest.mark.parametrize("name", SCHEMES)
def test_segments(name):
    def segments(anchors):
        return [list(steps) for steps in Method(SCHEMES[name], (0.2,) * 5, bits(8), anchors).segments]

    assert segments(()) == [[0, 1, 2, 3, 4]]
    assert segments((0, 1, 3)) == [[2], [4]]
    assert segments((4,)) == [[0, 1, 2, 3]]
    assert segments(range(5)) == []
    method = Method(Euler, (0.2,) * 5, bits(8), (1,))
    assert method.stored_steps == (0, 2, 3, 4)
    assert [method.stored_place(n) for n in method.stored_steps] == [0, 1, 2, 3]
    assert [method.segment_of(n) for n in method.stored_steps] == [0, 1, 1, 1]
    assert not Method(Euler, (0.2,) * 5).segments


def test_nothing_need_be_rebuilt(scheme):
    """A network of h = 1 and weights three times as large, where each reverse step is off by as much as the state."""
    net = network(scheme, dim=33, hidden=40, step=WILD)
    net = net.with_parameters([(3 * parameter).detach().requires_grad_() for parameter in net.parameters])
    x = state(net, 20)
    exact = plain_gradients(net, x)
    assert worst_error(fused_gradients(net, x, Reverse("step")), exact) > 0.5
    assert worst_error(fused_gradients(net, x, bits(8)), exact) < 0.05
