"""A block that is another function in the backward pass is told of, and one that runs again as it ran is not.

Two numbers miss a change of 90% about once in a hundred; the seed below is one with which they don't.
"""

import math

import numpy as np
import pytest
import torch
from torch import nn

from resode_cuda import DriftError, ResidualStack, Reverse
from resode_cuda.schemes import SCHEMES
from tests.support.networks import DIM, block_count, half_square, mlp, mlps, reference_blocks, reference_input
from tests.support.stateful import Outside

STEPS, FAULTY = 12, 5

schemes = pytest.mark.parametrize("scheme", SCHEMES)
SOLVERS = {
    "paper": {"reverse": "paper"},
    "corrected": {"reverse": "corrected"},
    "extrapolated": {"reverse": "extrapolated"},
    "two corrections": {"reverse": Reverse("step", corrections=2)},
    "some anchors": {"anchors": 3},
    "all anchors": {"anchors": 1},
}
solvers = pytest.mark.parametrize("solver", SOLVERS)


class Faulty(nn.Module):
    """A block with something outside of it that it depends on, and that `happen` changes."""

    def __init__(self, body):
        super().__init__()
        self.body, self.outside = body, Outside(is_changed=False, calls=0)

    def happen(self):
        self.outside.is_changed = True


class Adapted(Faulty):
    """Another adapter is switched on."""

    def __init__(self, body):
        super().__init__(body)
        self.adapters = nn.ModuleList([mlp(DIM, scale=2), mlp(DIM, scale=2)])

    def forward(self, x):
        return self.body(x) + self.adapters[self.outside.is_changed](x)


class InContext(Faulty):
    """A context that the block reads is cleared."""

    def __init__(self, body):
        super().__init__(body)
        self.outside.context = 2 * torch.randn(DIM)

    def forward(self, x):
        return self.body(x + self.outside.context)

    def happen(self):
        self.outside.context = torch.zeros(DIM)


class Counting(Faulty):
    """A counter hidden in a Python object."""

    def forward(self, x):
        self.outside.calls += 1
        return self.body(x) * math.cos(self.outside.calls)


class Flipping(Faulty):
    """A sign, which the size of the increment does not show."""

    def forward(self, x):
        return -self.body(x) if self.outside.is_changed else self.body(x)


class Drawing(Faulty):
    """Random numbers of a generator of the block's own."""

    def __init__(self, body):
        super().__init__(body)
        self.outside.generator = torch.Generator().manual_seed(0)

    def forward(self, x):
        return self.body(x) * torch.randn(x.shape, generator=self.outside.generator)


class DrawingFromNumPy(Faulty):
    """The same, of NumPy."""

    def __init__(self, body):
        super().__init__(body)
        self.outside.generator = np.random.default_rng(3)

    def forward(self, x):
        return self.body(x) * torch.from_numpy(self.outside.generator.standard_normal(x.shape))


class Overwritten(Faulty):
    """A buffer, written through `.data`, which counts no version."""

    def __init__(self, body):
        super().__init__(body)
        self.register_buffer("scale", torch.ones(1))

    def forward(self, x):
        return self.body(x) * self.scale

    def happen(self):
        self.scale.data.mul_(-3)


class Cached(Faulty):
    """A cache of an unknown class among the arguments, which grows with every call."""

    def forward(self, x, cache):
        cache.entries.append(self.body(x).detach())
        return torch.stack(cache.entries).mean(dim=0) * self.body(x)


FAULTS = [Adapted, InContext, Counting, Flipping, Drawing, DrawingFromNumPy, Overwritten]


def network(fault, scheme, **options):
    """A stack with one faulty block, whose number is `FAULTY`."""
    torch.manual_seed(1)
    blocks = reference_blocks(block_count(scheme, STEPS), "smooth")
    blocks[FAULTY] = fault(blocks[FAULTY])
    return ResidualStack(blocks, scheme, step=0.005, **options)


def faulty_step(stack, x):
    loss = half_square(stack(x))
    stack[FAULTY].happen()
    loss.backward()


@pytest.fixture
def x(float64):
    torch.manual_seed(1)
    return torch.randn(5, DIM)


@schemes
@solvers
@pytest.mark.parametrize("fault", FAULTS)
def test_a_block_that_became_another_function_is_warned_of_by_its_number(x, scheme, solver, fault):
    stack = network(fault, scheme, **SOLVERS[solver])
    steps_of_it = {"euler": "block 5", "heun": "blocks (4 to 5|5 to 6)"}[scheme]
    with pytest.warns(RuntimeWarning, match=f"ResidualStack: {steps_of_it} changed its increment by .*usual causes"):
        faulty_step(stack, x)
    drift = stack.drift
    assert not drift.replayed
    assert drift.changes.argmax() in {"euler": [FAULTY], "heun": [FAULTY - 1, FAULTY]}[scheme]
    assert drift.changes.max() > 0.1
    assert drift.changes[FAULTY + 1 :].max() < 0.1


@schemes
@pytest.mark.parametrize("fault", FAULTS)
def test_on_drift_decides_what_a_change_leads_to(x, scheme, fault):
    with pytest.raises(DriftError, match="changed its increment by"):
        faulty_step(network(fault, scheme, on_drift="raise"), x)
    faulty_step(network(fault, scheme, on_drift="ignore"), x)
    stack = network(fault, scheme, on_drift="checkpoint")
    with pytest.warns(RuntimeWarning, match='changed its increment by .*gradient="checkpoint" from the next step on'):
        faulty_step(stack, x)
    stack(x)
    assert stack.gradient == "checkpoint"


@schemes
@pytest.mark.parametrize("fault", FAULTS)
def test_checkpointing_compares_one_step_in_each_pass_and_raises(x, scheme, fault):
    def passes():
        for turn in range(STEPS):
            stack = network(fault, scheme, gradient="checkpoint")
            for _ in range(turn):
                stack(x)
            faulty_step(stack, x)

    with pytest.raises(DriftError, match=r"ResidualStack: block [45] changed its increment by .*at the same state"):
        passes()


@schemes
@pytest.mark.parametrize("gradient", ["adjoint", "checkpoint"])
def test_a_cache_that_grows_in_the_backward_pass_is_an_error_where_that_is_asked_for(x, scheme, gradient):
    blocks = [Cached(mlp(DIM)) for _ in range(block_count(scheme, 4))]
    stack = ResidualStack(blocks, scheme, gradient=gradient, on_drift="raise")
    with pytest.raises(DriftError, match="changed its increment"):
        half_square(stack(x, Outside(entries=[]))).backward()


@solvers
def test_a_warning_comes_once_for_each_stack(x, solver):
    stack = network(Flipping, "euler", **SOLVERS[solver])

    def passes():
        for _ in range(3):
            stack[FAULTY].outside.is_changed = False
            faulty_step(stack, x)

    with pytest.warns(RuntimeWarning, match="block 5 changed its increment") as seen:
        passes()
    assert len(seen) == 1


def normed():
    return nn.Sequential(nn.LayerNorm(6), nn.Linear(6, 12), nn.GELU(), nn.Dropout(0.3), nn.Linear(12, 6))


def convolution():
    return nn.Sequential(nn.Conv1d(4, 8, 3, padding=1), nn.BatchNorm1d(8), nn.ReLU(), nn.Conv1d(8, 4, 1))


def attention():
    return nn.TransformerEncoderLayer(6, 2, 12, dropout=0.2, batch_first=True, norm_first=True)


HEALTHY = {"mlp": mlp, "normed": normed, "convolution": convolution, "attention": attention}


@schemes
@solvers
@pytest.mark.parametrize("kind", HEALTHY)
def test_trained_blocks_that_run_again_as_they_ran_are_not_told_of(scheme, solver, kind):
    blocks = [HEALTHY[kind]() for _ in range(block_count(scheme, 12))]
    stack, x, target = ResidualStack(blocks, scheme, **SOLVERS[solver]), *torch.randn(2, 8, 4, 6)
    optimizer = torch.optim.Adam(stack.parameters(), 3e-3)
    for _ in range(4):
        optimizer.zero_grad()
        (stack(x) - target).square().mean().backward()
        optimizer.step()
        drift = stack.drift
        assert drift.replayed
        assert drift.changes.max() < 0.3
    assert drift.changes.max() < 1e-6 or solver != "all anchors"


@schemes
@pytest.mark.parametrize("kind", HEALTHY)
def test_healthy_blocks_that_are_recomputed_are_not_told_of(scheme, kind):
    stack = ResidualStack([HEALTHY[kind]() for _ in range(block_count(scheme, 3))], scheme, gradient="checkpoint")
    for _ in range(3):
        half_square(stack(torch.randn(8, 4, 6))).backward()


@schemes
@pytest.mark.parametrize("reverse", ["corrected", "extrapolated"])
def test_increments_of_smooth_networks_hardly_change(float64, scheme, reverse):
    stack = ResidualStack(reference_blocks(block_count(scheme, 64), "smooth"), scheme, reverse=reverse)
    half_square(stack(reference_input())).backward()
    assert 0 < stack.drift.changes.mean() < 4e-4


def test_steps_that_do_not_run_again_have_no_change(x):
    stack = ResidualStack(mlps("euler", 6, dim=DIM))
    for block in list(stack)[:3]:
        block.requires_grad_(False)
    half_square(stack(x)).backward()
    assert stack.drift.changes.isnan().tolist() == [True] * 3 + [False] * 3
    assert stack.drift.replayed
