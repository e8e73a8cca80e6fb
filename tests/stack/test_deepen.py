"""`deepen`: the weights, buffers and settings of a stack of more steps, and the flow that it follows."""

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
    half_square,
    initialised,
    mlp,
    mlps,
    reference_blocks,
    reference_input,
    relative_error,
)

pytestmark = pytest.mark.usefixtures("float64")
DEPTHS = (16, 32, 64)


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


def test_bits_of_stored_increments_are_those_of_the_old_steps():
    stack = ResidualStack(mlps("euler", 3), step=1.0, reverse=Reverse("stored", bits=(8, 4, 2)))
    assert deepen(stack, 7).reverse.bits == (8, 8, 8, 4, 4, 2, 2)
    assert deepen(stack, 3).reverse == stack.reverse


def test_blocks_that_add_the_state_themselves_cannot_be_divided():
    class Adding(nn.Module):
        def __init__(self):
            super().__init__()
            self.body = mlps("euler", 1)[0]

        def forward(self, x):
            return x + self.body(x)

    stack, x = ResidualStack([Adding(), Adding()], form="block"), torch.randn(3, 6)
    assert torch.equal(deepen(stack, 2)(x), stack(x))
    with pytest.raises(ValueError, match='blocks must return increments, got a stack with form="block"'):
        deepen(stack, 4)
