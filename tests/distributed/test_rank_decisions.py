"""What ranks that compute blocks together decide alike, so that their collectives fit, and what they need not."""

from __future__ import annotations

import math
import warnings

import pytest
import torch
from torch import distributed, nn
from torch.distributed.tensor import DTensor, Replicate, distribute_module
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    RowwiseParallel,
    parallelize_module,
)

from resode_cuda import ResidualStack
from tests.support.exact import TIGHT
from tests.support.networks import gradients, half_square, plain, relative_error
from tests.support.split_blocks import (
    DIM,
    HIDDEN,
    LENGTH,
    ROWS,
    STEPS,
    Perceptron,
    TwoLayers,
    part_of,
    split_sequence,
    trained,
    whole,
)


class Experts(nn.Module):
    """Two layers of which one is taken."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(DIM, HIDDEN, bias=False), nn.Linear(DIM, HIDDEN, bias=False)
        self.down, self.limit = nn.Linear(HIDDEN, DIM), 0.0

    def forward(self, x):
        expert = self.first if float(x.sum()) < self.limit else self.second
        return self.down(torch.tanh(expert(x)))


def split_experts(blocks, mesh):
    for block in blocks:
        parallelize_module(
            block, mesh, dict.fromkeys(("first", "second"), ColwiseParallel()) | {"down": RowwiseParallel()}
        )


def copy_experts(blocks, mesh):
    """All ranks have all parameters, as DTensors."""
    for block in blocks:
        distribute_module(
            block,
            mesh,
            input_fn=lambda _, given, on: (DTensor.from_local(given[0], on, [Replicate()]),),
            output_fn=lambda _, out, on: out.to_local(),
        )


def experts(mesh, split):
    torch.set_default_dtype(torch.float64)
    stack, state = ResidualStack([Experts() for _ in range(STEPS)], step=1.0), torch.randn(ROWS, DIM)
    x = state.clone().requires_grad_()
    with torch.no_grad():
        for block in stack:
            block.limit = float(state.sum()) + 1e-9  # the companion lies on either side
            state = state + block(state)
    if split is not None:
        split(stack, mesh)
    found = trained(stack, x)
    return [g is not None for g in found], [g.norm().item() for g in whole([g for g in found if g is not None])]


@pytest.mark.parametrize("split", [split_experts, copy_experts])
def test_experts_that_change_places_get_gradients_of_their_own(ranks, split):
    (taken, sizes), _ = ranks.run(experts, None)
    for of_rank in ranks.run(experts, split):
        assert of_rank[0] == taken
        assert of_rank[1] == pytest.approx(sizes, rel=TIGHT)


class Crossing(nn.Module):
    """Adds up over ranks what it computes, and does so in another way where its input is small."""

    def __init__(self, block, limit, group):
        super().__init__()
        self.block, self.limit, self.group = block, limit, group

    def forward(self, x):
        hidden = torch.tanh(self.block.up(x))
        if float(x.abs().sum()) < self.limit:
            hidden = hidden * hidden
        return self.block.down(Summed.apply(hidden, self.group))


class Summed(torch.autograd.Function):
    """A sum over ranks, which all have its gradient."""

    @staticmethod
    def forward(ctx, x, group):
        ctx.group, summed = group, x.clone()
        distributed.all_reduce(summed, group=group)
        return summed

    @staticmethod
    def backward(ctx, g):
        return Summed.forward(ctx, g, ctx.group), None


def crossing(mesh):
    """One rank's blocks branch otherwise at the companion than at the state, the other one's do not."""
    torch.set_default_dtype(torch.float64)
    x, layers = torch.randn(ROWS, DIM), [TwoLayers() for _ in range(STEPS)]
    stack = ResidualStack([Crossing(layer, 0.0, mesh.get_group()) for layer in layers], step=1.0)
    with torch.no_grad():
        state = x + 0.1 * mesh.get_local_rank()
        start = state
        for block in stack:
            block.limit = float(state.abs().sum()) + 1e-9 if mesh.get_local_rank() else 0.0
            state = state + block(state)
    stored = trained(stack, start)
    stack.reverse, stack.anchors = "corrected", 1
    return relative_error(stored, trained(stack, start))


def test_ranks_that_branch_otherwise_do_not_wait_for_each_other(ranks):
    """The gradient is that of the branch at the companion; what it must not be is a hang."""
    assert all(map(math.isfinite, ranks.run(crossing)))


def fallen_back(mesh, on_drift):
    """A state of which one rank has a part that its steps can't rebuild, and the other one that they can."""
    torch.set_default_dtype(torch.float64)
    stack, x = ResidualStack([Perceptron() for _ in range(STEPS)], on_drift=on_drift), torch.randn(ROWS, LENGTH, DIM)
    x[:, LENGTH // 2 :] *= 0.02
    x.requires_grad_()
    exact = gradients(lambda: plain(list(stack), "euler", x), [*stack.parameters()])
    split_sequence(stack, mesh)
    part, found = part_of(x, mesh), []
    with warnings.catch_warnings(record=True):
        for _ in range(3):
            stack.zero_grad()
            half_square(stack(part)).backward()
            error = relative_error(whole([parameter.grad for parameter in stack.parameters()]), exact)
            defect = stack.drift.maximum.item() if stack.gradient == "adjoint" else 0.0
            found.append((error, stack.gradient, stack.reverse.bits, defect))
    return found


@pytest.mark.parametrize(("on_drift", "expected"), [("checkpoint", ("checkpoint", None)), ("store", ("adjoint", 8))])
def test_all_ranks_fall_back_together(ranks, on_drift, expected):
    of_ranks = ranks.run(fallen_back, on_drift)
    defects = sorted(found[0][3] for found in of_ranks)
    assert defects[0] < 0.05 < defects[1]
    for found in of_ranks:
        assert found[0][1:3] == ("adjoint", None)
        for error, *setting, _ in found[1:]:
            assert tuple(setting) == expected
            assert error < (TIGHT if on_drift == "checkpoint" else 0.01)
