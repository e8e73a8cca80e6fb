"""Accuracy of the reverse solvers: the reference figures, the orders, and what corrections and anchors reach."""

import pytest
import torch
from networks import (
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

from resode_cuda import ResidualStack, Reverse
from resode_cuda.reverse import extrapolate, extrapolation_weights
from resode_cuda.schemes import SCHEMES

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
    expected = extrapolate(extrapolation_weights(SCHEMES[scheme], steps, 0), *(torch.tensor(d) for d in increments[1:]))
    assert expected.item() == pytest.approx(increments[0], rel=1e-12)


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
