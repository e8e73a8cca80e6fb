"""What calibrating leaves in memory: nothing, neither for the garbage collector nor beyond its reach."""

import gc
import math
from contextlib import contextmanager

import pytest
import torch
from torch import nn

from resode_cuda import ResidualStack, calibrate
from tests.support.networks import half_square, mlps


@contextmanager
def no_collector():
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


def live_tensors():
    return sum(issubclass(type(found), torch.Tensor) for found in gc.get_objects())


class InnerGradient(nn.Module):
    """A block that is itself a gradient, so that what autograd saved is unpacked within the forward pass."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(6, 6)

    def forward(self, x):
        with torch.enable_grad():
            x = x if x.requires_grad else x.detach().requires_grad_()
            return torch.autograd.grad(self.linear(x).tanh().square().sum(), x, create_graph=True)[0]


@pytest.mark.parametrize("scheme", ["euler", "heun"])
def test_thirty_calibrations_leave_no_tensor(scheme):
    # tanh, sigmoid and softmax save their outputs.
    blocks = [nn.Sequential(nn.Linear(6, 6), nn.Tanh(), nn.Sigmoid(), nn.Softmax(-1)) for _ in range(5)]
    stack, x = ResidualStack(blocks, scheme), torch.randn(3, 6)
    calibrate(stack, x)
    with no_collector():
        before = live_tensors()
        for _ in range(30):
            calibrate(stack, x)
        assert live_tensors() == before
        gc.collect()
        assert live_tensors() <= before


def test_recalibrations_leave_no_tensor():
    stack, x = ResidualStack(mlps("euler", 4)).recalibrate_every(1), torch.randn(3, 6)
    stack._recalibration.share = math.inf  # every training step calibrates

    def train(steps):
        for _ in range(steps):
            stack.zero_grad()
            half_square(stack(x)).backward()

    train(2)
    with no_collector():
        before, spent = live_tensors(), stack._recalibration._spent
        train(30)
        assert stack._recalibration._spent > spent
        assert live_tensors() == before
        gc.collect()
        assert live_tensors() <= before


def test_blocks_that_differentiate_within_themselves_are_calibrated():
    plan = calibrate(ResidualStack([InnerGradient() for _ in range(6)]), torch.randn(3, 6), tolerance=1e-3)
    assert plan.chosen.error <= 1e-3
    assert not plan.is_last_resort
