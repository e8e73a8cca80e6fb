"""Blocks with statistics, a training step of them, and the plain loop to hold it against."""

import copy

import torch
from torch import nn

from tests.support.networks import half_square, plain


class Outside:
    """Numbers that a block sees and no re-evaluation restores: not attributes of a module, but of another object."""

    def __init__(self, **numbers):
        vars(self).update(numbers)


def conv_bn(norm=nn.BatchNorm2d):
    return nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), norm(4), nn.ReLU(), nn.Conv2d(4, 3, 3, padding=1))


def train_step(run, module, x, seed=5, between=lambda: None):
    """Gradients of one training step; the step's random numbers start from the seed.

    Args:
        between: what happens after the forward pass and before the backward pass.
    """
    torch.manual_seed(seed)
    loss = half_square(run(x))
    between()
    return torch.autograd.grad(loss, [p for p in module.parameters() if p.requires_grad])


def plain_twin(blocks, scheme):
    """The same blocks, copied, as the ordinary network."""
    twin = nn.ModuleList(copy.deepcopy(blocks))
    return twin, lambda x: plain(twin, scheme, x)


def assert_same_buffers(module, twin):
    buffers, twins = dict(module.named_buffers()), dict(twin.named_buffers())
    assert len(buffers) == len(twins)
    assert all(torch.equal(a, b) for a, b in zip(buffers.values(), twins.values(), strict=True))
