"""`smooth_init_`: what the weights become, and what that does to reconstruction; what it and `deepen` refuse."""

import copy
import math

import pytest
import torch
from torch import nn

from resode_cuda import ResidualStack
from resode_cuda.initialize import deepen, smooth_init_
from tests.support.networks import (
    DIM,
    HIDDEN,
    fitted_slope,
    gradient_error,
    initialised,
    mlp,
    normed,
    reference_input,
    weights,
)

pytestmark = pytest.mark.usefixtures("float64")
DEPTHS = (16, 32, 64)


def test_weights_follow_the_formula_between_the_ends():
    stack = ResidualStack(initialised(5))
    before = weights(stack, "1.weight")
    assert smooth_init_(stack) is stack
    after = weights(stack, "1.weight")
    assert torch.equal(after[0], before[0])
    assert torch.equal(after[-1], before[-1])
    m = before[[0, -1]].mean()
    for n in range(5):
        angle = torch.tensor(math.pi * n / 8)
        expected = m + angle.cos() * (before[0] - m) + angle.sin() * (before[-1] - m)
        torch.testing.assert_close(after[n], expected)
    again = weights(smooth_init_(stack), "1.weight")
    torch.testing.assert_close(again, after)


def test_second_differences_fall_as_the_square_of_the_depth():
    differences = []
    for count in DEPTHS:
        theta = weights(smooth_init_(ResidualStack(initialised(count))), "1.weight")
        differences.append(theta.diff(n=2, dim=0).abs().max())
    # t = n / (N - 1): the fit is against the number of intervals.
    assert fitted_slope([count - 1 for count in DEPTHS], differences) == pytest.approx(2, abs=0.05)


@pytest.mark.parametrize("mean", [0.0, 3.0])
def test_variance_is_the_same_at_every_depth(mean):
    def build():
        block = nn.Linear(200, 200)
        nn.init.normal_(block.weight, mean, 0.5)
        return block

    theta = weights(smooth_init_(ResidualStack(initialised(9, build))), "weight").flatten(1)
    # 40,000 samples: the variance's own sampling error is 0.7 %, that of the covariance of A and B 0.5 %.
    torch.testing.assert_close(theta.var(dim=1), torch.full((9,), 0.25), rtol=0.04, atol=0)
    # The mean of the deviations, of standard deviation 0.5 / 200 in each end, is not kept but stays that small.
    torch.testing.assert_close(theta.mean(dim=1), torch.full((9,), mean), rtol=0, atol=0.015)


def test_norm_weights_zero_biases_and_copies_of_one_block_stay():
    blocks = initialised(7)
    for block in blocks:
        nn.init.zeros_(block[1].bias)
        nn.init.constant_(block[0].weight, 0.1)  # its mean is not exact
    stack = smooth_init_(ResidualStack(blocks))
    assert torch.equal(weights(stack, "0.weight"), torch.full((7, DIM), 0.1))
    assert torch.equal(weights(stack, "0.bias"), torch.zeros(7, DIM))
    assert torch.equal(weights(stack, "1.bias"), torch.zeros(7, HIDDEN))
    one = normed()
    copies = smooth_init_(ResidualStack([one, copy.deepcopy(one), normed(), copy.deepcopy(one)]))
    assert torch.equal(weights(copies, "1.weight"), one[1].weight.expand(4, -1, -1))


def test_reconstruction_reaches_its_order_only_on_smooth_weights():
    x = reference_input()

    def error(blocks):
        return gradient_error(blocks, "euler", x, reverse="extrapolated")

    independent = error(initialised(64))
    errors = [error(list(smooth_init_(ResidualStack(initialised(count))))) for count in DEPTHS]
    assert fitted_slope(DEPTHS, errors) >= 2.5
    assert errors[-1] * 20 < independent


def test_parameters_stay_the_same_objects():
    blocks = initialised(4)
    blocks[1].requires_grad_(False)
    blocks[2].bfloat16()
    blocks[2].register_buffer("seen", torch.ones(3))
    stack = ResidualStack(blocks)
    before = dict(stack.named_parameters())
    old = weights(stack, "1.weight")
    optimizer = torch.optim.SGD(stack.parameters(), lr=1.0)
    smooth_init_(stack)
    after = dict(stack.named_parameters())
    assert all(after[name] is parameter for name, parameter in before.items())
    assert optimizer.param_groups[0]["params"][0] is blocks[0][0].weight
    assert [block[1].weight.requires_grad for block in stack] == [True, False, True, True]
    assert blocks[2][1].weight.dtype == torch.bfloat16
    m = old[[0, -1]].mean()
    exact = m + 0.5 * (old[0] - m) + math.sqrt(0.75) * (old[-1] - m)
    torch.testing.assert_close(blocks[2][1].weight.double(), exact, rtol=2**-8, atol=1e-6)
    assert torch.equal(blocks[2].seen, torch.ones(3))
    assert all(parameter.is_leaf and parameter.grad is None for parameter in stack.parameters())


def test_shared_modules_and_parameters_are_written_once():
    one = mlp()
    before = copy.deepcopy(one.state_dict())
    smooth_init_(ResidualStack([one] * 3))
    assert all(torch.equal(value, before[name]) for name, value in one.state_dict().items())

    a, b, c = mlp(), mlp(), mlp()
    ends = a[0].weight.detach().clone(), c[0].weight.detach().clone()
    smooth_init_(ResidualStack([a, b, a, b, c]))
    assert torch.equal(a[0].weight, ends[0])
    m = torch.stack(ends).mean()
    expected = m + math.cos(math.pi / 8) * (ends[0] - m) + math.sin(math.pi / 8) * (ends[1] - m)
    torch.testing.assert_close(b[0].weight.detach(), expected)


def test_frozen_parameters_stay():
    blocks = initialised(5)
    blocks[0].requires_grad_(False)
    blocks[2].requires_grad_(False)
    blocks[3][1].bias.requires_grad_(False)
    pretrained = blocks[4][1].weight  # held by a block that is not frozen
    blocks[1][1].weight = pretrained
    pretrained.requires_grad_(False)
    before = copy.deepcopy(ResidualStack(blocks).state_dict())
    stack = smooth_init_(ResidualStack(blocks))
    written = {name for name, value in stack.state_dict().items() if not torch.equal(value, before[name])}
    assert written == {"1.1.bias", "1.3.weight", "1.3.bias", "3.1.weight", "3.3.weight", "3.3.bias"}
    assert not any(block[1].weight.requires_grad for block in (blocks[0], blocks[1], blocks[2]))
    a, b = before["0.3.weight"], before["4.3.weight"]
    m = torch.stack([a, b]).mean()
    expected = m + math.cos(math.pi / 8) * (a - m) + math.sin(math.pi / 8) * (b - m)
    torch.testing.assert_close(blocks[1][3].weight.detach(), expected)


def test_a_shared_parameter_of_all_blocks_stays():
    blocks = [mlp() for _ in range(4)]
    for block in blocks:
        block[0].weight = blocks[0][0].weight
    before = blocks[0][0].weight.detach().clone()
    smooth_init_(ResidualStack(blocks))
    assert torch.equal(blocks[2][0].weight, before)


def test_the_underlying_parameters_of_parametrized_modules_are_made_smooth():
    def build():
        return nn.utils.parametrizations.weight_norm(nn.Linear(6, 6))

    stack = smooth_init_(ResidualStack(initialised(5, build)))
    v = weights(stack, "parametrizations.weight.original1")
    # |theta''| = (pi/2)^2 |theta - m| in t, and default weights and their mean lie within 1/sqrt(6).
    assert v.diff(n=2, dim=0).abs().max() < (math.pi / 2 / 4) ** 2 * math.sqrt(2) * 2 / math.sqrt(6)
    assert len(deepen(stack, 8)) == 8


@pytest.mark.parametrize("count", [1, 2])
def test_ends_alone_are_left(count):
    stack = ResidualStack(initialised(count))
    before = copy.deepcopy(stack.state_dict())
    smooth_init_(stack)
    assert all(torch.equal(value, before[name]) for name, value in stack.state_dict().items())


@pytest.mark.parametrize(
    ("where", "call"), [("smooth_init_", smooth_init_), ("deepen", lambda stack: deepen(stack, 9))]
)
@pytest.mark.parametrize(
    ("build", "error", "message"),
    [
        (lambda: nn.Sequential(mlp()), TypeError, "stack must be a ResidualStack, got Sequential"),
        (
            lambda: ResidualStack([mlp(), mlp(), nn.Linear(6, 6)]),
            ValueError,
            "all blocks must have the same parameters, got '0.bias' in block 0 but not in block 2; use blocks of one",
        ),
        (
            lambda: ResidualStack([nn.Linear(6, 6, bias=False), nn.Linear(6, 6)]),
            ValueError,
            "all blocks must have the same parameters, got 'bias' in block 1 but not in block 0",
        ),
        (
            lambda: ResidualStack([mlp(), mlp(hidden=11)]),
            ValueError,
            r"all blocks must have parameters of the same shapes, got '0.weight' \[10, 6\] in block 0, \[11, 6\]",
        ),
        (
            lambda: ResidualStack([nn.Linear(6, 6), nn.LazyLinear(6)]),
            ValueError,
            "parameters must have values, got 'weight' of block 1 without; run the stack once, or move it from",
        ),
        (
            lambda: ResidualStack([mlp().to("meta")]),
            ValueError,
            "parameters must have values, got '0.weight' of block 0",
        ),
        (
            lambda: ResidualStack([Counting()]),
            ValueError,
            "parameters must be floating to be interpolated, got 'count' of block 0 with torch.int8; make it a buffer",
        ),
    ],
)
def test_blocks_that_cannot_be_interpolated_are_refused(where, call, build, error, message):
    with pytest.raises(error, match=f"^{where}: {message}"):
        call(build())


class Counting(nn.Module):
    def __init__(self):
        super().__init__()
        self.count = nn.Parameter(torch.ones(3, dtype=torch.int8), requires_grad=False)
