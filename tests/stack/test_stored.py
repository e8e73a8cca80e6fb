"""Stacks whose increments are stored in a few bits."""

import pytest
import torch

from resode_cuda import ResidualStack, Reverse, stored
from tests.support.networks import half_square, mlp, plain
from tests.support.stored_networks import DIM, SCHEMES, Adding, blocks_of, error_of, ordinary


def states_of(stack, x):
    """The states that a backward pass evaluates blocks at, first to last, each block being called twice a step."""
    seen = []
    hooks = [block.register_forward_pre_hook(lambda _, args: seen.append(args[0].detach().clone())) for block in stack]
    out = stack(x)
    forward = list(seen)
    seen.clear()
    half_square(out).backward()
    for hook in hooks:
        hook.remove()
    return forward, seen[::-1]


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.usefixtures("float64")
def test_the_gradients_error_halves_with_each_bit(scheme):
    torch.manual_seed(0)
    stack, x = ordinary(blocks_of(scheme, 8), scheme), torch.randn(6, DIM, requires_grad=True)
    errors = {}
    for bits in stored.BITS:
        stack.reverse = Reverse("stored", bits=bits)
        errors[bits] = error_of(stack, x)
    assert errors[8] < 4e-3
    for fewer, more in ((2, 3), (3, 4), (4, 6), (6, 8)):
        assert 0.6 < errors[fewer] / errors[more] / 2 ** (more - fewer) < 2
    assert errors[1] < 0.5


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("form", ["residual", "block"])
def test_the_forward_pass_is_that_of_the_network(scheme, form):
    if (form, scheme) == ("block", "heun"):
        pytest.skip("blocks that add the state themselves step by Euler's method")
    blocks, x = blocks_of(scheme), torch.randn(6, DIM)
    if form == "block":
        blocks = [Adding(block) for block in blocks]
    stack = ResidualStack(blocks, scheme, form=form, step=1.0)
    out = stack(x)
    with torch.no_grad():
        assert torch.equal(stack(x), out)
    stack.gradient = "backprop"
    assert torch.equal(stack(x), out)


@pytest.mark.parametrize("bits", stored.BITS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_rounded_states_come_back_to_the_last_bit(dtype, bits):
    torch.manual_seed(0)
    stack = ordinary(blocks_of(steps=9), reverse=Reverse("stored", bits=bits, rounded_forward=True)).to(dtype)
    forward, backward = states_of(stack, torch.randn(4, DIM, dtype=dtype))
    assert len(forward) == len(backward) == 9
    assert all(torch.equal(one, other) for one, other in zip(forward, backward, strict=True))
    assert len({tuple(state.flatten().tolist()) for state in forward}) == 9


def test_a_thousand_rounded_states_come_back_to_the_last_bit():
    torch.manual_seed(0)
    block = mlp(32, 8, 0.3)
    stack = ordinary([block] * 1000, reverse=Reverse("stored", bits=4, rounded_forward=True))
    seen = []
    block.register_forward_pre_hook(lambda _, args: seen.append(args[0].detach().clone()))
    half_square(stack(torch.randn(2, 32))).backward()
    forward, backward = seen[:1000], seen[1000:][::-1]
    assert all(torch.equal(one, other) for one, other in zip(forward, backward, strict=True))


@pytest.mark.parametrize("bits", stored.BITS[1:])
def test_states_are_off_by_half_a_quantum_at_most(bits):
    torch.manual_seed(0)
    stack = ordinary(blocks_of(steps=12), reverse=Reverse("stored", bits=bits))
    forward, backward = states_of(stack, torch.randn(4, DIM))
    unit = stored.start(forward[0])[1].max()
    assert (forward[0] - backward[0]).abs().max() <= unit / 2
    for state, rebuilt, rebuilt_before in zip(forward[1:], backward[1:], backward, strict=False):
        # The quantum of a group is 9/8 of its largest value over the largest whole number, at most.
        largest = (state - rebuilt_before).abs().amax(1)
        quantum = torch.maximum(9 / 8 * largest / (stored.quantum_count(bits) + 0.499), unit)
        assert ((state - rebuilt).abs().amax(1) <= 0.5001 * quantum).all()


class RoundingAsIdentity(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, rounded):
        return rounded

    @staticmethod
    def backward(ctx, g):
        return g, None


def rounded_network(blocks, x, bits, anchors=()):
    """The same network by autograd, rounding taken as the identity."""
    companion = unit = None
    for n, block in enumerate(blocks):
        if n in anchors:
            start = x
        else:
            if companion is None:
                companion, unit = stored.start(x.detach())
            start = RoundingAsIdentity.apply(x, companion)
        x = x + block(start)
        if n in anchors:
            companion, unit = stored.start(x.detach())
        else:
            companion, _, _ = stored.store(x.detach(), companion, unit, bits)
    return x


@pytest.mark.parametrize("bits", stored.BITS)
@pytest.mark.parametrize("anchors", [(), (0,), (0, 1, 4), (3,)], ids=str)
@pytest.mark.usefixtures("float64")
def test_the_rounded_networks_gradient_is_exact(anchors, bits):
    blocks, x = blocks_of(steps=7), torch.randn(5, DIM, requires_grad=True)
    reverse = Reverse("stored", bits=bits, rounded_forward=True)
    stack = ordinary(blocks, reverse=reverse, anchors=anchors)
    inputs = [x, *stack.parameters()]
    out, expected = stack(x), rounded_network(blocks, x, bits, anchors)
    assert torch.equal(out, expected)
    found = torch.autograd.grad(half_square(out), inputs)
    for one, other in zip(found, torch.autograd.grad(half_square(expected), inputs), strict=True):
        assert torch.equal(one, other)


def test_without_gradients_the_plain_network_runs():
    blocks, x = blocks_of(), torch.randn(5, DIM)
    stack = ordinary(blocks, reverse=Reverse("stored", bits=2, rounded_forward=True))
    with torch.no_grad():
        exact = stack(x)
        assert torch.equal(exact, plain(blocks, "euler", x, h=1.0))
    assert not torch.equal(stack(x), exact)


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("anchors", [1, 2, (0,), (0, 1, 2), (5,), (2, 3)], ids=str)
@pytest.mark.usefixtures("float64")
def test_the_companion_starts_afresh_at_kept_states(anchors, scheme):
    torch.manual_seed(0)
    stack, x = ordinary(blocks_of(scheme, 6), scheme, anchors=anchors), torch.randn(5, DIM, requires_grad=True)
    stack.reverse = Reverse("stored", bits=4)
    error = error_of(stack, x)
    if anchors == 1:
        assert error < 1e-14
    else:
        stack.anchors = None
        assert error < 1.05 * error_of(stack, x)


@pytest.mark.usefixtures("float64")
def test_a_wild_first_step_costs_nothing_where_its_states_are_kept():
    torch.manual_seed(0)
    blocks = blocks_of(steps=6, scale=0.5)
    with torch.no_grad():
        blocks[0][-1].weight *= 60
    stack, x = ordinary(blocks, reverse=Reverse("stored", bits=4)), torch.randn(5, DIM, requires_grad=True)
    without = error_of(stack, x)
    stack.anchors = (0, 1)
    assert error_of(stack, x) < without / 3


@pytest.mark.usefixtures("float64")
def test_bits_may_differ_by_step():
    torch.manual_seed(0)
    blocks, x = blocks_of(steps=4), torch.randn(5, DIM, requires_grad=True)
    errors = {}
    for bits in ((8, 8, 8, 8), (8, 2, 8, 8), (2, 2, 2, 2)):
        errors[bits] = error_of(ordinary(blocks, reverse=Reverse("stored", bits=bits)), x)
    assert errors[8, 8, 8, 8] < errors[8, 2, 8, 8] < errors[2, 2, 2, 2]
    with pytest.raises(ValueError, match="bits must be one number or 4, one for each step, got 3"):
        ordinary(blocks, reverse=Reverse("stored", bits=(8, 8, 8)))


@pytest.mark.parametrize("bits", stored.BITS)
@pytest.mark.parametrize("steps", [16, 64])
def test_bytes_held(steps, bits):
    """b + 0.25 bits a value and step, one companion, and what does not depend on the state's size."""
    dim, rows = 256, 64
    stack = ordinary([mlp(dim, 4) for _ in range(steps)], reverse=Reverse("stored", bits=bits))
    held = {}

    def pack(tensor):
        held[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor.detach()

    for parameter in stack.parameters():
        parameter.requires_grad_(False)
    x = torch.randn(rows, dim, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        out = stack(x)
    mine = {parameter.untyped_storage().data_ptr() for parameter in stack.parameters()}
    found = sum(size for address, size in held.items() if address not in mine)
    values = rows * dim
    expected = values * (steps * (bits + 0.25) + 32) / 8
    assert found == pytest.approx(expected, rel=0.02)
    half_square(out).backward()


def test_one_evaluation_a_step():
    stack, calls = ordinary(blocks_of(steps=5)), 0

    def count(*_):
        nonlocal calls
        calls += 1

    for block in stack:
        block.register_forward_pre_hook(count)
    out = stack(torch.randn(3, DIM))
    assert calls == 5
    half_square(out).backward()
    assert calls == 10
