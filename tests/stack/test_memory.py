"""Activation memory, from the allocator's own events, and what is left when a training step is over."""

import gc
import weakref

import pytest
import torch
from torch import nn

from resode_cuda import ResidualStack, Reverse
from resode_cuda.schemes import SCHEMES
from tests.support.memory import allocations, held, peak
from tests.support.networks import block_count, half_square, mlp, mlps
from tests.support.stateful import Outside

ROWS, DIM = 512, 64
STATE = ROWS * DIM * 4
PER_STEP = 2 * 8
"""Bytes of the two numbers by which a re-evaluation is compared."""


class Conv(nn.Module):
    """Convolution, batch norm, ReLU, on states of [rows, DIM] seen as images of 4 channels."""

    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU())

    def forward(self, x):
        return self.body(x.unflatten(1, (4, 4, 4))).flatten(1)


class Shifted(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = mlp(DIM, 8)

    def forward(self, x, shift):
        return self.body(x) + shift


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("reverse", ["paper", "corrected", "extrapolated", Reverse("step", corrections=2)])
@pytest.mark.parametrize("block", [lambda: mlp(DIM, 8), Conv], ids=["mlp", "conv-bn"])
def test_bytes_held_do_not_depend_on_depth(scheme, reverse, block):
    x = torch.randn(ROWS, DIM)
    shallow, deep = (
        held(ResidualStack([block() for _ in range(block_count(scheme, n))], scheme, reverse=reverse), x)
        for n in (8, 512)
    )
    assert deep - shallow == (512 - 8) * PER_STEP
    assert shallow == pytest.approx((3 if reverse == "extrapolated" else 1) * STATE, rel=0.01)


def test_bytes_held_with_arguments_do_not_depend_on_depth():
    x, shift = torch.randn(ROWS, DIM), torch.randn(ROWS, DIM, requires_grad=True)
    sizes = []
    for n in (8, 64):
        stack = ResidualStack([Shifted() for _ in range(n)])
        stack(x, shift)
        sizes.append(sum(allocations(lambda stack=stack: stack(x, shift))))
    assert sizes[1] - sizes[0] == (64 - 8) * PER_STEP


def test_bytes_held_by_backprop_grow_with_depth():
    x = torch.randn(ROWS, DIM)
    shallow, deep = (held(ResidualStack(mlps("euler", n, dim=DIM, hidden=8), gradient="backprop"), x) for n in (8, 64))
    assert deep == pytest.approx(8 * shallow, rel=0.1)


def test_anchors_hold_one_state_each():
    x, sizes = torch.randn(ROWS, DIM), []
    for anchors in (None, 16, 4, {0, 1, 40}, {63}):
        sizes.append(held(ResidualStack(mlps("euler", 64, dim=DIM, hidden=8), anchors=anchors), x) / STATE)
    # x_0 is an anchor too, but the caller holds it anyway.
    assert sizes == pytest.approx([1, 1 + 3, 1 + 15, 1 + 2, 1 + 1], rel=0.01)


def test_dropout_holds_its_random_state_alone():
    x = torch.randn(ROWS, DIM)
    shallow, deep = (
        held(ResidualStack([nn.Sequential(mlp(DIM, 8), nn.Dropout()) for _ in range(n)]), x) for n in (8, 64)
    )
    assert (deep - shallow) / 56 < 6000


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("reverse", ["paper", "corrected", "extrapolated", Reverse("extrapolate", corrections=1)])
def test_the_peak_of_a_step_does_not_depend_on_depth(scheme, reverse):
    x = torch.randn(ROWS, DIM)
    peaks = [
        peak(ResidualStack(mlps(scheme, n, dim=DIM, hidden=DIM), scheme, reverse=reverse), x) / STATE for n in (16, 64)
    ]
    assert peaks[1] == pytest.approx(peaks[0], rel=0.01)
    assert peaks[1] < (12 if scheme == "euler" else 16)


@pytest.mark.filterwarnings("ignore:ResidualStack. block . changed its increment")  # norms of a few rows are steep
def test_300_training_steps_leave_memory_where_it_was():
    stack = ResidualStack([nn.Sequential(mlp(), nn.Dropout(), nn.BatchNorm1d(6)) for _ in range(4)], anchors=2)
    optimizer, x = torch.optim.SGD(stack.parameters(), lr=0.01), torch.randn(8, 6)

    def train(steps):
        for _ in range(steps):
            optimizer.zero_grad()
            half_square(stack(x)).backward()
            optimizer.step()
            assert stack.drift.maximum >= 0
        optimizer.zero_grad()

    def objects():
        gc.collect()
        return len(gc.get_objects())

    train(20)
    before = objects()
    gc.disable()  # tensors that only the cycle collector frees would be held for an unknown time
    try:
        changes = allocations(lambda: train(280))
    finally:
        gc.enable()
    assert sum(changes) == 0
    assert objects() - before < 280


class Breaking(nn.Module):
    """Raises at its n-th call, and notes what it saw with weak references."""

    def __init__(self, calls, seen):
        super().__init__()
        self.body, self.outside = mlp(), Outside(calls=calls, seen=seen)

    def forward(self, x):
        self.outside.seen.append(weakref.ref(x))
        self.outside.calls -= 1
        if self.outside.calls < 0:
            raise ValueError("broken")
        return self.body(x)


@pytest.mark.parametrize(
    ("reverse", "calls"),
    [("corrected", 0), ("corrected", 1), ("corrected", 2), ("extrapolated", 0), ("extrapolated", 1)],
)
def test_an_exception_leaves_nothing_behind(reverse, calls):
    seen = []
    stack = ResidualStack([mlp(), Breaking(calls, seen), mlp()], reverse=reverse)

    def train():
        x = torch.randn(4, 6, requires_grad=True)
        out = stack(x)
        seen.extend((weakref.ref(x), weakref.ref(out)))
        half_square(out).backward()

    with pytest.raises(ValueError, match="broken") as raised:
        train()
    del raised
    gc.collect()
    assert seen
    assert not any(reference() is not None for reference in seen)
    stack[1].outside.calls = 100
    train()


@pytest.mark.parametrize("corrections", [2, 4])
@pytest.mark.parametrize("predictor", ["step", "extrapolate"])
def test_acceleration_takes_two_states_at_most(predictor, corrections):
    x = torch.randn(ROWS, DIM)
    plain, accelerated = (
        peak(
            ResidualStack(mlps("euler", 8, dim=DIM, hidden=8), reverse=Reverse(predictor, corrections, accelerate=a)), x
        )
        for a in (False, True)
    )
    assert accelerated <= plain + 2.1 * STATE
