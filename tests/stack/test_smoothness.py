"""Gradients smoothed along depth, and how rough parameters are along it."""

import pytest
import torch
from torch import nn

from resode_cuda import ResidualMLP, ResidualStack, smooth_gradients_
from resode_cuda.smoothness import roughness
from tests.support.networks import mlp

pytestmark = pytest.mark.usefixtures("float64")


def smoothing_matrix(count, alpha):
    """I - alpha^2 d^2/dt^2 on `count` places of [0, 1], dg/dt = 0 at the ends."""
    difference = torch.diff(torch.eye(count), dim=0) * (count - 1)
    return torch.eye(count) + alpha**2 * difference.T @ difference


def with_gradients(blocks):
    stack = ResidualStack(blocks)
    for parameter in stack.parameters():
        parameter.grad = torch.randn_like(parameter)
    return stack


def gradients_of(stack, name="0.weight"):
    return torch.stack([block.get_parameter(name).grad for block in stack])


@pytest.mark.parametrize("alpha", [0.05, 0.5, 20.0])
@pytest.mark.parametrize("count", [2, 3, 17])
def test_gradients_solve_the_tridiagonal_system(alpha, count):
    stack = with_gradients([mlp() for _ in range(count)])
    before = {name: gradients_of(stack, name) for name, _ in stack[0].named_parameters()}
    smooth_gradients_(stack, alpha)
    for name, g in before.items():
        smoothed = gradients_of(stack, name)
        torch.testing.assert_close(torch.tensordot(smoothing_matrix(count, alpha), smoothed, 1), g)
        torch.testing.assert_close(smoothed.sum(0), g.sum(0))


def test_a_residual_mlp_is_smoothed_as_its_blocks_are():
    module = ResidualMLP(6, 10, 9)
    stack = module.to_blocks()
    x = torch.randn(4, 6)
    for network in (module, stack):
        network(x).sin().sum().backward()
        smooth_gradients_(network, 0.3)
    of_blocks = torch.stack([block[0].weight.grad for block in stack])
    torch.testing.assert_close(module.weight_in.grad, of_blocks)


def test_nothing_happens_without_alpha_or_neighbours():
    for blocks, alpha in (([mlp() for _ in range(4)], 0.0), ([mlp()], 0.5)):
        stack = with_gradients(blocks)
        before = gradients_of(stack)
        smooth_gradients_(stack, alpha)
        assert torch.equal(gradients_of(stack), before)


def test_frozen_and_other_blocks_end_a_profile():
    blocks = [mlp() for _ in range(7)]
    blocks[3] = nn.Sequential(nn.Linear(6, 12), nn.Tanh(), nn.Linear(12, 6))
    stack = with_gradients(blocks)
    stack[5][0].weight.grad = None
    before = [None if p.grad is None else p.grad.clone() for p in (block[0].weight for block in stack)]
    smooth_gradients_(stack, 0.4)
    # Places lie as close to each other as in the whole stack.
    strength = (0.4 * 6) ** 2
    difference = torch.diff(torch.eye(3), dim=0)
    matrix = torch.eye(3) + strength * difference.T @ difference
    smoothed = torch.stack([block[0].weight.grad for block in list(stack)[:3]])
    torch.testing.assert_close(torch.tensordot(matrix, smoothed, 1), torch.stack(before[:3]))
    for n in (3, 4, 6):
        assert torch.equal(stack[n][0].weight.grad, before[n])
    assert stack[5][0].weight.grad is None


def test_a_shared_block_counts_once():
    shared = mlp()
    stack = with_gradients([shared, shared, mlp(), mlp()])
    before = gradients_of(stack)[1:]
    smooth_gradients_(stack, 0.2)
    difference = torch.diff(torch.eye(3), dim=0)
    matrix = torch.eye(3) + (0.2 * 3) ** 2 * difference.T @ difference
    torch.testing.assert_close(torch.tensordot(matrix, gradients_of(stack)[1:], 1), before)


def test_gradients_of_16_bits_are_rounded_once():
    stack = ResidualStack([mlp() for _ in range(5)]).bfloat16()
    for parameter in stack.parameters():
        parameter.grad = torch.randn_like(parameter)
    expected = torch.linalg.solve(smoothing_matrix(5, 0.3), gradients_of(stack).double().flatten(1))
    smooth_gradients_(stack, 0.3)
    torch.testing.assert_close(gradients_of(stack).flatten(1), expected.bfloat16(), rtol=2**-7, atol=1e-3)


@pytest.mark.parametrize(
    ("alpha", "error", "match"),
    [(-1.0, ValueError, ">= 0"), (float("nan"), ValueError, "finite"), ("a", TypeError, "number")],
)
def test_bad_alphas(alpha, error, match):
    with pytest.raises(error, match=match):
        smooth_gradients_(ResidualStack([mlp()]), alpha)


def test_what_is_no_stack_is_refused():
    for function in (lambda module: smooth_gradients_(module, 0.1), roughness):
        with pytest.raises(TypeError, match="ResidualStack or a ResidualMLP, got Linear"):
            function(nn.Linear(2, 2))


def test_sparse_gradients_are_refused():
    class Looking(nn.Module):
        def __init__(self):
            super().__init__()
            self.table = nn.Embedding(5, 6, sparse=True)

        def forward(self, x):
            return self.table(torch.zeros(len(x), dtype=torch.long))

    stack = ResidualStack([Looking(), Looking()], gradient="backprop")
    stack(torch.randn(3, 6)).sum().backward()
    with pytest.raises(TypeError, match=r"table\.weight"):
        smooth_gradients_(stack, 0.1)


def test_roughness_is_bounded_in_depth_for_smooth_weights_alone():
    found = []
    for count in (9, 33):
        stack = ResidualStack([mlp() for _ in range(count)])
        independent = roughness(stack)["0.weight"]
        with torch.no_grad():
            for n, block in enumerate(stack):
                block[0].weight.copy_(stack[0][0].weight + n / (count - 1))
        found.append((independent, roughness(stack)["0.weight"]))
    (rough, smooth), (rougher, as_smooth) = found
    assert rougher > 3 * rough
    assert smooth == pytest.approx(60**0.5)
    assert as_smooth == pytest.approx(60**0.5)
