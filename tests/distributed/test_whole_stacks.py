"""Stacks whose parameters torch's `fully_shard` takes care of, in a group of one process."""

import pytest
import torch
from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard

from resode_cuda import ResidualStack
from resode_cuda.schemes import SCHEMES
from tests.support.exact import EXACT
from tests.support.networks import gradients, half_square, mlps, parameters_of, plain, relative_error

pytestmark = [
    pytest.mark.usefixtures("float64"),
    pytest.mark.parametrize("scheme", SCHEMES),
    pytest.mark.parametrize("gradient", ["adjoint", "checkpoint", "backprop"]),
]


def test_a_sharded_stack_has_the_gradients_of_the_plain_loop(mesh, scheme, gradient):
    blocks, x = mlps(scheme, 3), torch.randn(5, 6)
    exact = gradients(lambda: plain(blocks, scheme, x), parameters_of(blocks))
    stack = fully_shard(ResidualStack(blocks, scheme, gradient=gradient, reverse=EXACT), mesh=mesh)
    half_square(stack(x)).backward()
    assert relative_error([p.grad.full_tensor() for p in stack.parameters()], exact) < 1e-12


class Wrapped(FullyShardedDataParallel):
    """FSDP1's wrapper, which can't be made without an accelerator; without what it does."""

    def __init__(self, inner):
        nn.Module.__init__(self)
        self.inner = inner

    __getattr__ = nn.Module.__getattr__

    def forward(self, x):
        return self.inner(x)


def test_blocks_wrapped_by_fsdp1_are_refused_by_number(mesh, scheme, gradient):
    blocks, x = mlps(scheme, 3), torch.randn(5, 6)
    stack = ResidualStack([blocks[0], Wrapped(blocks[1]), *blocks[2:]], scheme, gradient=gradient)
    if gradient == "backprop":
        half_square(stack(x)).backward()
    else:
        with pytest.raises(RuntimeError, match="block 1 must not be wrapped in FullyShardedDataParallel"):
            stack(x)


@pytest.mark.parametrize("reverse", ["corrected", "stored"])
def test_distribution_changes_no_gradient(mesh, scheme, gradient, reverse):
    """Two ways of it: DistributedDataParallel, and a stack that is sharded as a whole."""
    blocks, x = mlps(scheme, 3), torch.randn(5, 6)
    stack = ResidualStack(blocks, scheme, gradient=gradient, reverse=reverse)
    alone = gradients(lambda: stack(x), [*stack.parameters()])
    parallel = nn.parallel.DistributedDataParallel(stack)
    half_square(parallel(x)).backward()
    assert all(torch.equal(p.grad, g) for p, g in zip(stack.parameters(), alone, strict=True))
    sharded = fully_shard(ResidualStack(blocks, scheme, gradient=gradient, reverse=reverse), mesh=mesh)
    half_square(sharded(x)).backward()
    assert relative_error([p.grad.full_tensor() for p in sharded.parameters()], alone) < 1e-12
