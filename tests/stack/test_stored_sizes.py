"""States of very different sizes: what is stored of them is as good as of others, or told of."""

import warnings

import pytest
import torch
from torch import nn

from resode_cuda import DriftError, ResidualStack, Reverse
from tests.support.networks import gradients, half_square, relative_error
from tests.support.stored_networks import ordinary

DIM = 64


class Saturating(nn.Module):
    """Moves a state by about `size`, however small it is."""

    def __init__(self, size=1.0, dim=DIM):
        super().__init__()
        self.linear, self.size = nn.Linear(dim, dim), size

    def forward(self, x):
        return self.size * torch.tanh(self.linear(x / self.size))


class Massive(nn.Module):
    """A pre-norm block that may write something large into one channel of the first token."""

    def __init__(self, size=0.0):
        super().__init__()
        self.body = nn.Sequential(nn.LayerNorm(DIM), nn.Linear(DIM, 128), nn.GELU(), nn.Linear(128, DIM))
        self.size = size

    def forward(self, x):
        outlier = torch.zeros_like(x)
        outlier[:, 0, 3] = self.size
        return self.body(x) + outlier


def error_without_warnings(stack, x, loss=half_square):
    stack.on_drift = "raise"
    inputs = list(stack.parameters())
    found = gradients(lambda: stack(x), inputs, loss)
    stack.gradient = "backprop"
    return relative_error(found, gradients(lambda: stack(x), inputs, loss))


@pytest.mark.parametrize("share", [0.5, 0.99])
@pytest.mark.parametrize("size", [1e-3, 1e-5, 0.0])
def test_samples_that_begin_small(size, share):
    torch.manual_seed(0)
    stack, x = ordinary([Saturating() for _ in range(8)]), torch.randn(100, DIM)
    x[: int(100 * share)] *= size
    assert error_without_warnings(stack, x) < 5e-3


@pytest.mark.parametrize("scale", [1e-8, 1e-4, 1e4, 1e8])
def test_zeros_beside_states_of_any_size(scale):
    torch.manual_seed(0)
    stack, x = ordinary([Saturating(scale) for _ in range(8)]), scale * torch.randn(100, DIM)
    x[50:] = 0

    def loss(out):
        return (out / scale).square().mean()

    assert error_without_warnings(stack, x, loss) < 5e-3


@pytest.mark.parametrize("anchors", [None, (1,), (2,)], ids=str)
def test_one_channel_far_above_all_others(anchors):
    torch.manual_seed(0)
    stack = ordinary([Massive(2000.0 if n == 1 else 0.0) for n in range(8)], anchors=anchors)
    assert error_without_warnings(stack, torch.randn(8, 16, DIM), lambda out: out[:, 1:].square().mean()) < 3e-3


def test_what_cannot_be_stored_is_told_of():
    torch.manual_seed(0)
    blocks = [nn.Sequential(nn.Linear(33, 64), nn.Tanh(), nn.Linear(64, 33)) for _ in range(6)]
    x = torch.randn(64, 33)
    x[:, 0] = 1e5
    with pytest.raises(DriftError, match="the increment of step 0 could not be stored in its bits"):
        half_square(ordinary(blocks, on_drift="raise")(x)).backward()


def test_states_that_outgrow_the_first_ones_are_told_of():
    class Growing(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(DIM, DIM)

        def forward(self, x):
            return 20 * x + torch.tanh(self.linear(x))

    torch.manual_seed(0)
    stack = ordinary([Growing() for _ in range(6)], on_drift="raise")
    with pytest.raises(DriftError, match="could not be stored in its bits"):
        half_square(stack(torch.randn(4, DIM))).backward()


@pytest.mark.parametrize("bits", [8, 4, 2])
def test_large_steps_in_float64_are_finite(bits):
    torch.manual_seed(0)
    stack = ordinary([Saturating().double() for _ in range(6)], reverse=Reverse("stored", bits=bits))
    x = torch.randn(20, DIM).double()
    x[:10] *= 1e-9
    half_square(stack(x)).backward()
    assert all(parameter.grad.isfinite().all() for parameter in stack.parameters())


def test_a_decoder_that_begins_with_zeros_is_not_warned_of():
    torch.manual_seed(0)
    layers = [nn.TransformerDecoderLayer(DIM, 4, 128, batch_first=True, dropout=0.0) for _ in range(4)]
    stack, memory = ResidualStack(layers, form="block"), torch.randn(2, 7, DIM)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        half_square(stack(torch.zeros(2, 5, DIM), memory)).backward()
    assert stack.drift.maximum < 0.02


def test_steps_take_turns_in_the_samples_that_they_look_at():
    """A clamped sample between those that one step looks at is seen by another."""
    torch.manual_seed(0)
    blocks = [Massive() for _ in range(6)]
    blocks[2].size = 1e6
    stack = ordinary(blocks, on_drift="raise")
    x = torch.randn(9, 64, DIM)
    with pytest.raises(DriftError):
        half_square(stack(x)).backward()


@pytest.mark.parametrize("kept", [0.5, 0.02])
def test_increments_of_zero_beside_states_with_zeros_are_not_warned_of(kept):
    """As the stages of ResNets begin, whose blocks' last norms are of zeros, and whose states come from a ReLU."""

    class Beginning(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear, self.gain = nn.Linear(DIM, DIM), nn.Parameter(torch.zeros(()))

        def forward(self, x):
            return torch.relu(x + self.gain * self.linear(x))

    torch.manual_seed(0)
    stack = ResidualStack([Beginning() for _ in range(4)], form="block", on_drift="raise")
    x = torch.randn(16, DIM).abs()
    half_square(stack(x * (torch.rand_like(x) < kept))).backward()
