"""What a step takes whose blocks `fully_shard` shards one by one: collectives and evaluations."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.utils.checkpoint import checkpoint

from resode_cuda import ResidualStack, Reverse
from resode_cuda.schemes import SCHEMES
from tests.support.networks import half_square, mlps, plain
from tests.support.sharded import Counted

DIM, ROWS, STEPS = 6, 12, 4


class Checkpointed(nn.Module):
    """The plain loop over blocks, each evaluation checkpointed."""

    def __init__(self, blocks, scheme):
        super().__init__()
        self.blocks, self.scheme = nn.ModuleList(blocks), scheme

    def forward(self, x):
        return plain([self._checkpointed(block) for block in self.blocks], self.scheme, x)

    @staticmethod
    def _checkpointed(block):
        return lambda x: checkpoint(block, x, use_reentrant=False)


def collectives(mesh, scheme, options, repeats, reshard):
    """How many of each kind a training step takes; options None is FSDP with checkpointing."""
    blocks = mlps(scheme, STEPS)
    if repeats:
        blocks[2] = blocks[1]
    stack = Checkpointed(blocks, scheme) if options is None else ResidualStack(blocks, scheme, **options)
    for block in dict.fromkeys(blocks):
        fully_shard(block, mesh=mesh, reshard_after_forward=reshard)
    model = fully_shard(nn.Sequential(nn.Linear(DIM, DIM), stack), mesh=mesh, reshard_after_forward=reshard)
    for _ in range(2):
        with Counted() as counted:
            half_square(model(torch.randn(ROWS, DIM))).backward()
    return counted.collectives


MODES = {
    "corrected": {"reverse": Reverse("step", corrections=2)},
    "extrapolated": {"reverse": "extrapolated"},
    "stored": {"reverse": "stored"},
    "checkpoint": {"gradient": "checkpoint"},
    "backprop": {"gradient": "backprop"},
}

REBUILDING = "corrected", "extrapolated", "stored"


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("repeats", [False, True], ids=["distinct", "repeated"])
@pytest.mark.parametrize("reshard", [True, False], ids=["reshard", "keep"])
def test_collectives_are_those_of_checkpointing(ranks, scheme, repeats, reshard):
    wanted = ranks.run(collectives, scheme, None, repeats, reshard)
    assert sum(wanted[0].values()) > STEPS
    for mode, options in MODES.items():
        found = ranks.run(collectives, scheme, options, repeats, reshard)
        if repeats and scheme == "heun" and mode in REBUILDING:
            # The step whose two blocks are one module gathers it once.
            assert all(found[0][kind] <= count for kind, count in wanted[0].items())
        else:
            assert found == wanted


def products(mesh, reverse):
    """Matrix products of a training step after the first, without those of the gradients."""
    stack = ResidualStack(mlps("euler", STEPS), reverse=reverse)
    for block in stack:
        fully_shard(block, mesh=mesh)
    fully_shard(stack, mesh=mesh)
    for _ in range(3):
        with Counted() as counted:
            half_square(stack(torch.randn(ROWS, DIM))).backward()
    return counted.ops["aten.addmm"]


def test_blocks_run_again_no_further_than_their_last_saved_tensor(ranks):
    # Two products forwards, one of them again; one step in turn is measured, and runs to its end.
    assert ranks.run(products, "stored") == [3 * STEPS + 1] * 2
    assert ranks.run(products, "corrected") == [6 * STEPS] * 2
