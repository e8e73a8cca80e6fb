"""The adjoint as autograd sees it: every way to ask for gradients that works on the ordinary network works here."""

import threading
from dataclasses import replace

import pytest
import torch
from torch import nn

from resode_cuda import ResidualStack, Reverse
from resode_cuda.reverse import PRESETS
from resode_cuda.schemes import SCHEMES
from tests.support.conditioned import Conditioned
from tests.support.exact import EXACT, TIGHT, assert_same_gradients, exact_stack
from tests.support.networks import block_count, gradients, half_square, mlp, mlps, parameters_of, plain, relative_error

pytestmark = [
    pytest.mark.usefixtures("float64"),
    pytest.mark.parametrize("scheme", SCHEMES),
]


@pytest.mark.parametrize("gradient", ["checkpoint", "backprop"])
def test_exact_modes_equal_the_plain_loop_to_the_last_bit(scheme, gradient):
    blocks, x = mlps(scheme, 9), torch.randn(5, 6, requires_grad=True)
    inputs = [x, *parameters_of(blocks)]
    stack = ResidualStack(blocks, scheme, gradient=gradient)
    assert torch.equal(stack(x), plain(blocks, scheme, x))
    got = gradients(lambda: stack(x), inputs)
    exact = gradients(lambda: plain(blocks, scheme, x), inputs)
    assert all(map(torch.equal, got, exact))


@pytest.mark.parametrize("reverse", ["paper", "corrected", "extrapolated"])
def test_forward_pass_equals_the_plain_loop_to_the_last_bit(scheme, reverse):
    blocks, x = mlps(scheme, 9), torch.randn(5, 6)
    assert torch.equal(ResidualStack(blocks, scheme, reverse=reverse)(x), plain(blocks, scheme, x))


def test_each_parameters_gradient_is_right_in_a_deep_net(scheme):
    """With Heun an interior block serves two steps; a gradient that lacks one of them is about half."""
    blocks, x = mlps(scheme, 512), torch.randn(5, 6)
    parameters = parameters_of(blocks)
    exact = gradients(lambda: plain(blocks, scheme, x), parameters)
    got = gradients(lambda: ResidualStack(blocks, scheme, reverse=Reverse("step", corrections=2))(x), parameters)
    assert max(relative_error([a], [b]) for a, b in zip(got, exact, strict=True)) < 1e-6


def test_input_and_parameters_get_gradients(scheme):
    assert_same_gradients(mlps(scheme, 10), scheme, torch.randn(5, 6, requires_grad=True))


def test_input_may_need_no_gradient(scheme):
    assert_same_gradients(mlps(scheme, 10), scheme, torch.randn(5, 6))


@pytest.mark.parametrize("shape", [(6,), (0, 6), (2, 3, 6), (1, 6)])
def test_any_shape_of_state(scheme, shape):
    blocks, x = mlps(scheme, 4), torch.randn(shape, requires_grad=True)
    if x.numel():
        assert_same_gradients(blocks, scheme, x)
    else:
        assert gradients(lambda: exact_stack(blocks, scheme)(x), [x])[0].shape == shape


def test_states_that_are_not_contiguous(scheme):
    block = [nn.Sequential(nn.Conv2d(3, 5, 3, padding=1), nn.Tanh(), nn.Conv2d(5, 3, 3, padding=1)) for _ in range(6)]
    x = torch.randn(2, 3, 5, 4).to(memory_format=torch.channels_last).requires_grad_()
    assert_same_gradients(block, scheme, x)
    assert_same_gradients(mlps(scheme, 4), scheme, torch.randn(6, 5).t().requires_grad_())


@pytest.mark.parametrize("frozen", [slice(0, 3), slice(3, 6), slice(0, None), slice(-1, None)])
@pytest.mark.parametrize("input_needs_gradient", [True, False])
@pytest.mark.parametrize("reverse", [EXACT, Reverse("extrapolate", corrections=30)])
def test_frozen_blocks(scheme, frozen, input_needs_gradient, reverse):
    blocks, x = mlps(scheme, 9), torch.randn(5, 6, requires_grad=input_needs_gradient)
    nn.ModuleList(blocks[frozen]).requires_grad_(False)
    inputs = parameters_of(blocks) + [x] * input_needs_gradient
    stack = exact_stack(blocks, scheme, reverse=reverse)
    if inputs:
        exact = gradients(lambda: plain(blocks, scheme, x), inputs)
        assert relative_error(gradients(lambda: stack(x), inputs), exact) < TIGHT
    else:
        assert not stack(x).requires_grad


def test_backward_accumulates_into_grad_over_micro_batches(scheme):
    blocks, x = mlps(scheme, 6), torch.randn(8, 6)
    stack = exact_stack(blocks, scheme)
    for part in x.split(2):
        half_square(stack(part)).backward()
    exact = gradients(lambda: plain(blocks, scheme, x), parameters_of(blocks))
    assert relative_error([p.grad for p in stack.parameters()], exact) < TIGHT


@pytest.mark.parametrize("reverse", ["corrected", "extrapolated"])
def test_backward_twice_over_a_retained_graph(scheme, reverse):
    blocks, x = mlps(scheme, 6), torch.randn(5, 6, requires_grad=True)
    loss = half_square(ResidualStack(blocks, scheme, reverse=reverse, anchors=4)(x))
    inputs = [x, *parameters_of(blocks)]
    first = torch.autograd.grad(loss, inputs, retain_graph=True)
    second = torch.autograd.grad(loss, inputs)
    assert all(map(torch.equal, first, second))


def test_backward_twice_without_retaining_raises_torchs_error(scheme):
    loss = half_square(exact_stack(mlps(scheme, 3), scheme)(torch.randn(5, 6)))
    loss.backward()
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        loss.backward()


def test_gradients_of_some_parameters_only(scheme):
    blocks, x = mlps(scheme, 6), torch.randn(5, 6, requires_grad=True)
    for inputs in ([x], [blocks[0][0].bias], [blocks[-1][2].weight], [blocks[2][0].weight, blocks[4][2].bias]):
        assert_same_gradients(blocks, scheme, x, inputs=inputs)


@pytest.mark.parametrize("reverse", [EXACT, Reverse("extrapolate", corrections=30)])
def test_two_forwards_before_two_backwards(scheme, reverse):
    blocks, x, z = mlps(scheme, 6), torch.randn(5, 6), torch.randn(3, 6)
    parameters, stack = parameters_of(blocks), exact_stack(blocks, scheme, reverse=reverse)
    first, second = half_square(stack(x)), half_square(stack(z))
    for loss, data in ((first, x), (second, z)):
        exact = gradients(lambda data=data: plain(blocks, scheme, data), parameters)
        assert relative_error(torch.autograd.grad(loss, parameters), exact) < TIGHT


def test_one_stack_in_two_threads(scheme):
    blocks = mlps(scheme, 12)
    parameters, stack = parameters_of(blocks), exact_stack(blocks, scheme)
    inputs = [torch.randn(7, 6) for _ in range(2)]
    exact = [gradients(lambda x=x: plain(blocks, scheme, x), parameters) for x in inputs]
    errors = []

    def train(which):
        torch.set_default_dtype(torch.float64)
        for _ in range(10):
            errors.append(relative_error(gradients(lambda: stack(inputs[which]), parameters), exact[which]))

    threads = [threading.Thread(target=train, args=(which,)) for which in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(errors) == 20
    assert max(errors) < TIGHT


@pytest.mark.parametrize("gradient", ["adjoint", "checkpoint", "backprop"])
def test_arguments_reach_every_block_and_their_tensors_get_gradients(scheme, gradient):
    blocks = [Conditioned() for _ in range(block_count(scheme, 6))]
    x, scale, shift = torch.randn(5, 6), torch.randn(6, requires_grad=True), torch.randn(5, 6, requires_grad=True)
    mask = torch.rand(5, 6) > 0.7
    stack = exact_stack(blocks, scheme, gradient=gradient)
    inputs = [scale, shift, *parameters_of(blocks)]
    # The conditioning tensors come out of a graph of their own, as from an encoder.
    call = lambda run: run(x, scale * 2, more={"shift": (shift.sin(),)}, mask=mask, negate=True)  # noqa: E731
    exact = gradients(lambda: call(lambda *a, **k: plain(blocks, scheme, *a, **k)), inputs)
    assert relative_error(gradients(lambda: call(stack), inputs), exact) < TIGHT


def test_an_argument_may_be_called_x(scheme):
    class Shifted(nn.Module):
        def forward(self, state, x):
            return torch.tanh(state) + x

    blocks, x, shift = [Shifted() for _ in range(block_count(scheme, 3))], torch.randn(5, 6), torch.randn(6)
    stack = exact_stack(blocks, scheme)
    assert torch.equal(stack(x, x=shift), plain([lambda s: torch.tanh(s) + shift] * len(blocks), scheme, x))
    assert relative_error([stack.invert(stack(x, x=shift), x=shift)], [x]) < TIGHT


def test_no_graph_without_gradients(scheme):
    stack, x = exact_stack(mlps(scheme, 4), scheme), torch.randn(5, 6)
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            assert torch.equal(stack(x), plain(list(stack), scheme, x))
            assert not stack(x).requires_grad
    assert stack.drift is None


def test_batched_gradients(scheme):
    blocks, x = mlps(scheme, 3), torch.randn(2, 6, requires_grad=True)
    seeds = torch.randn(4, 2, 6)
    exact = torch.autograd.grad(plain(blocks, scheme, x), x, seeds, is_grads_batched=True)
    got = torch.autograd.grad(exact_stack(blocks, scheme)(x), x, seeds, is_grads_batched=True)
    assert relative_error(got, exact) < TIGHT


class Echo(torch.autograd.Function):
    """scale x, whose backward hands out tensors that it was given: x as the gradient of scale."""

    @staticmethod
    def forward(ctx, x, scale):
        ctx.save_for_backward(x)
        return scale * x

    @staticmethod
    def backward(ctx, g):
        return g, ctx.saved_tensors[0].detach()


class Echoing(nn.Module):
    """Adds what it is given, so that the cotangent of its output is that of an argument and of a parameter, too."""

    def __init__(self):
        super().__init__()
        self.body, self.shift, self.scale = mlp(), nn.Parameter(torch.randn(5, 6)), nn.Parameter(torch.randn(5, 6))

    def forward(self, x, shift, transposed):
        return self.body(x) + Echo.apply(x, self.scale) + self.shift + shift + transposed.T


@pytest.mark.parametrize("anchors", [1, None])
@pytest.mark.parametrize("preset", ["paper", "corrected", "extrapolated"])
def test_gradients_that_share_memory_with_the_cotangent_are_not_overwritten(scheme, preset, anchors):
    blocks = [Echoing() for _ in range(block_count(scheme, 4))]
    x, shift, transposed = (torch.randn(shape, requires_grad=True) for shape in [(5, 6), (5, 6), (6, 5)])
    wanted, steps = [x, shift, transposed, *parameters_of(blocks)], [0.1, 0.07, 0.13, 0.03]
    reverse = replace(PRESETS[preset], corrections=60)
    stack = ResidualStack(blocks, scheme, step=steps, reverse=reverse, anchors=anchors)
    exact = gradients(lambda: plain(blocks, scheme, x, shift, transposed, h=steps), wanted)
    assert relative_error(gradients(lambda: stack(x, shift, transposed), wanted), exact) < TIGHT
