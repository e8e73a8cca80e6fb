"""Networks of ordinary form, h = 1, whose increments are stored."""

import copy

from torch import nn

from resode_cuda import ResidualStack
from tests.support.networks import block_count, gradients, half_square, mlp, relative_error

SCHEMES = ["euler", "heun"]
DIM = 40


def blocks_of(scheme="euler", steps=6, scale=1.0, dim=DIM):
    return [mlp(dim, 32, scale) for _ in range(block_count(scheme, steps))]


def ordinary(blocks, scheme="euler", **options):
    """A network of h = 1."""
    return ResidualStack(blocks, scheme, step=1.0, **{"on_drift": "ignore", **options})


def error_of(stack, x, *args, loss=half_square):
    """Relative error of the gradients of the parameters and the input."""
    inputs = [x, *stack.parameters()]
    found = gradients(lambda: stack(x, *args), inputs, loss)
    exact = copy.deepcopy(stack)
    exact.gradient = "backprop"
    inputs = [x, *exact.parameters()]
    return relative_error(found, gradients(lambda: exact(x, *args), inputs, loss))


class Adding(nn.Module):
    def __init__(self, body):
        super().__init__()
        self.body = body

    def forward(self, x):
        return x + self.body(x)
