"""State that blocks hide in odd places is replayed, refused or noticed."""

import math

import pytest
import torch
from torch import nn

from resode_cuda import DriftError, ResidualStack, calibrate
from tests.support.networks import gradients, half_square, parameters_of, plain, relative_error
from tests.support.stateful import Outside

pytestmark = pytest.mark.usefixtures("float64")


class Hiding(nn.Module):
    """tanh of a linear map times what `factor` makes of hidden state."""

    def __init__(self):
        super().__init__()
        self.body = nn.Linear(6, 6)
        self.hide()

    def hide(self):
        """Make the hidden state."""

    def forward(self, x):
        return self.factor(torch.tanh(self.body(x)))


def error_of(block, gradient="adjoint", **options):
    """Relative gradient error of a stack of such blocks, evaluated at the exact states, against the plain loop."""
    torch.manual_seed(3)
    blocks, x = [block() for _ in range(3)], torch.randn(4, 6)
    torch.manual_seed(3)
    twins = [block() for _ in range(3)]
    expected = gradients(lambda: plain(twins, "euler", x), parameters_of(twins))
    stack = ResidualStack(blocks, gradient=gradient, anchors=1, **options)
    return relative_error(gradients(lambda: stack(x), parameters_of(blocks)), expected)


class MovingAverage(Hiding):
    def hide(self):
        self.mean = torch.ones(6)

    def factor(self, h):
        out = h * self.mean
        self.mean = 0.95 * self.mean + 0.15 * h.detach().mean(0)
        return out


class Adjacency(Hiding):
    def hide(self):
        self.register_buffer("edges", torch.eye(4).to_sparse())

    def factor(self, h):
        return torch.sparse.mm(self.edges, h)


class Expanded(Hiding):
    def hide(self):
        self.register_buffer("ones", torch.ones(1).expand(3000, 3000))

    def factor(self, h):
        return h * self.ones[:1, :6]


class NestedLog(Hiding):
    def hide(self):
        self.log = {"norms": []}

    def factor(self, h):
        self.log["norms"].append(len(self.log["norms"]))
        return h * math.cos(len(self.log["norms"]))


@pytest.mark.parametrize("gradient", ["adjoint", "checkpoint"])
@pytest.mark.parametrize("block", [MovingAverage, Adjacency, Expanded, NestedLog])
def test_what_is_replayed(block, gradient):
    assert error_of(block, gradient) < 1e-12


def test_nested_containers_keep_what_the_forward_pass_left_alone():
    blocks = [NestedLog() for _ in range(3)]
    half_square(ResidualStack(blocks)(torch.randn(4, 6))).backward()
    assert [block.log for block in blocks] == [{"norms": [0]}] * 3


class Growing(Hiding):
    """Grows by 5% with each call, out of sight."""

    def hide(self):
        self.outside = Outside(scale=1.0)

    def factor(self, h):
        self.outside.scale *= 1.05
        return h * self.outside.scale


def test_small_changes_are_noticed_at_exact_states():
    with pytest.warns(RuntimeWarning, match=r"ResidualStack: block \d changed its increment by \d.*%"):
        assert error_of(Growing) > 1e-2
    with pytest.raises(DriftError, match="changed its increment by"):
        error_of(Growing, "checkpoint")


class KeptInAList(Hiding):
    def hide(self):
        self.kept = [torch.ones(6)]

    def factor(self, h):
        out = h * self.kept[0].clone()
        self.kept[0].mul_(1.05)
        return out


@pytest.mark.parametrize("gradient", ["adjoint", "checkpoint"])
def test_tensors_in_containers_must_not_be_written(gradient):
    stack = ResidualStack([KeptInAList()], gradient=gradient)
    with pytest.raises(RuntimeError, match=r"must not write a tensor in a container among its .* KeptInAList did"):
        stack(torch.randn(4, 6))


class LargeTable(Hiding):
    def hide(self):
        self.table = torch.ones(200, 100)

    def factor(self, h):
        out = h * self.table[0, :6].clone()
        self.table.mul_(1.05)
        return out


def test_large_attributes_must_not_be_written():
    with pytest.raises(RuntimeError, match=r"must not write a tensor of more than 16384 .* wrote 'table'; register it"):
        ResidualStack([LargeTable()])(torch.randn(4, 6))


def test_every_step_of_every_stack_has_its_turn_to_be_compared():
    stacks = [ResidualStack([Growing() for _ in range(4)], gradient="checkpoint") for _ in range(4)]
    for stack in stacks:
        for block in stack:
            block.forward = lambda x, block=block: torch.tanh(block.body(x)) * block.outside.scale
    for stack in stacks:
        found = []
        for _ in range(4):
            out = torch.randn(4, 6)
            for other in stacks:
                out = other(out)
            stack[2].outside.scale = -stack[2].outside.scale
            try:
                half_square(out).backward()
            except DriftError as error:
                found.append(str(error))
        assert len(found) == 1
        assert "block 2 changed its increment" in found[0]


class Flipping(Hiding):
    def hide(self):
        self.outside = Outside(sign=1)

    def factor(self, h):
        return self.body(h) * self.outside.sign


@pytest.mark.parametrize("size", [1e-30, 1.0, 1e25])
def test_a_flipped_sign_is_noticed_in_states_of_any_size(size):
    class Linear(Flipping):
        def forward(self, x):
            return self.body(x) * self.outside.sign

    blocks = [Linear().float() for _ in range(3)]
    loss = ResidualStack(blocks, anchors=1)(size * torch.randn(4, 6, dtype=torch.float32)).sum()
    for block in blocks:
        block.outside.sign = -1
    with pytest.warns(RuntimeWarning, match=r"changed its increment by \d+%"):
        loss.backward()


class Seeding(Hiding):
    def factor(self, h):
        torch.manual_seed(42)
        return h * torch.rand(6)


@pytest.mark.parametrize("gradient", ["adjoint", "checkpoint"])
def test_blocks_that_seed_leave_the_generator_of_the_backward_pass_alone(gradient):
    loss = half_square(ResidualStack([Seeding() for _ in range(3)], gradient=gradient)(torch.randn(4, 6)))
    torch.manual_seed(7)
    before = torch.get_rng_state()
    loss.backward()
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("gradient", ["adjoint", "checkpoint"])
def test_attributes_of_arguments_are_those_of_the_forward_pass_and_the_callers_again(gradient):
    class Scaled(nn.Module):
        def __init__(self):
            super().__init__()
            self.body = nn.Linear(6, 6)

        def forward(self, x, mask):
            return torch.tanh(self.body(x)) * mask * mask.scale

    blocks, x, mask = [Scaled() for _ in range(3)], torch.randn(4, 6), torch.ones(6)
    mask.scale, mask.table = 0.7, torch.ones(2)
    expected = gradients(lambda: plain(blocks, "euler", x, mask), parameters_of(blocks))
    loss = half_square(ResidualStack(blocks, gradient=gradient, anchors=1)(x, mask))
    del mask.scale
    mask.table = table = torch.zeros(2)
    mask.label = "mine"
    got = torch.autograd.grad(loss, parameters_of(blocks))
    assert relative_error(got, expected) < 1e-12
    assert vars(mask) == {"table": table, "label": "mine"}


def test_calibrate_gives_each_trial_containers_of_its_own():
    class Popping(nn.Module):
        def __init__(self):
            super().__init__()
            self.body = nn.Linear(6, 6)

        def forward(self, x, shifts):
            return torch.tanh(self.body(x) + shifts.pop())

    shifts = [0.1, 0.2, 0.3]
    plan = calibrate(ResidualStack([Popping() for _ in range(3)]), torch.randn(4, 6), shifts, tolerance=1e-6)
    assert plan.chosen.error <= 1e-6
    assert shifts == [0.1, 0.2, 0.3]


@pytest.mark.parametrize("reverse", ["paper", "corrected", "extrapolated"])
def test_a_hook_that_a_block_puts_on_its_input_does_not_reach_the_output(reverse):
    class HooksItsInput(nn.Module):
        def __init__(self):
            super().__init__()
            self.body = nn.Linear(6, 6)

        def forward(self, x):
            if x.requires_grad:
                x.register_hook(lambda g: 2 * g)
            return torch.tanh(self.body(x))

    out = ResidualStack([HooksItsInput()], reverse=reverse)(torch.randn(4, 6))
    half_square(out).backward()
    assert not out._backward_hooks


def test_calibrate_leaves_tensors_that_are_no_buffers_alone():
    class Tallying(Hiding):
        def hide(self):
            self.tally = torch.zeros(6)

        def factor(self, h):
            self.tally += 1
            return h

    stack = ResidualStack([Tallying() for _ in range(3)])
    calibrate(stack, torch.randn(4, 6))
    assert all(block.tally.sum() == 0 for block in stack)
