"""Ranks that fail: the others end with an error, and a process that survives trains on."""

from __future__ import annotations

import os
from datetime import timedelta

import pytest
import torch
from torch import distributed, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from resode_cuda import ResidualStack
from tests.support.exact import TIGHT
from tests.support.modes import MODES
from tests.support.networks import gradients, half_square, mlp, relative_error
from tests.support.ranks import Ranks

DIM, ROWS, STEPS = 6, 12, 4
SECONDS = 2
"""The time-out of a group in which a rank fails."""


class Passed(torch.autograd.Function):
    """Its input; a fault to come is called in its backward pass."""

    @staticmethod
    def forward(ctx, x, block):
        ctx.block = block
        return x.clone()

    @staticmethod
    def backward(ctx, g):
        ctx.block.fail("backward")
        return g, None


class Faulty(nn.Module):
    """A block that fails at a given place, in the way that is given."""

    fault: tuple = (None, None)

    def __init__(self):
        super().__init__()
        self.inner = mlp(DIM)

    def forward(self, x):
        self.fail("again" if torch._C._current_graph_task_id() != -1 else "forward")
        return self.inner(Passed.apply(x, self))

    def fail(self, place):
        if place == Faulty.fault[0]:
            Faulty.fault[1]()


def raises():
    raise ValueError("the block is faulty")


def dies():
    os._exit(1)


def sharded(model, mesh):
    for block in model[1]:
        fully_shard(block, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def replicated(model, mesh):
    return DistributedDataParallel(model, process_group=mesh.get_group())


def model_of(mode):
    torch.set_default_dtype(torch.float64)
    torch.manual_seed(0)
    blocks = [mlp(DIM), Faulty(), *(mlp(DIM) for _ in range(STEPS - 2))]
    return nn.Sequential(nn.Linear(DIM, DIM), ResidualStack(blocks, **MODES[mode]))


GROUPS = {}
"""Groups of the first rank and another one, by this one and the way in which it fails."""


def make_groups(mesh):
    """On all ranks; those of a group that has failed are of no use for another one."""
    for rank in range(1, mesh.size()):
        for way in (raises, dies):
            GROUPS[rank, way] = distributed.new_group([0, rank], timeout=timedelta(seconds=SECONDS))


def broken_off(_, rank, distribute, mode, way):
    """A training step in which the block of one rank fails in the backward pass, after one in which none does."""
    group = GROUPS[rank, way]
    model = distribute(model_of(mode), DeviceMesh.from_group(group, "cpu"))
    x = torch.randn(ROWS, DIM)
    half_square(model(x)).backward()
    if distributed.get_rank():
        Faulty.fault = "again", way
    try:
        half_square(model(x)).backward()
    finally:
        Faulty.fault = None, None


@pytest.fixture(scope="module")
def several(tmp_path_factory):
    """Four processes of which the first one survives."""
    found = Ranks(tmp_path_factory.mktemp("several"), most=4, seconds=40)
    found.run(make_groups, count=4)
    yield found
    found.close()


@pytest.mark.parametrize(
    ("rank", "distribute", "mode"), [(1, sharded, "stored"), (2, sharded, "checkpoint"), (3, replicated, "exact")]
)
def test_a_rank_that_fails_ends_the_others(several, rank, distribute, mode):
    for way in (raises, dies):
        (is_done, error), (_, fault) = several.outcomes(broken_off, rank, distribute, mode, way, ranks=[0, rank])
        assert not is_done
        assert "gloo" in error
        assert "died" in fault if way is dies else "the block is faulty" in fault


def left_behind(model):
    """What FSDP's state is by now: of each block its phase, and whether its parameters are gathered."""
    states = [block._get_fsdp_state() for block in model[1]]
    return [
        (str(state._training_state), *(group.is_unsharded for group in state._fsdp_param_groups)) for state in states
    ]


def recovered(mesh, mode, place):
    """Errors of gradients before and after a pass in which a block raised on all ranks, and what that left behind."""
    model = model_of(mode)
    rows = torch.randn(ROWS, DIM).chunk(mesh.size())
    parameters = list(model.parameters())
    of_rows = [gradients(lambda x=x: model(x), parameters) for x in rows]
    own = [sum(of_parameter) for of_parameter in zip(*of_rows, strict=True)]
    sharded(model, mesh)

    def error():
        model.zero_grad()
        half_square(model(rows[mesh.get_local_rank()])).backward()
        return relative_error([p.grad.full_tensor() * mesh.size() for p in model.parameters()], own)

    errors = [error()]
    Faulty.fault = place, raises
    with pytest.raises(ValueError, match="the block is faulty"):
        error()
    Faulty.fault = None, None
    left = left_behind(model)
    model.zero_grad()  # or backprop's gradients, which lie on the gathered parameters, are there again in the next pass
    model.reset_iter_state()
    return [*errors, error(), error()], left


@pytest.mark.parametrize("mode", ["exact", "stored", "checkpoint"])
@pytest.mark.parametrize("place", ["forward", "again", "backward"])
def test_a_process_that_survives_trains_on(ranks, mode, place):
    """It leaves no more behind than backprop under FSDP, which torch's own call puts right."""
    plain = ranks.run(recovered, "backprop", "backward" if place == "again" else place)
    for (errors, left), (errors_of_plain, left_by_plain) in zip(ranks.run(recovered, mode, place), plain, strict=True):
        assert max(*errors, *errors_of_plain) < TIGHT
        assert left == left_by_plain
