"""Stacks whose blocks are split over ranks: layers by `parallelize_module`, states along the sequence."""

from __future__ import annotations

import pytest
import torch
from torch import distributed, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard

from resode_cuda import ResidualStack
from tests.support.exact import TIGHT
from tests.support.modes import EXACTLY, MODES
from tests.support.networks import relative_error
from tests.support.split_blocks import (
    DIM,
    LENGTH,
    ROWS,
    SOME,
    TwoLayers,
    are_same,
    by_itself,
    gather_first,
    part_of,
    split_layers,
    split_sequence,
    stack_of,
    trained,
    whole,
)

TRIED = [mode for mode in MODES if mode != "accelerated"]


def replicated(mesh, scheme, mode):
    stack, x = stack_of(scheme, mode), torch.randn(ROWS, LENGTH, DIM, requires_grad=True)
    own, exact = by_itself(stack, x)
    split_layers(stack, mesh)
    found = trained(stack, x)
    copies = [g.to_local() if isinstance(g, DTensor) else g for g in found if not _is_split(g)]
    found = whole(found)
    return relative_error(found, own), relative_error(found, exact), are_same(mesh, copies)


def _is_split(gradient):
    return isinstance(gradient, DTensor) and gradient.placements != (Replicate(),)


@pytest.mark.parametrize(("scheme", "mode"), [*[("euler", mode) for mode in TRIED], *[("heun", mode) for mode in SOME]])
def test_split_layers_have_the_gradients_of_whole_ones(ranks, scheme, mode):
    for own, exact, are_copies_equal in ranks.run(replicated, scheme, mode):
        assert own < TIGHT
        assert are_copies_equal
        if mode in EXACTLY:
            assert exact < TIGHT


def along_the_sequence(mesh, scheme, mode, split):
    stack, x = stack_of(scheme, mode), torch.randn(ROWS, LENGTH, DIM, requires_grad=True)
    own, exact = by_itself(stack, x)
    split(stack, mesh)
    of_x, *of_parameters = trained(stack, part_of(x, mesh))
    found = whole([DTensor.from_local(of_x, mesh, [Shard(1)]), *of_parameters])
    return relative_error(found, own), relative_error(found, exact)


@pytest.mark.parametrize(
    ("split", "scheme", "mode"),
    [
        *[(split_sequence, "euler", mode) for mode in TRIED],
        *[(split_sequence, "heun", mode) for mode in ("corrected", "stored")],
        *[(gather_first, "euler", mode) for mode in SOME],
    ],
)
def test_states_that_are_split_along_the_sequence(ranks, split, scheme, mode):
    for own, exact in ranks.run(along_the_sequence, scheme, mode, split):
        if MODES[mode].get("reverse") in ("stored", MODES["rounded"]["reverse"]):
            # Each rank takes the units of its increments from its own part of the state.
            assert exact < 0.01
        else:
            assert own < TIGHT
        if mode in EXACTLY:
            assert exact < TIGHT


class Gathered(torch.autograd.Function):
    """The whole sequence from its parts; backwards, the sum of all ranks' gradients, of which each keeps its part."""

    @staticmethod
    def forward(ctx, x, group):
        ctx.group = group
        found = [torch.empty_like(x) for _ in range(distributed.get_world_size(group))]
        distributed.all_gather(found, x.contiguous(), group)
        return torch.cat(found, 1)

    @staticmethod
    def backward(ctx, g):
        return _part_of_sum(g, ctx.group), None


class Scattered(torch.autograd.Function):
    """This rank's part of the sum over ranks; backwards, the whole gradient."""

    @staticmethod
    def forward(ctx, x, group):
        ctx.group = group
        return _part_of_sum(x, group)

    @staticmethod
    def backward(ctx, g):
        return Gathered.forward(ctx, g, ctx.group), None


def _part_of_sum(x, group):
    summed = x.contiguous().clone()
    distributed.all_reduce(summed, group=group)
    return summed.chunk(distributed.get_world_size(group), 1)[distributed.get_rank(group)].contiguous()


class ByHand(nn.Module):
    """Two layers whose collectives are written by hand, with ordinary tensors for parameters."""

    def __init__(self, block, mesh):
        super().__init__()
        self.group, rank, count = mesh.get_group(), mesh.get_local_rank(), mesh.size()
        self.up = nn.Parameter(block.up.weight.detach().chunk(count)[rank].clone())
        self.shift = nn.Parameter(block.up.bias.detach().chunk(count)[rank].clone())
        self.down = nn.Parameter(block.down.weight.detach().chunk(count, 1)[rank].clone())

    def forward(self, x):
        x = Gathered.apply(x, self.group)
        return Scattered.apply(torch.tanh(x @ self.up.T + self.shift) @ self.down.T, self.group)


def by_hand(mesh, scheme, mode):
    stack, x = stack_of(scheme, mode, TwoLayers), torch.randn(ROWS, LENGTH, DIM, requires_grad=True)
    own, exact = by_itself(stack, x)
    split = ResidualStack([ByHand(block, mesh) for block in stack], scheme, **MODES[mode])
    of_x, *of_parameters = trained(split, part_of(x, mesh))
    placements = (0, 0, 1) * len(stack)
    parts = [of_x, *of_parameters]
    found = [
        DTensor.from_local(g, mesh, [Shard(dim)]).full_tensor() for g, dim in zip(parts, (1, *placements), strict=True)
    ]
    return relative_error(found, own), relative_error(found, exact)


@pytest.mark.parametrize(("scheme", "mode"), [*[("euler", mode) for mode in TRIED], *[("heun", mode) for mode in SOME]])
def test_collectives_by_hand(ranks, scheme, mode):
    for own, exact in ranks.run(by_hand, scheme, mode):
        assert exact < 0.01 if mode in ("stored", "rounded") else own < TIGHT
        if mode in EXACTLY:
            assert exact < TIGHT


def sharded_too(mesh, mode, shape):
    stack, x = stack_of("euler", mode), torch.randn(ROWS, LENGTH, DIM, requires_grad=True)
    own, _ = by_itself(stack, x)
    both = init_device_mesh("cpu", shape, mesh_dim_names=("data", "tensor"))
    split_layers(stack, both["tensor"])
    for block in stack:
        fully_shard(block, mesh=both["data"])
    return relative_error(whole(trained(stack, x)), own)


@pytest.mark.parametrize("mode", SOME)
@pytest.mark.parametrize("shape", [(1, 3), (3, 1)])
def test_split_layers_that_are_sharded_too(ranks, mode, shape):
    assert max(ranks.run(sharded_too, mode, shape, count=3)) < TIGHT
