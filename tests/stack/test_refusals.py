"""What a stack does not compute is refused in its own words, and what looks alike is computed."""

import pytest
import torch
from torch import nn

from resode_cuda import ResidualStack
from tests.support.networks import half_square, mlps, plain, relative_error

pytestmark = [pytest.mark.usefixtures("float64"), pytest.mark.parametrize("gradient", ["adjoint", "checkpoint"])]


def exact(blocks, gradient):
    return ResidualStack(blocks, gradient=gradient, anchors=1)


def test_sparse_gradients_are_autograds(gradient):
    class Lookup(nn.Module):
        def __init__(self):
            super().__init__()
            self.table = nn.Embedding(5, 6, sparse=True)

        def forward(self, x):
            return torch.tanh(x + self.table(torch.tensor([0, 2, 2])))

    blocks, x = [Lookup() for _ in range(3)], torch.randn(3, 6)
    weights = [block.table.weight for block in blocks]
    got = torch.autograd.grad(half_square(exact(blocks, gradient)(x)), weights)
    assert all(g.is_sparse for g in got)
    expected = torch.autograd.grad(half_square(plain(blocks, "euler", x)), weights)
    assert relative_error([g.to_dense() for g in got], [g.to_dense() for g in expected]) < 1e-12


def test_sparse_arguments_are_learned(gradient):
    class Mixing(nn.Module):
        def __init__(self):
            super().__init__()
            self.body = nn.Linear(6, 6)

        def forward(self, x, mix):
            return torch.tanh(torch.sparse.mm(mix, self.body(x)))

    blocks, x, mix = [Mixing() for _ in range(3)], torch.randn(3, 6), torch.eye(3).to_sparse().requires_grad_()
    (got,) = torch.autograd.grad(half_square(exact(blocks, gradient)(x, mix)), mix)
    (expected,) = torch.autograd.grad(half_square(plain(blocks, "euler", x, mix)), mix)
    assert relative_error([got.to_dense()], [expected.to_dense()]) < 1e-12


def test_states_must_be_dense(gradient):
    stack = ResidualStack(mlps("euler", 3), gradient=gradient)
    with pytest.raises(TypeError, match="ResidualStack: x must be a dense tensor, got a nested one; pad it"):
        stack(torch.nested.nested_tensor([torch.randn(2, 6), torch.randn(3, 6)], layout=torch.jagged))
    with pytest.raises(TypeError, match=r"x must be a dense tensor, got a sparse_coo one; .* use x.to_dense\(\)"):
        stack(torch.eye(6).to_sparse())


def test_torch_func_has_no_backward_pass_of_ours(gradient):
    stack = ResidualStack(mlps("euler", 3), gradient=gradient)
    with pytest.raises(RuntimeError, match=f'gradient="{gradient}" gives first .* got a torch.func transform'):
        torch.func.grad(lambda x: stack(x).sum())(torch.randn(3, 6))


def test_gradients_may_be_frozen_and_hooked_in_between(gradient):
    blocks, x = mlps("euler", 3), torch.randn(3, 6)
    frozen, hooked = blocks[1][0].weight, blocks[2][0].weight
    half_square(plain(blocks, "euler", x)).backward()
    expected = [block[0].weight.grad for block in blocks]
    for block in blocks:
        block.zero_grad()
    loss = half_square(exact(blocks, gradient)(x))
    frozen.requires_grad_(False)
    hooked.register_hook(lambda g: 2 * g)
    loss.backward()
    assert frozen.grad is None
    assert relative_error([blocks[0][0].weight.grad, hooked.grad], [expected[0], 2 * expected[2]]) < 1e-12


def test_parameters_must_not_be_converted_in_between(gradient):
    stack = ResidualStack(mlps("euler", 3), gradient=gradient)
    loss = half_square(stack(torch.randn(3, 6)))
    stack.float()
    with pytest.raises(
        RuntimeError, match=r"parameters must not be converted, but one of .* from torch.float64 on cpu to"
    ):
        loss.backward()


def test_a_batch_of_gradients_needs_blocks_without_random_numbers(gradient):
    x, batch = torch.randn(3, 6, requires_grad=True), torch.randn(2, 3, 6)
    blocks = mlps("euler", 3)
    (got,) = torch.autograd.grad(exact(blocks, gradient)(x), x, batch, is_grads_batched=True)
    (expected,) = torch.autograd.grad(plain(blocks, "euler", x), x, batch, is_grads_batched=True)
    assert relative_error([got], [expected]) < 1e-12
    out = exact([nn.Dropout(0.5), *blocks], gradient)(x)
    with pytest.raises(
        RuntimeError, match="blocks that draw random numbers cannot be run again for a batch of gradients"
    ):
        torch.autograd.grad(out, x, batch, is_grads_batched=True)
