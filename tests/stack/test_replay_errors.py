"""Blocks that raise leave everything as it was."""

import copy

import pytest
import torch
from torch import nn

from resode_cuda import ResidualStack
from resode_cuda.schemes import SCHEMES
from tests.support.networks import block_count, half_square, plain, relative_error
from tests.support.stateful import Outside, assert_same_buffers, conv_bn, plain_twin, train_step

pytestmark = [
    pytest.mark.usefixtures("float64"),
    pytest.mark.parametrize("scheme", SCHEMES),
]


class Failing(nn.Module):
    """Fails from its n-th call on, until told to work."""

    def __init__(self, error, calls):
        super().__init__()
        self.norm, self.body, self.outside = nn.BatchNorm2d(3), conv_bn(), Outside(error=error, calls=calls)
        self.dropout = nn.Dropout(0.3)
        self.register_buffer("seen", torch.zeros(()))

    def forward(self, x):
        self.seen.add_(1)
        x = self.dropout(self.norm(x))
        self.outside.calls -= 1
        if self.outside.calls < 0 and self.outside.error is not None:
            raise self.outside.error("stop here")
        return self.body(x)


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
@pytest.mark.parametrize("gradient", ["adjoint", "checkpoint"])
@pytest.mark.parametrize("evaluation", [0, 1])
def test_a_block_that_raises_in_backward_leaves_everything_as_it_was(scheme, error, gradient, evaluation):
    blocks = [Failing(None, 0) for _ in range(block_count(scheme, 4))]
    stack, x = ResidualStack(blocks, scheme, gradient=gradient), torch.randn(4, 3, 5, 5)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = half_square(stack(x))
    stack.eval()
    blocks[2].outside.error, blocks[2].outside.calls = error, evaluation
    state = snapshot(stack)
    if gradient == "adjoint" or evaluation == 0:
        with pytest.raises(error, match="stop here"):
            loss.backward()
    assert_unchanged(stack, state)
    blocks[2].outside.error = None
    stack.train()
    stack.zero_grad()
    fresh_blocks = copy.deepcopy(blocks)
    exact = train_step(lambda x: plain(fresh_blocks, scheme, x), nn.ModuleList(fresh_blocks), x)
    assert relative_error(train_step(stack, stack, x), exact) < 0.2


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_a_block_that_raises_in_forward_leaves_what_the_plain_loop_leaves(scheme, error):
    blocks = [Failing(None, 0) for _ in range(block_count(scheme, 4))]
    blocks[2].outside.error = error
    stack, x = ResidualStack(blocks, scheme), torch.randn(4, 3, 5, 5)
    twin, run = plain_twin(blocks, scheme)
    states = []
    for module, run_ in ((twin, run), (stack, stack)):
        torch.manual_seed(1)
        with torch.autocast("cpu", dtype=torch.bfloat16), pytest.raises(error, match="stop here"):
            run_(x)
        states.append(snapshot(module))
        module.get_submodule("2").outside.error = None
    for a, b in zip(*states, strict=True):
        assert len(a) == len(b)
        assert all(torch.equal(p, q) if isinstance(p, torch.Tensor) else p == q for p, q in zip(a, b, strict=True))
    assert relative_error(train_step(stack, stack, x), train_step(run, twin, x)) < 0.2
    assert_same_buffers(stack, twin)


def snapshot(module):
    return (
        [torch.get_rng_state()],
        [torch.is_autocast_enabled("cpu"), torch.is_autocast_cache_enabled(), torch.is_grad_enabled()],
        # The stack itself is not among the blocks that its twin has.
        [child.training for block in module.children() for child in block.modules()],
        [buffer.clone() for buffer in module.buffers()],
        [parameter.clone() for parameter in module.parameters()],
    )


def assert_unchanged(module, state):
    for a, b in zip(snapshot(module), state, strict=True):
        assert all(torch.equal(p, q) if isinstance(p, torch.Tensor) else p == q for p, q in zip(a, b, strict=True))


def test_a_block_that_is_refused_is_left_as_it_was(scheme):
    """Its lists of parameters too, which a recurrent layer keeps."""

    class Writing(nn.Module):
        def __init__(self):
            super().__init__()
            self.recurrent = nn.GRU(6, 6, batch_first=True)

        def forward(self, x, scale):
            scale.mul_(2)
            return self.recurrent(x)[0] * scale

    stack = ResidualStack([Writing() for _ in range(3)], scheme, step=1.0)
    for _ in range(2):
        with pytest.raises(RuntimeError, match="must not write a tensor among its arguments"):
            stack(torch.randn(2, 3, 6), torch.ones(6))
    assert len(stack[0].recurrent._flat_weights) == 4
