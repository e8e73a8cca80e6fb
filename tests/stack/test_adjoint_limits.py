"""What the adjoint refuses instead of giving a wrong gradient, and what must not change in between."""

import pytest
import torch
from torch import nn

from resode_cuda import ResidualStack
from resode_cuda.schemes import SCHEMES
from tests.support.conditioned import Conditioned
from tests.support.exact import TIGHT, exact_stack
from tests.support.networks import block_count, half_square, mlp, mlps, plain, relative_error

pytestmark = [
    pytest.mark.usefixtures("float64"),
    pytest.mark.parametrize("scheme", SCHEMES),
]


def test_a_tensor_the_blocks_got_behind_the_stacks_back_is_an_error_every_time(scheme):
    secret = torch.randn(6, requires_grad=True)

    class Leaky(nn.Module):
        def forward(self, x):
            return torch.tanh(x) * secret

    stack, x = exact_stack([mlp(), Leaky(), mlp()], scheme), torch.randn(5, 6)
    stack(x)
    for _ in range(2):
        with pytest.raises(RuntimeError, match=r"a tensor of shape \[6\] that needs gradients and is neither"):
            half_square(stack(x)).backward()


# torch's forward mode scripts some decompositions on first use.
scripts = pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:DeprecationWarning")

DOUBLE = 'first derivatives in reverse mode only, got {}; use gradient="backprop"'


def test_double_backward_is_refused(scheme):
    stack, x = exact_stack(mlps(scheme, 4), scheme), torch.randn(5, 6, requires_grad=True)
    message = "got a double backward"
    with pytest.raises(RuntimeError, match=message):  # a gradient penalty
        torch.autograd.grad(half_square(stack(x)), x, create_graph=True)
    with pytest.raises(RuntimeError, match=message):
        half_square(stack(x)).backward(create_graph=True)
    stack.gradient = "backprop"
    (g,) = torch.autograd.grad(half_square(stack(x)), x, create_graph=True)
    half_square(g).backward()
    assert x.grad is not None


@scripts
@pytest.mark.parametrize(
    "transform",
    [
        lambda f, x: torch.func.grad(lambda x: half_square(f(x)))(x),
        lambda f, x: torch.func.vjp(f, x)[1](x)[0],
        lambda f, x: torch.func.jacrev(f)(x),
        lambda f, x: torch.func.vmap(f)(x),
        lambda f, x: torch.func.hessian(lambda x: half_square(f(x)))(x),
    ],
    ids=["grad", "vjp", "jacrev", "vmap", "hessian"],
)
def test_function_transforms_are_refused(scheme, transform):
    stack, x = exact_stack(mlps(scheme, 3), scheme), torch.randn(2, 6)
    with pytest.raises(RuntimeError, match=r'got a torch\.func transform; use gradient="backprop"'):
        transform(stack, x)
    stack.gradient = "backprop"
    exact = transform(lambda x: plain(list(stack), scheme, x), x)
    assert relative_error([transform(stack, x).detach()], [exact.detach()]) < TIGHT


@scripts
def test_forward_mode_is_refused(scheme):
    stack, x, tangent = exact_stack(mlps(scheme, 3), scheme), torch.randn(2, 6), torch.randn(2, 6)
    with pytest.raises(RuntimeError, match='use gradient="backprop"'):
        torch.func.jvp(stack, (x,), (tangent,))
    with torch.autograd.forward_ad.dual_level(), pytest.raises(RuntimeError, match="got forward-mode"):
        stack(torch.autograd.forward_ad.make_dual(x, tangent))


@pytest.mark.parametrize("gradient", ["adjoint", "checkpoint", "backprop"])
@pytest.mark.parametrize("with_transform", [False, True], ids=["dual tensors", "torch.func"])
def test_forward_mode_where_reverse_mode_is_off(scheme, gradient, with_transform):
    stack, x, tangent = exact_stack(mlps(scheme, 3), scheme, gradient=gradient), torch.randn(2, 6), torch.randn(2, 6)
    with torch.no_grad():
        if with_transform:
            got = torch.func.jvp(stack, (x,), (tangent,))[1]
        else:
            with torch.autograd.forward_ad.dual_level():
                dual = torch.autograd.forward_ad.make_dual(x, tangent)
                got = torch.autograd.forward_ad.unpack_dual(stack(dual)).tangent
    exact = torch.func.jvp(lambda x: plain(list(stack), scheme, x), (x,), (tangent,))[1]
    assert relative_error([got], [exact.detach()]) < TIGHT


@pytest.mark.parametrize(
    ("gradient", "victim"),
    [
        *(("adjoint", victim) for victim in ("output", "parameter", "argument", "anchor")),
        *(("checkpoint", victim) for victim in ("parameter", "argument")),
    ],
)
def test_what_backward_needs_must_not_change_in_place(scheme, gradient, victim):
    blocks = [Conditioned() for _ in range(block_count(scheme, 4))]
    stack = exact_stack(blocks, scheme, gradient=gradient, anchors=2)
    x, scale, shift = torch.randn(5, 6), torch.randn(6), torch.randn(5, 6)
    out = stack(x, scale, more={"shift": [shift]})
    changed = {"output": out, "parameter": blocks[2].body[0].weight, "argument": scale, "anchor": x}[victim]
    with torch.no_grad():
        changed.add_(1)
    with pytest.raises(RuntimeError, match="ResidualStack: between forward and backward neither the stack's output"):
        half_square(out).backward()


def test_output_changed_in_place_by_a_recorded_operation(scheme):
    stack = exact_stack(mlps(scheme, 3), scheme)
    out = stack(torch.randn(5, 6))
    out.mul_(2)
    with pytest.raises(RuntimeError, match="use y = y \\+ z instead of y \\+= z"):
        half_square(out).backward()


class Rude(nn.Module):
    def forward(self, x):
        return x.mul_(2)


@pytest.mark.parametrize("gradient", ["adjoint", "checkpoint"])
def test_blocks_that_change_their_input_are_refused(scheme, gradient):
    stack = ResidualStack([mlp(), Rude(), mlp()], scheme, gradient=gradient)
    with pytest.raises(RuntimeError, match="block 1 must not modify its input in place"):
        stack(torch.randn(5, 6, requires_grad=True))
