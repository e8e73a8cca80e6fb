"""Accuracy of the reverse solvers: the reference figures, the orders, and what corrections and anchors reach."""

import pytest
import torch

from resode_cuda import ResidualStack, Reverse
from resode_cuda.reverse import extrapolate, extrapolation_weights, predict
from resode_cuda.schemes import SCHEMES
from tests.support.networks import (
    block_count,
    fitted_slope,
    gradient_error,
    gradients,
    mlps,
    parameters_of,
    plain,
    reference_blocks,
    reference_input,
    relative_error,
)

pytestmark = pytest.mark.usefixtures("float64")

DEPTHS = (16, 32, 64, 128, 256)


def reference_error(weights: str, scheme: str, steps: int, reverse) -> float:
    blocks = reference_blocks(block_count(scheme, steps), weights)
    # The reference networks have one layer more than Euler needs, and place layers evenly over all of them.
    if scheme == "euler":
        blocks = reference_blocks(steps + 1, weights)[:-1]
    return gradient_error(blocks, scheme, reference_input(), reverse=reverse)


@pytest.mark.parametrize(
    ("scheme", "reverse", "least", "most"),
    [
        ("euler", "paper", 0.8, 1.2),
        ("euler", "corrected", 1.7, 2.3),
        ("euler", "extrapolated", 2.6, 3.4),
        ("heun", "paper", 2.6, 3.4),
        ("heun", "corrected", 3.5, 4.5),
        ("heun", "extrapolated", 2.6, 3.4),
    ],
)
def test_gradient_error_falls_with_depth_at_the_stated_order(scheme, reverse, least, most):
    errors = [reference_error("smooth", scheme, n, reverse) for n in DEPTHS]
    assert least <= fitted_slope(DEPTHS, errors) <= most


@pytest.mark.parametrize(
    ("weights", "scheme", "reverse", "figure"),
    [
        ("smooth", "euler", "paper", 1.4e-2),
        ("smooth", "euler", "corrected", 5.3e-4),
        ("smooth", "euler", "extrapolated", 8.1e-5),
        ("smooth", "euler", Reverse("step", corrections=1), 1.1e-5),
        ("smooth", "euler", Reverse("extrapolate", corrections=1), 1.5e-6),
        ("smooth", "heun", "paper", 5.2e-6),
        ("smooth", "heun", "corrected", 2.4e-7),
        ("smooth", "heun", "extrapolated", 8.0e-5),
        ("independent", "euler", "paper", 3.7e-3),
        ("independent", "euler", "corrected", 6.8e-4),
        ("independent", "euler", "extrapolated", 7.0e-2),
        ("independent", "heun", "paper", 2.2e-3),
        ("independent", "heun", "corrected", 2.7e-4),
    ],
)
def test_gradient_error_at_64_steps_is_the_published_figure(weights, scheme, reverse, figure):
    assert reference_error(weights, scheme, 64, reverse) == pytest.approx(figure, rel=0.2)


def test_heun_falls_back_to_first_order_where_weights_alternate_and_still_beats_euler():
    heun = [reference_error("rough", "heun", n, "paper") for n in DEPTHS]
    euler = [reference_error("rough", "euler", n, "paper") for n in DEPTHS]
    assert fitted_slope(DEPTHS, heun) == pytest.approx(1, abs=0.25)
    assert all(h <= e for h, e in zip(heun, euler, strict=True))


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("predictor", ["step", "extrapolate"])
def test_corrections_converge_to_the_exact_gradient_where_they_contract(scheme, predictor):
    blocks = mlps(scheme, 12)
    largest = max(
        torch.linalg.matrix_norm(block[2].weight, 2) * torch.linalg.matrix_norm(block[0].weight, 2) for block in blocks
    )
    assert largest / 12 < 0.5
    x = torch.randn(5, 6)
    assert gradient_error(blocks, scheme, x, reverse=Reverse(predictor, corrections=25)) < 1e-10


@pytest.mark.parametrize("reverse", ["paper", "corrected", "extrapolated"])
@pytest.mark.parametrize("scheme", SCHEMES)
def test_anchors_restart_the_error(scheme, reverse):
    blocks, x = mlps(scheme, 24, scale=2), torch.randn(5, 6)
    none, some, every = (
        gradient_error(blocks, scheme, x, reverse=reverse, anchors=anchors) for anchors in (None, 4, 1)
    )
    assert some < none
    assert every < 1e-15


@pytest.mark.parametrize("scheme", SCHEMES)
def test_first_two_reverse_steps_of_extrapolation_are_exact(scheme):
    for steps in (1, 2):
        assert gradient_error(mlps(scheme, steps, scale=3), scheme, torch.randn(5, 6), reverse="extrapolated") < 1e-14


def test_equal_steps_continue_increments_linearly():
    for scheme in SCHEMES.values():
        assert extrapolation_weights(scheme, [0.1] * 5, 1) == pytest.approx((2, 1))


@pytest.mark.parametrize("scheme", SCHEMES)
def test_extrapolation_is_exact_for_rates_linear_in_time_on_any_grid(scheme):
    steps, sample_point = [0.3, 0.1, 0.45], SCHEMES[scheme].sample_point
    start = [0.0, 0.3, 0.4]
    increments = [h * (2 - 5 * (t + sample_point * h)) for h, t in zip(steps, start, strict=True)]
    d_next, d_after = (torch.tensor(d) for d in increments[1:])
    x = extrapolate(extrapolation_weights(SCHEMES[scheme], steps, 0), torch.tensor(1.5), d_next, d_after)
    assert x.item() == pytest.approx(1.5 - increments[0], rel=1e-12)


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("reverse", ["paper", "corrected", "extrapolated"])
def test_each_step_may_have_its_own_length(scheme, reverse):
    blocks, x = reference_blocks(block_count(scheme, 40), "smooth"), reference_input()
    lengths = (torch.rand(40) + 0.5).tolist()
    h = [length / sum(lengths) for length in lengths]
    parameters = parameters_of(blocks)
    exact = gradients(lambda: plain(blocks, scheme, x, h=h), parameters)
    stack = ResidualStack(blocks, scheme, step=h, reverse=reverse)
    assert torch.equal(stack(x), plain(blocks, scheme, x, h=h))
    assert relative_error(gradients(lambda: stack(x), parameters), exact) < 5e-2


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"predictor": "guess"}, ValueError, "predictor must be one of .*'step', 'extrapolate'.*got 'guess'"),
        ({"corrections": -1}, ValueError, "corrections must be >= 0, got -1"),
        ({"corrections": 1.5}, TypeError, "corrections must be an integer, got 1.5"),
        ({"corrections": True}, TypeError, "corrections must be an integer, got True"),
        ({"reuse": 1}, TypeError, "reuse must be True or False, got 1"),
        ({"predictor": "extrapolate", "reuse": False}, ValueError, "needs reuse=True"),
        ({"accelerate": 1}, TypeError, "accelerate must be True, False or None, got 1"),
        ({"corrections": 1, "accelerate": True}, ValueError, "accelerate=True needs corrections >= 2, got 1"),
    ],
)
def test_bad_solvers_are_refused(arguments, error, message):
    with pytest.raises(error, match=message):
        Reverse(**arguments)


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize(("reverse", "tolerance"), [("paper", 3e-2), ("corrected", 2e-3), ("extrapolated", 1e-2)])
def test_invert_rebuilds_the_input(scheme, reverse, tolerance):
    blocks, x = reference_blocks(block_count(scheme, 64), "smooth"), reference_input()
    stack = ResidualStack(blocks, scheme, reverse=reverse)
    rebuilt = stack.invert(stack(x))
    assert not rebuilt.requires_grad
    assert relative_error([rebuilt], [x]) < tolerance


@pytest.mark.parametrize(("reverse", "order"), [("paper", 1), ("corrected", 2), ("extrapolated", 3)])
def test_invert_converges_at_the_order_of_its_docstring(reverse, order):
    x, errors = reference_input(), []
    for n in DEPTHS:
        stack = ResidualStack(reference_blocks(n, "smooth"), reverse=reverse)
        errors.append(relative_error([stack.invert(stack(x))], [x]))
    assert fitted_slope(DEPTHS, errors) == pytest.approx(order, abs=0.4)


def test_two_corrections_and_more_are_accelerated_unless_told_otherwise():
    assert [Reverse(corrections=k).accelerate for k in range(4)] == [False, False, True, True]
    assert not Reverse(corrections=3, accelerate=False).accelerate


def residuals(f, x, h, reverse, expected=None):
    """|y - (x_next - h f(y))| of each row, at the point that the solver hands to the adjoint."""
    x_next = x + h * f(x)
    y = predict(reverse, SCHEMES["euler"], [f], x_next, h, None if expected is None else x_next - expected)
    assert y.shape == x.shape
    return (y + h * f(y) - x_next).flatten(1).norm(dim=1)


@pytest.mark.parametrize("corrections", [2, 3, 4])
def test_acceleration_solves_what_one_direction_dominates(corrections):
    # A Jacobian of rank one: the residuals lie on a line, where a secant finds the fixed point of a linear map.
    u, v, x = torch.randn(6, 1), torch.randn(1, 6), torch.randn(4, 6)
    for slope in (-3.0, -0.9, 0.5, 2.0):  # -3 and 2 diverge without
        matrix = slope * u @ v / (v @ u)
        plain_ = residuals(lambda y, a=matrix: y @ a.T, x, 1.0, Reverse("step", corrections, accelerate=False))
        mixed = residuals(lambda y, a=matrix: y @ a.T, x, 1.0, Reverse("step", corrections))
        assert (mixed < 1e-10 * plain_.clamp(min=1)).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("corrections", [2, 3, 5])
def test_nothing_is_divided_by_a_residual_that_vanished(dtype, corrections):
    x = torch.randn(5, 6, dtype=dtype)
    weight = torch.randn(6, 6, dtype=dtype) / 6

    def f(y):
        return torch.tanh(y @ weight)

    exact = 0.1 * f(x)  # the increment that the step really made
    expected = torch.where(torch.arange(5)[:, None] < 3, exact, exact + 0.1)  # in the first rows
    found = residuals(f, x, 0.1, Reverse("extrapolate", corrections), expected)
    assert (found[:3] < 10 * torch.finfo(dtype).eps).all()
    assert (found[3:] < 0.3 * 0.1**corrections).all()
    zero = torch.zeros(5, 6, dtype=dtype)
    assert torch.equal(residuals(torch.zeros_like, zero, 0.1, Reverse("step", corrections)), zero.norm(dim=1))


@pytest.mark.parametrize("corrections", [2, 3, 4])
def test_acceleration_is_hardly_ever_worse_and_never_much(corrections):
    worse, total, gains = 0, 0, []
    for seed in range(60):
        torch.manual_seed(seed)
        x, bias = torch.randn(16, 12), torch.randn(24)
        scale, h = (0.5, 1.0, 2.0, 4.0)[seed % 4], (1.0, 0.25, 0.05)[seed % 3]
        first, last = scale * torch.randn(12, 24) / 12**0.5, torch.randn(24, 12) / 24**0.5
        activation = (torch.tanh, torch.relu, torch.nn.functional.gelu)[seed % 3]

        def f(y, first=first, last=last, bias=bias, activation=activation):
            return activation(y @ first + bias) @ last

        plain_ = residuals(f, x, h, Reverse("step", corrections, accelerate=False)) + 1e-14
        mixed = residuals(f, x, h, Reverse("step", corrections)) + 1e-14
        worse, total = worse + (mixed > 1.001 * plain_).sum().item(), total + len(x)
        gains.append((mixed.norm() / plain_.norm()).item())
    assert worse / total < 0.1
    assert max(gains) < 1.2
    assert min(gains) < 0.2


def test_samples_are_mixed_each_for_itself():
    x, weight = torch.randn(6, 3, 4), torch.randn(4, 4)

    def run(rows):
        f = lambda y: torch.tanh(y @ weight)  # noqa: E731
        return predict(Reverse(corrections=3), SCHEMES["euler"], [f], x[rows], 0.5, None)

    torch.testing.assert_close(run(slice(None))[2:4], run(slice(2, 4)), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("size", [1e-30, 1e-20, 1e-10, 1e10, 1e30])
def test_states_of_any_size_are_mixed_as_those_of_size_1_are(dtype, size):
    x, weight = torch.randn(8, 6, dtype=dtype), torch.randn(6, 6, dtype=dtype) / 2

    def step_back_from(size):
        f = lambda y: size * torch.tanh((y / size) @ weight)  # noqa: E731
        return predict(Reverse(corrections=3), SCHEMES["euler"], [f], size * x, 0.5, None) / size

    rounding = 1e4 * torch.finfo(dtype).eps
    torch.testing.assert_close(step_back_from(size), step_back_from(1.0), rtol=rounding, atol=rounding)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_narrow_states_of_many_values_are_mixed(dtype):
    """Their dot products are beyond float16's largest value."""
    x, bias = 40 * torch.randn(2, 100_000), torch.randn(100_000)
    slow = lambda y: -0.9 * y + bias.to(y.dtype)  # noqa: E731
    solver = Reverse("step", corrections=2)
    found, wide = (predict(solver, SCHEMES["euler"], [slow], x.to(d), 1.0, None).float() for d in (dtype, x.dtype))
    size = wide.abs().max().item()
    torch.testing.assert_close(found, wide.float(), rtol=0, atol=8 * torch.finfo(dtype).eps * size)


@pytest.mark.parametrize("shape", [(5,), (1,), (0, 4), (3, 0), (2, 3, 4, 5)])
def test_states_of_any_shape_are_mixed(shape):
    x = torch.randn(shape)
    y = predict(Reverse(corrections=12), SCHEMES["euler"], [torch.tanh], x + 0.3 * torch.tanh(x), 0.3, None)
    torch.testing.assert_close(y, x, rtol=1e-6, atol=1e-6)
