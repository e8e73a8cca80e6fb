"""Buffers and parameters that blocks write, of every dtype and by every kernel: replayed, or refused."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional

from resode_cuda import ResidualStack
from resode_cuda.schemes import SCHEMES
from tests.support.exact import EXACT
from tests.support.networks import block_count, half_square, mlp, relative_error
from tests.support.stateful import assert_same_buffers, plain_twin, train_step

pytestmark = [
    pytest.mark.usefixtures("float64"),
    pytest.mark.parametrize("scheme", SCHEMES),
]

MODES = {
    "adjoint": {"reverse": EXACT},
    "extrapolated": {"reverse": "extrapolated", "anchors": 1},
    "checkpoint": {"gradient": "checkpoint"},
}
every_mode = pytest.mark.parametrize("mode", MODES)
STEPS = 4
INITIAL = {
    "bool": torch.tensor([True, False]),
    "int64": torch.tensor([1, 2]),
    "int8": torch.tensor([1, 2], dtype=torch.int8),
    "complex": torch.tensor([1 + 1j, 0.5]),
}
every_dtype = pytest.mark.parametrize("dtype", INITIAL)


class Reading(nn.Module):
    """Scales by cos of a buffer."""

    def __init__(self, initial):
        super().__init__()
        self.body = mlp()
        self.register_buffer("level", initial.clone())

    def forward(self, x):
        return self.body(x) * self.level.to(torch.complex128).abs().sum().cos()


class Writing(Reading):
    """Changes it first."""

    def forward(self, x):
        if self.level.dtype == torch.bool:
            self.level[0].logical_not_()
        else:
            self.level.add_(1)
        return super().forward(x)


def assert_like_the_plain_loop(blocks, scheme, mode, x, prepare=lambda module: None):
    """Two training steps: gradients and buffers. Returns the stack and the plain network."""
    stack, (twin, run) = ResidualStack(blocks, scheme, **MODES[mode]), plain_twin(blocks, scheme)
    for module in (stack, twin):
        prepare(module)
    for _ in range(2):
        exact = train_step(run, twin, x)
        got = train_step(stack, stack, x)
        assert relative_error(got, exact) < 1e-10
        assert_same_buffers(stack, twin)
    return stack, twin


@every_mode
@every_dtype
def test_a_buffer_that_a_block_writes_may_change_before_the_backward_pass(scheme, mode, dtype):
    blocks = [Writing(INITIAL[dtype]) for _ in range(block_count(scheme, STEPS))]
    stack, (twin, run) = ResidualStack(blocks, scheme, **MODES[mode]), plain_twin(blocks, scheme)
    x = torch.randn(5, 6)
    exact = train_step(run, twin, x)
    got = train_step(stack, stack, x, between=lambda: [block.level.zero_() for block in stack])
    assert relative_error(got, exact) < 1e-10
    assert not any(block.level.any() for block in stack)


@every_mode
@every_dtype
def test_a_buffer_that_a_block_only_reads_must_not_change_before_the_backward_pass(scheme, mode, dtype):
    blocks = [Reading(INITIAL[dtype]) for _ in range(block_count(scheme, STEPS))]
    stack, x = ResidualStack(blocks, scheme, **MODES[mode]), torch.randn(5, 6)
    with pytest.raises(RuntimeError, match="a block's buffers must not be modified, but 'level' of shape"):
        train_step(stack, stack, x, between=stack[1].level.zero_)


class Functional(nn.Module):
    """Normalises by the batch through torch's function, whatever its own mode; its statistics lie as `rows` says."""

    def __init__(self, rows):
        super().__init__()
        self.body, self.rows = mlp(), rows
        if rows:
            self.register_buffer("statistics", torch.stack([torch.zeros(6), torch.ones(6)]))
        else:
            self.register_buffer("mean", torch.zeros(6))
            self.register_buffer("variance", torch.ones(6))

    def forward(self, x):
        mean, variance = self.statistics if self.rows else (self.mean, self.variance)
        scale = (variance.clone() + mean.clone()).cos()
        return functional.batch_norm(self.body(x), mean, variance, training=True) * scale


class ItsOwnNorm(nn.BatchNorm1d):
    """A subclass that normalises by the batch in eval mode too."""

    def forward(self, x):
        scale = (self.running_var.clone() + 1).rsqrt()
        out = functional.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, training=True)
        return out * scale


@every_mode
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize(
    "build",
    [lambda: Functional(False), lambda: Functional(True), lambda: nn.Sequential(mlp(), ItsOwnNorm(6))],
    ids=["buffers", "rows of a buffer", "subclass"],
)
def test_statistics_that_kernels_write_unseen_are_updated_once(scheme, mode, build, training):
    blocks = [build() for _ in range(block_count(scheme, STEPS))]
    assert_like_the_plain_loop(blocks, scheme, mode, torch.randn(9, 6), lambda module: module.train(training))


class SharedMemory(Writing):
    """Writes one buffer and reads another that lies in the same memory."""

    def __init__(self, initial):
        super().__init__(initial)
        self.register_buffer("part", self.level[:1])

    def forward(self, x):
        self.part.add_(1)
        return Reading.forward(self, x)


class Registering(nn.Module):
    """Registers its buffer when it first runs."""

    def __init__(self):
        super().__init__()
        self.body = mlp()

    def forward(self, x):
        if not hasattr(self, "level"):
            self.register_buffer("level", torch.zeros(2))
        self.level.add_(1)
        return self.body(x) * self.level.sum().cos()


class NoBuffer(nn.Module):
    """Counts in a tensor that is no buffer."""

    def __init__(self):
        super().__init__()
        self.body, self.level = mlp(), torch.zeros(())

    def forward(self, x):
        self.level += 1
        return self.body(x) * self.level.cos()


def same(module, twin):
    return all(torch.equal(a.level, b.level) for a, b in zip(module.children(), twin.children(), strict=True))


@every_mode
@pytest.mark.parametrize("build", [lambda: SharedMemory(torch.zeros(3)), Registering, NoBuffer])
def test_tensors_that_share_memory_appear_late_or_are_attributes_are_replayed(scheme, mode, build):
    blocks = [build() for _ in range(block_count(scheme, STEPS))]
    assert same(*assert_like_the_plain_loop(blocks, scheme, mode, torch.randn(5, 6)))


class Constrained(nn.Module):
    """Rescales a weight of its own in its forward pass."""

    def __init__(self):
        super().__init__()
        self.body, self.weight = mlp(), nn.Parameter(torch.rand(6))

    def forward(self, x):
        with torch.no_grad():
            self.weight.mul_(0.9)
        return self.body(x) * self.weight


@every_mode
def test_a_parameter_that_its_block_writes_is_an_error_with_its_name(scheme, mode):
    blocks, x = [mlp() for _ in range(block_count(scheme, STEPS))], torch.randn(5, 6)
    blocks[2] = Constrained()
    stack = ResidualStack(blocks, scheme, **MODES[mode])
    before = copy.deepcopy(stack[2].weight)
    with pytest.raises(
        RuntimeError, match=r"block 2 must not write its parameters .*it wrote 'weight'; make it a buffer"
    ):
        half_square(stack(x)).backward()
    assert torch.equal(stack[2].weight, 0.9 * before)


@every_mode
def test_a_frozen_parameter_that_its_block_writes_is_an_error_too(scheme, mode):
    blocks, x = [Constrained() for _ in range(block_count(scheme, STEPS))], torch.randn(5, 6)
    for block in blocks:
        block.weight.requires_grad_(False)
    with pytest.raises(RuntimeError, match="block 0 must not write its parameters"):
        ResidualStack(blocks, scheme, **MODES[mode])(x)
