"""Defects as a measure of the reconstruction, and the warning where it breaks down."""

import warnings

import pytest
import torch
from networks import block_count, half_square, mlp, mlps, plain, reference_blocks, reference_input
from torch import nn

from resode_cuda import ResidualStack, Reverse
from resode_cuda.drift import DriftMonitor
from resode_cuda.schemes import SCHEMES


def states(blocks, scheme, x):
    """x_0 to x_N of the ordinary network."""
    found = [x]
    steps = len(blocks) - (scheme == "heun")
    for n in range(steps):
        found.append(plain(blocks[n : n + block_count(scheme, 1)], scheme, found[-1], h=1 / steps))
    return found


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("reverse", ["corrected", "extrapolated"])
def test_defects_measure_the_error_of_the_point_where_the_vjp_is_taken(float64, monkeypatch, scheme, reverse):
    blocks, x = reference_blocks(block_count(scheme, 32), "smooth"), reference_input()
    points, record = {}, DriftMonitor.record

    def note(monitor, n, y, x):
        points[n] = y.clone()
        record(monitor, n, y, x)

    monkeypatch.setattr(DriftMonitor, "record", note)
    stack = ResidualStack(blocks, scheme, reverse=reverse)
    half_square(stack(x)).backward()
    exact = states(blocks, scheme, x)
    # The two steps that extrapolation starts from are exact to rounding, defect and error alike.
    for n in range(30):
        truth = ((points[n] - exact[n]).norm() / exact[n].norm()).item()
        assert truth / 3 < stack.drift.defects[n] < 3 * truth


def test_drift_is_that_of_the_last_backward_pass():
    stack, x = ResidualStack(mlps("euler", 6)), torch.randn(3, 6)
    assert stack.drift is None
    out = stack(x)
    assert stack.drift is None
    half_square(out).backward()
    first = stack.drift
    assert first.defects.shape == (6,)
    assert first.defects.min() > 0
    assert first.maximum == first.defects.max()
    half_square(stack(10 * x)).backward()
    assert not torch.equal(first.defects, stack.drift.defects)
    stack.reverse = "paper"
    half_square(stack(x)).backward()
    assert stack.drift is None  # no reuse, no defect


def test_steps_that_start_from_an_anchor_have_no_defect():
    stack = ResidualStack(mlps("euler", 6), anchors=2)
    half_square(stack(torch.randn(3, 6))).backward()
    assert (stack.drift.defects[::2] == 0).all()
    assert (stack.drift.defects[1::2] > 0).all()


def test_steps_that_need_no_rebuilding_have_no_defect():
    stack = ResidualStack(mlps("euler", 6))
    for block in list(stack)[:3]:
        block.requires_grad_(False)
    half_square(stack(torch.randn(3, 6))).backward()
    assert (stack.drift.defects[:3] == 0).all()
    assert (stack.drift.defects[3:] > 0).all()


def test_a_state_of_zeros_has_no_defect():
    stack = ResidualStack([nn.Linear(4, 4, bias=False) for _ in range(3)])
    stack(torch.zeros(2, 4)).sum().backward()
    assert stack.drift.maximum == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_drift_is_kept_in_at_least_float32(dtype):
    stack = ResidualStack(nn.ModuleList(mlps("euler", 4)).to(dtype))
    half_square(stack(torch.randn(3, 6).to(dtype))).backward()
    assert stack.drift.defects.dtype == torch.promote_types(dtype, torch.float32)


def test_drift_is_no_buffer_and_survives_a_change_of_dtype():
    stack = ResidualStack(mlps("euler", 4))
    half_square(stack(torch.randn(3, 6))).backward()
    assert not list(stack.buffers())
    half_square(stack.double()(torch.randn(3, 6).double())).backward()
    assert stack.drift.defects.dtype == torch.float64


class Overflowing(nn.Module):
    """Fine on the forward pass, not finite where the reconstruction asks a second time."""

    def __init__(self, bad):
        super().__init__()
        self.body, self.calls, self.bad = mlp(), 0, bad

    def forward(self, x):
        self.calls += 1
        return self.body(x) * (self.bad if self.calls > 1 else 1.0)


@pytest.mark.parametrize("bad", [float("inf"), float("nan")])
@pytest.mark.parametrize("reverse", ["paper", "corrected", "extrapolated", Reverse("step", corrections=2)])
def test_a_reconstruction_that_is_not_finite_warns_once_with_the_step(bad, reverse):
    blocks = mlps("euler", 6)
    blocks[3] = Overflowing(bad)
    stack, x = ResidualStack(blocks, reverse=reverse), torch.randn(3, 6)
    with pytest.warns(RuntimeWarning, match='reconstruction of step 3 met NaN or Inf.*use gradient="checkpoint"'):
        half_square(stack(x)).backward()
    blocks[3].calls = 0
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        half_square(stack(x)).backward()


def test_a_backward_pass_that_stops_early_is_looked_at_by_the_next_forward_pass():
    blocks = mlps("euler", 6)
    blocks[4] = Overflowing(float("nan"))
    stack, x = ResidualStack(blocks), torch.randn(3, 6)
    torch.autograd.grad(half_square(stack(x)), list(blocks[2].parameters()))
    with pytest.warns(RuntimeWarning, match="reconstruction of step 4"):
        stack(x)


def test_copies_of_norms_are_read_when_they_have_arrived():
    """The asynchronous path, with a device whose copies take two looks to arrive."""

    class Event:
        looks = 0

        def query(self):
            self.looks += 1
            return self.looks > 2

        def synchronize(self):
            assert self.looks > 2

    monitor = DriftMonitor(3)
    norms = torch.ones(2, 4)
    norms[0, 1] = torch.nan
    monitor._arriving.append((norms, Event()))
    monitor.look()
    monitor.look()
    with pytest.warns(RuntimeWarning, match="step 1"):
        monitor.look()
    assert not monitor._arriving


@pytest.mark.gpu
def test_on_a_gpu_nothing_waits_for_the_device():
    stack = ResidualStack(mlps("euler", 6), reverse="corrected").cuda()
    x = torch.randn(3, 6, device="cuda")
    half_square(stack(x)).backward()
    torch.cuda.set_sync_debug_mode("error")
    try:
        half_square(stack(x)).backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    torch.cuda.synchronize()
    assert stack.drift.defects.is_cuda
    assert 0 < stack.drift.maximum.item() < 1


@pytest.mark.gpu
def test_on_a_gpu_a_broken_reconstruction_warns_at_the_next_forward_pass():
    blocks = mlps("euler", 6)
    blocks[3] = Overflowing(float("nan"))
    stack, x = ResidualStack(blocks).cuda(), torch.randn(3, 6, device="cuda")
    half_square(stack(x)).backward()
    torch.cuda.synchronize()
    with pytest.warns(RuntimeWarning, match="step 3"):
        stack(x)
