"""`smooth_init_` and `deepen`: what the weights become, and what that does to reconstruction and flow."""

import copy
import math

import pytest
import torch
from torch import nn

from resode_cuda import ResidualStack, Reverse
from resode_cuda.initialize import deepen, smooth_init_
from resode_cuda.schemes import SCHEMES
from tests.support.networks import (
    DIM,
    HIDDEN,
    TanhBlock,
    block_count,
    fitted_slope,
    gradient_error,
    half_square,
    mlp,
    reference_blocks,
    reference_input,
    relative_error,
)

pytestmark = pytest.mark.usefixtures("float64")
DEPTHS = (16, 32, 64)


def normed(dim=DIM, hidden=HIDDEN):
    return nn.Sequential(nn.LayerNorm(dim), nn.Linear(dim, hidden), nn.Tanh(), nn.Linear(hidden, dim))


def initialised(count, build=normed):
    """Blocks with PyTorch's default initialisation; the first and the last are the same at every count."""
    torch.manual_seed(0)
    blocks = [build() for _ in range(count)]
    return [blocks[0], *blocks[2:], *blocks[1:2]]


def weights(stack, name):
    return torch.stack([block.get_parameter(name).detach() for block in stack])


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


@pytest.mark.parametrize("steps", [4.0, True, "4", None])
def test_deepen_wants_an_integer(steps):
    with pytest.raises(TypeError, match="deepen: steps must be an integer, got"):
        deepen(ResidualStack([mlp()]), steps)


def test_deepen_only_deepens():
    with pytest.raises(ValueError, match=r"deepen: steps must be >= 3, the stack's own, got 2; deepen only deepens"):
        deepen(ResidualStack([mlp() for _ in range(3)]), 2)


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("step", [None, 0.3, (0.1, 0.7, 0.2, 0.5, 0.3)])
def test_as_many_steps_give_an_exact_independent_copy(scheme, step):
    stack, x = ResidualStack(initialised(block_count(scheme, 5)), scheme, step=step), reference_input()
    same = deepen(stack, 5)
    assert same.steps == stack.steps
    assert torch.equal(same(x), stack(x))
    assert not {id(parameter) for parameter in same.parameters()} & {id(parameter) for parameter in stack.parameters()}


@pytest.mark.parametrize("scheme", SCHEMES)
def test_blocks_and_state_dict_are_those_of_a_stack_of_that_depth(scheme):
    stack = ResidualStack(initialised(block_count(scheme, 4)), scheme)
    deeper = deepen(stack, 10)
    assert len(deeper) == block_count(scheme, 10)
    assert deeper.steps == (0.1,) * 10
    fresh = ResidualStack(initialised(block_count(scheme, 10)), scheme)
    assert list(deeper.state_dict()) == list(fresh.state_dict())
    fresh.load_state_dict(deeper.state_dict(), strict=True)


@pytest.mark.parametrize(
    ("scheme", "places"), [("euler", [0, 0.5, 1, 1.5, 2, 2]), ("heun", [0, 0.5, 1, 1.5, 2, 2.5, 3])]
)
def test_parameters_are_interpolated_linearly_and_clamped_at_the_last_block(scheme, places):
    blocks = [nn.Linear(2, 2, bias=False) for _ in range(block_count(scheme, 3))]
    for n, block in enumerate(blocks):
        nn.init.constant_(block.weight, n)
    deeper = deepen(ResidualStack(blocks, scheme), 6)
    assert [block.weight[0, 0].item() for block in deeper] == places


def test_unequal_steps_keep_their_times():
    stack = ResidualStack(initialised(3), step=[0.5, 1.0, 0.25])
    assert deepen(stack, 6).steps == (0.25, 0.25, 0.5, 0.5, 0.125, 0.125)
    odd = deepen(stack, 4).steps
    assert odd == (0.375, 0.125 + 0.5, 0.5 + 0.0625, 0.1875)
    assert sum(odd) == 1.75
    ordinary = deepen(ResidualStack(initialised(3), step=1.0), 7).steps
    assert set(ordinary) == {3 / 7}  # equal to the last bit


@pytest.mark.parametrize(("scheme", "order", "bound"), [("euler", 1, 1e-2), ("heun", 2, 1e-4)])
def test_a_deeper_copy_follows_the_same_flow(scheme, order, bound):
    x, errors = reference_input(), []
    for steps in DEPTHS:
        blocks = initialised(block_count(scheme, steps), tanh_block)
        stack = smooth_init_(ResidualStack(blocks, scheme))
        with torch.no_grad():
            errors.append(relative_error([deepen(stack, 2 * steps)(x)], [stack(x)]))
    assert errors[-1] < bound
    assert fitted_slope(DEPTHS, errors) == pytest.approx(order, abs=0.2)


def tanh_block():
    return TanhBlock(torch.randn(DIM, HIDDEN) / DIM**0.5, torch.randn(HIDDEN, DIM) / HIDDEN**0.5)


def test_a_linear_net_deepens_towards_its_matrix_exponential():
    a = nn.Linear(4, 4, bias=False)
    stack = ResidualStack([a] * 2)  # shared: x (1 + A/2)^2
    x = torch.randn(3, 4)
    deeper = deepen(stack, 50)
    torch.testing.assert_close(deeper(x), x @ torch.linalg.matrix_power(torch.eye(4) + a.weight.T / 50, 50))
    assert len({id(parameter) for parameter in deeper.parameters()}) == 50
    flow = x @ torch.linalg.matrix_exp(a.weight.T)
    errors = [(deepen(stack, steps)(x) - flow).norm().item() for steps in DEPTHS]
    assert fitted_slope(DEPTHS, errors) == pytest.approx(1, abs=0.1)


def test_settings_and_flags_are_carried():
    blocks = [nn.Sequential(mlp(), nn.Dropout(0.5)) for _ in range(4)]
    blocks[0].eval()
    blocks[0][0][0].weight.requires_grad_(False)
    stack = ResidualStack(
        blocks, gradient="checkpoint", reverse=Reverse(corrections=2), anchors=3, stream_dtype=torch.float32
    )
    deeper = deepen(stack, 8)
    assert (deeper.gradient, deeper.reverse, deeper.anchors) == ("checkpoint", Reverse(corrections=2), 3)
    assert deeper.stream_dtype == torch.float32
    # Blocks 0 and 1 of the new stack are nearest to the old block 0, which stays in eval mode and frozen in part.
    assert [block.training for block in deeper] == [False] * 2 + [True] * 6
    assert [block[0][0].weight.requires_grad for block in deeper] == [False] * 2 + [True] * 6
    assert deeper.training
    stack.training = False
    assert not deepen(stack, 8).training
    assert deepen(stack, 8)[7].training
    assert deepen(stack.half(), 8)[3][0][0].weight.dtype == torch.float16


def test_kept_states_stay_at_their_times_or_the_step_after():
    stack = ResidualStack(initialised(4), anchors={0, 3})
    assert [deepen(stack, steps).anchors for steps in (4, 5, 6, 8)] == [(0, 3), (0, 4), (0, 5), (0, 6)]


def test_buffers_come_from_the_nearest_block():
    blocks = [mlp() for _ in range(3)]
    for n, block in enumerate(blocks):
        block.register_buffer("count", torch.tensor(n))
    deeper = deepen(ResidualStack(blocks), 9)
    assert [block.count.item() for block in deeper] == [0, 0, 1, 1, 1, 2, 2, 2, 2]
    deeper[0].count.add_(5)
    assert deeper[1].count == blocks[0].count == 0


def test_a_deeper_copy_trains():
    stack, x = ResidualStack(reference_blocks(4, "smooth"), reverse="extrapolated"), reference_input()
    half_square(stack(x)).backward()
    deeper = deepen(stack, 8)
    assert all(parameter.is_leaf and parameter.grad is None for parameter in deeper.parameters())
    optimizer = torch.optim.SGD(deeper.parameters(), lr=1e-3)
    loss = half_square(deeper(x))
    loss.backward()
    assert all(parameter.grad.norm() > 0 for parameter in deeper.parameters())
    optimizer.step()
    assert half_square(deeper(x)) < loss
