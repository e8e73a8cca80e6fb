"""The preset "paper" beside the paper's method written out once more, from its formulas and autograd alone."""

import pytest
import torch

from resode_cuda import ResidualStack
from tests.support.networks import block_count, parameters_of, reference_blocks, reference_input

pytestmark = pytest.mark.usefixtures("float64")


def paper_gradients(blocks, scheme, x, h):
    """The gradients of |x_N|²/2: states are rebuilt by the scheme run backwards, products are taken there."""

    def increment(n, x, h):
        first, last = (n, n + 1) if h > 0 else (n + 1, n)
        if scheme == "euler":
            return h * blocks[n](x)
        k1 = blocks[first](x)
        return h / 2 * (k1 + blocks[last](x + h * k1))

    steps, total = round(1 / h), {p: torch.zeros_like(p) for p in parameters_of(blocks)}
    with torch.no_grad():
        for n in range(steps):
            x = x + increment(n, x, h)
    g = x.clone()
    for n in reversed(range(steps)):
        x = (x + increment(n, x, -h)).detach().requires_grad_()
        through, *products = torch.autograd.grad(increment(n, x, h), [x, *total], g, allow_unused=True)
        total = {p: sum_ if v is None else sum_ + v for (p, sum_), v in zip(total.items(), products, strict=True)}
        g = g + through
    return x.detach(), [g, *total.values()]


@pytest.mark.parametrize("weights", ["smooth", "independent"])
@pytest.mark.parametrize("scheme", ["euler", "heun"])
def test_gradients_and_first_state_are_those_of_the_paper(scheme, weights):
    steps = 16
    blocks, x = reference_blocks(block_count(scheme, steps), weights), reference_input()
    rebuilt, expected = paper_gradients(blocks, scheme, x, 1 / steps)
    stack, x = ResidualStack(blocks, scheme, reverse="paper"), x.requires_grad_()
    out = stack(x)
    got = torch.autograd.grad(out.square().sum() / 2, [x, *parameters_of(blocks)])
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(stack.invert(out.detach()), rebuilt, rtol=1e-12, atol=1e-12)
