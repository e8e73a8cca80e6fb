"""Calibrating where autograd is off: under torch.no_grad(), in inference mode, and with tensors from there."""

import pytest
import torch
from torch import nn

from resode_cuda import ResidualStack, calibrate
from tests.support.networks import mlps


class Scaled(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(6, 6)

    def forward(self, x, scale, *, shifts):
        return torch.tanh(self.linear(x)) * scale + shifts[0]


def errors(plan):
    return [candidate.error for candidate in plan.candidates]


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("with_norm", [False, True], ids=["plain", "batch norm"])
def test_calibrating_where_autograd_is_off(mode, with_norm):
    blocks = mlps("euler", 6)
    if with_norm:
        blocks = [nn.Sequential(nn.BatchNorm1d(6), block) for block in blocks]
    stack, x = ResidualStack(blocks), torch.randn(4, 6)
    expected = errors(calibrate(stack, x, tolerance=1e-3))
    with mode():
        assert errors(calibrate(stack, x, tolerance=1e-3)) == expected
        assert errors(calibrate(stack, x.clone(), tolerance=1e-3)) == expected  # an inference tensor
        assert not torch.is_grad_enabled()
        assert torch.is_inference_mode_enabled() == (mode is torch.inference_mode)
    assert not any(tensor.is_inference() for tensor in stack.state_dict().values())
    assert errors(calibrate(stack, x, tolerance=1e-3)) == expected


def test_inference_tensors_among_the_arguments():
    stack = ResidualStack([Scaled() for _ in range(6)])
    x, scale, shift = torch.randn(4, 6), torch.rand(6), torch.randn(6)
    expected = errors(calibrate(stack, x, scale, shifts=[shift], tolerance=1e-3))
    with torch.inference_mode():
        made_there = x.clone(), scale.clone(), shift.clone()
    assert errors(calibrate(stack, *made_there[:2], shifts=[made_there[2]], tolerance=1e-3)) == expected
    assert all(tensor.is_inference() for tensor in made_there)


def test_a_stack_that_can_have_no_gradients_is_named():
    with torch.inference_mode():
        stack = ResidualStack(mlps("euler", 4))
    with pytest.raises(
        TypeError, match=r"calibrate: the stack's parameters .*, got inference tensors; build or load it"
    ):
        calibrate(stack, torch.randn(4, 6))
