"""Stacks whose parameters torch's `fully_shard` takes care of, in a group of one process."""

import pytest
import torch
from torch import distributed, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from resode_cuda import ResidualStack
from resode_cuda.schemes import SCHEMES
from tests.support.exact import EXACT
from tests.support.networks import gradients, half_square, mlps, parameters_of, plain, relative_error

pytestmark = [
    pytest.mark.usefixtures("float64"),
    pytest.mark.parametrize("scheme", SCHEMES),
    pytest.mark.parametrize("gradient", ["adjoint", "checkpoint", "backprop"]),
]


@pytest.fixture(scope="module")
def mesh():
    distributed.init_process_group("gloo", rank=0, world_size=1, store=distributed.HashStore())
    yield init_device_mesh("cpu", (1,))
    distributed.destroy_process_group()


def test_a_sharded_stack_has_the_gradients_of_the_plain_loop(mesh, scheme, gradient):
    blocks, x = mlps(scheme, 3), torch.randn(5, 6)
    exact = gradients(lambda: plain(blocks, scheme, x), parameters_of(blocks))
    stack = fully_shard(ResidualStack(blocks, scheme, gradient=gradient, reverse=EXACT), mesh=mesh)
    half_square(stack(x)).backward()
    assert relative_error([p.grad.full_tensor() for p in stack.parameters()], exact) < 1e-12


@pytest.mark.parametrize("is_inside", [False, True], ids=["block", "inside a block"])
def test_blocks_that_are_sharded_one_by_one_are_refused_by_number(mesh, scheme, gradient, is_inside):
    blocks, x = [nn.Sequential(*block) for block in mlps(scheme, 3)], torch.randn(5, 6)
    exact = gradients(lambda: plain(blocks, scheme, x), parameters_of(blocks))
    stack = ResidualStack(blocks, scheme, gradient=gradient)
    for block in blocks[1:]:
        fully_shard(block[0] if is_inside else block, mesh=mesh)
    fully_shard(stack, mesh=mesh)
    if gradient == "backprop":
        half_square(stack(x)).backward()
        assert relative_error([p.grad.full_tensor() for p in stack.parameters()], exact) < 1e-12
    else:
        with pytest.raises(RuntimeError, match="block 1 must not be sharded by itself"):
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
