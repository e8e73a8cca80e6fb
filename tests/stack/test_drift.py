"""Defects as a measure of the reconstruction, and the warning where it breaks down."""

import warnings

import pytest
import torch
from torch import nn

from resode_cuda import DriftLogger, ResidualStack, Reverse
from resode_cuda.adjoint.drift import DriftMonitor
from resode_cuda.schemes import SCHEMES
from tests.support.networks import block_count, half_square, mlp, mlps, plain, reference_blocks, reference_input
from tests.support.stateful import Outside


def states(blocks, scheme, x):
    """x_0 to x_N of the ordinary network."""
    found = [x]
    steps = len(blocks) - (scheme == "heun")
    for n in range(steps):
        found.append(plain(blocks[n : n + block_count(scheme, 1)], scheme, found[-1], h=1 / steps))
    return found


def errors_and_defects(monkeypatch, blocks, scheme, reverse, x):
    """For each step the true relative error of the point where the product with g was taken, and the defect."""
    points, vjp = [], SCHEMES[scheme].vjp

    def note(functions, y, *rest):
        points.insert(0, y.clone())
        return vjp(functions, y, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(SCHEMES[scheme], "vjp", staticmethod(note))
        stack = ResidualStack(blocks, scheme, reverse=reverse, on_drift="ignore")
        half_square(stack(x)).backward()
    exact = states(blocks, scheme, x)[:-1]
    errors = [((y - state).norm() / state.norm()).item() for y, state in zip(points, exact, strict=True)]
    return errors, stack.drift.defects.tolist()


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("reverse", ["corrected", "extrapolated"])
def test_defects_measure_the_error_of_the_point_where_the_vjp_is_taken(float64, monkeypatch, scheme, reverse):
    blocks, x = reference_blocks(block_count(scheme, 32), "smooth"), reference_input()
    errors, defects = errors_and_defects(monkeypatch, blocks, scheme, reverse, x)
    # The two steps that extrapolation starts from are exact to rounding, defect and error alike.
    for truth, defect in list(zip(errors, defects, strict=True))[:30]:
        assert truth / 3 < defect < 3 * truth


@pytest.mark.filterwarnings("ignore:ResidualStack. block . changed its increment")  # weights doubled, errors built up
@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("reverse", ["corrected", "extrapolated"])
@pytest.mark.parametrize("weights", ["smooth", "independent"])
@pytest.mark.parametrize("scale", [1, 2])
def test_the_largest_defect_is_near_the_largest_error(float64, monkeypatch, scheme, reverse, weights, scale):
    """Within a factor 3, except where doubled smooth weights let errors build up, which a defect does not see."""
    limit = 9 if (weights, scale) == ("smooth", 2) else 3
    for steps in (16, 64, 256):
        blocks = reference_blocks(block_count(scheme, steps), weights)
        for block in blocks:
            for parameter in block.parameters():
                parameter.data *= scale
        errors, defects = errors_and_defects(monkeypatch, blocks, scheme, reverse, reference_input())
        assert max(defects) / 3 < max(errors) < limit * max(defects)


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
    assert stack.drift.defects.isnan().all()  # no reuse, no defect


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
def test_drift_is_kept_in_float64(dtype):
    stack = ResidualStack(nn.ModuleList(mlps("euler", 4)).to(dtype))
    half_square(stack(torch.randn(3, 6).to(dtype))).backward()
    assert stack.drift.defects.dtype == torch.float64


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("layout", [lambda x: x, lambda x: x.mT], ids=["contiguous", "transposed"])
@pytest.mark.parametrize("reverse", ["paper", "corrected", "extrapolated", Reverse("step", 2)], ids=str)
@pytest.mark.parametrize("exponent", [-100, -70, 66, 100])
def test_defects_of_states_of_any_size(scheme, reverse, exponent, layout):
    """Blocks that are homogeneous to the last bit have the same at every size."""

    def build():
        return nn.Sequential(nn.Linear(6, 10, bias=False), nn.ReLU(), nn.Linear(10, 6, bias=False))

    blocks = [build() for _ in range(block_count(scheme, 4))]
    stack = ResidualStack(blocks, scheme, reverse=reverse, keep_input=True)
    x, seen = layout(torch.randn(6, 6)), []
    for size in (1.0, 2.0**exponent):
        stack(size * x.detach().requires_grad_()).backward(torch.ones(6, 6))
        seen.append([stack.drift.reconstruction, *stack.drift.defects])
    assert 0 < seen[0][0] < 0.1
    torch.testing.assert_close(seen[1], seen[0], rtol=1e-6, atol=0, equal_nan=True)


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
        self.body, self.outside, self.bad = mlp(), Outside(calls=0), bad

    def forward(self, x):
        self.outside.calls += 1
        return self.body(x) * (self.bad if self.outside.calls > 1 else 1.0)


@pytest.mark.parametrize("bad", [float("inf"), float("nan")])
@pytest.mark.parametrize("reverse", ["paper", "corrected", "extrapolated", Reverse("step", corrections=2)])
def test_a_reconstruction_that_is_not_finite_warns_once_with_the_step(bad, reverse):
    blocks = mlps("euler", 6)
    blocks[3] = Overflowing(bad)
    stack, x = ResidualStack(blocks, reverse=reverse), torch.randn(3, 6)
    with pytest.warns(RuntimeWarning, match='reconstruction of step 3 met NaN, Inf.*use gradient="checkpoint"'):
        half_square(stack(x)).backward()
    blocks[3].outside.calls = 0
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


def test_copies_of_squares_are_read_when_they_have_arrived():
    """The asynchronous path, with a device whose copies take two looks to arrive."""

    class Event:
        looks = 0

        def query(self):
            self.looks += 1
            return self.looks > 2

        def synchronize(self):
            assert self.looks > 2

    monitor = DriftMonitor("ResidualStack", 3)
    squares = torch.ones(4, 2)
    squares[1, 0] = torch.nan
    monitor._arriving.append((lambda: monitor._judge(None, squares), Event()))
    monitor.poll()
    monitor.poll()
    with pytest.warns(RuntimeWarning, match="step 1"):
        monitor.poll()
    assert not monitor._arriving


@pytest.mark.gpu
@pytest.mark.filterwarnings("ignore:Synchronization debug mode is a prototype")
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


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("anchors", [None, 5, {20}, {3, 20}])
@pytest.mark.parametrize("reverse", ["paper", "corrected", "extrapolated"])
def test_a_kept_input_gives_the_true_error_of_the_reconstruction(float64, scheme, anchors, reverse):
    blocks, x = reference_blocks(block_count(scheme, 32), "smooth"), reference_input()
    stack = ResidualStack(blocks, scheme, reverse=reverse, anchors=anchors, keep_input=True)
    half_square(stack(x)).backward()
    got = stack.drift.reconstruction.item()
    if anchors is None:
        rebuilt = stack.invert(stack(x))
        if reverse != "extrapolated":  # which inverts without the increments of the forward pass
            assert got == pytest.approx(((rebuilt - x).norm() / x.norm()).item(), rel=1e-6)
        assert 0 < got < 0.1
    else:
        stack.anchors = None
        half_square(stack(x)).backward()
        assert 0 < got < stack.drift.reconstruction.item()
    stack.keep_input = False
    half_square(stack(x)).backward()
    assert stack.drift.reconstruction is None


def test_the_input_is_out_of_reach_of_a_backward_pass_that_ends_before_it():
    stack = ResidualStack(mlps("euler", 4), keep_input=True)
    for parameter in stack[0].parameters():
        parameter.requires_grad_(False)
    half_square(stack(torch.randn(3, 6))).backward()
    assert stack.drift.reconstruction is None


def test_the_logger_writes_every_defect():
    stack, written = ResidualStack(mlps("euler", 4), keep_input=True), []
    log = DriftLogger(stack, lambda *arguments: written.append(arguments), every=2, tag="net")
    log(0)
    assert written == []  # nothing measured yet
    half_square(stack(torch.randn(3, 6))).backward()
    log(1)
    assert written == []
    log(2)
    names = [name for name, _, _ in written]
    assert names == ["net/maximum", "net/reconstruction", *(f"net/defect/{n}" for n in range(4))]
    assert [value for _, value, _ in written[2:]] == stack.drift.defects.tolist()
    assert {step for _, _, step in written} == {2}
    with pytest.raises(ValueError, match="DriftLogger: every must be >= 1, got 0"):
        DriftLogger(stack, print, every=0)


@pytest.mark.parametrize(
    "x", [torch.cat([torch.randn(4, 6), 1e6 * torch.randn(4, 6)], 1)[:, :6], torch.randn(6).expand(400, 6)]
)
def test_the_kept_input_may_have_any_strides(x):
    blocks = mlps("euler", 6)
    dense, strided = (ResidualStack(blocks, keep_input=True) for _ in range(2))
    half_square(dense(x.contiguous())).backward()
    half_square(strided(x)).backward()
    torch.testing.assert_close(strided.drift.reconstruction, dense.drift.reconstruction)
