"""Stacks in the stages of torch's pipelines, on two ranks: several forward passes come before their backward passes."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.distributed.pipelining import (
    PipelineStage,
    Schedule1F1B,
    ScheduleGPipe,
    ScheduleInterleaved1F1B,
    ScheduleInterleavedZeroBubble,
    ScheduleZBVZeroBubble,
)

import resode_cuda
from resode_cuda import ResidualMLP, ResidualStack
from tests.support.exact import TIGHT
from tests.support.modes import MODES
from tests.support.networks import half_square, mlp, mlps, relative_error

DIM, ROWS, STEPS = 6, 12, 4

TRIED = "corrected", "exact", "anchors", "stored", "rounded", "checkpoint"
SCHEDULES = {"GPipe": ScheduleGPipe, "1F1B": Schedule1F1B, "interleaved 1F1B": ScheduleInterleaved1F1B}
SPLITTING = {"zero bubble": ScheduleInterleavedZeroBubble, "ZBV": ScheduleZBVZeroBubble}
"""Those that differentiate for states first, and for parameters later."""


class Part(nn.Module):
    """A stage: a stack after a layer of other parameters."""

    def __init__(self, scheme, **options):
        super().__init__()
        self.first, self.stack = nn.Linear(DIM, DIM), ResidualStack(mlps(scheme, STEPS), scheme, **options)

    def forward(self, x):
        return self.stack(self.first(x))


class Layer(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = mlp()

    def forward(self, x):
        return x + 0.25 * self.inner(x)


class Layers(nn.Module):
    """A stage: a loop over layers, converted."""

    def __init__(self, scheme, **options):
        super().__init__()
        self.layers = nn.ModuleList(Layer() for _ in range(STEPS))
        resode_cuda.convert(self, ["layers"], **options)

    def forward(self, x):
        for layer in self.layers:
            x = layer(x)
        return x


class Fused(nn.Module):
    """A stage: a residual MLP."""

    def __init__(self, scheme, **options):
        super().__init__()
        self.first = nn.Linear(DIM, DIM)
        self.mlp = ResidualMLP(DIM, DIM, STEPS, scheme, dtype=torch.float64, **options)

    def forward(self, x):
        return self.mlp(self.first(x))


def loss_of(out, target):
    return half_square(out - target)


def gradients_of(stages, x, target, microbatches):
    """Each stage's gradients without a pipeline, summed over the microbatches."""
    for rows, wanted in zip(x.chunk(microbatches), target.chunk(microbatches), strict=True):
        for stage in stages:
            rows = stage(rows)
        loss_of(rows, wanted).backward()
    found = [[parameter.grad for parameter in stage.parameters()] for stage in stages]
    for stage in stages:
        stage.zero_grad()
    return found


def piped(mesh, make, scheme, mode, schedule):
    """How far the gradients of this rank's stages are from their own without a pipeline."""
    torch.set_default_dtype(torch.float64)
    microbatches, rank = 4, mesh.get_local_rank()
    per_rank = 1 if schedule in (ScheduleGPipe, Schedule1F1B) else 2
    parts = [make(scheme, **MODES[mode]) for _ in range(per_rank * mesh.size())]
    x, target = torch.randn(ROWS, DIM), torch.randn(ROWS, DIM)
    own = gradients_of(parts, x, target, microbatches)
    is_v = schedule is ScheduleZBVZeroBubble
    mine = [rank, len(parts) - 1 - rank if is_v else rank + mesh.size()][:per_rank]
    is_last = len(parts) - 1 in mine
    stages = [PipelineStage(parts[n], n, len(parts), torch.device("cpu"), group=mesh.get_group()) for n in mine]
    run = schedule(
        stages[0] if per_rank == 1 else stages, n_microbatches=microbatches, loss_fn=loss_of, scale_grads=False
    )
    for _ in range(2):
        for part in parts:
            part.zero_grad()
        run.step(*[x] * (rank == 0), **({"target": target} if is_last else {}))
    found = [parameter.grad for n in mine for parameter in parts[n].parameters()]
    return relative_error(found, [g for n in mine for g in own[n]])


@pytest.mark.parametrize(("scheme", "mode"), [*[("euler", mode) for mode in TRIED], ("heun", "stored")])
@pytest.mark.parametrize("schedule", SCHEDULES.values(), ids=SCHEDULES)
def test_gradients_are_those_without_a_pipeline(ranks, scheme, mode, schedule):
    assert max(ranks.run(piped, Part, scheme, mode, schedule)) < TIGHT


@pytest.mark.parametrize("mode", ["corrected", "anchors", "stored", "rounded", "checkpoint"])
@pytest.mark.parametrize("schedule", SPLITTING.values(), ids=SPLITTING)
def test_schedules_that_split_the_backward_pass(ranks, mode, schedule):
    assert max(ranks.run(piped, Part, "euler", mode, schedule)) < TIGHT


@pytest.mark.parametrize(
    ("make", "mode"), [(Layers, "stored"), *[(Fused, mode) for mode in ("corrected", "stored", "checkpoint")]]
)
@pytest.mark.parametrize("schedule", [Schedule1F1B, ScheduleInterleavedZeroBubble])
def test_other_stages(ranks, make, mode, schedule):
    assert max(ranks.run(piped, make, "euler", mode, schedule)) < TIGHT
