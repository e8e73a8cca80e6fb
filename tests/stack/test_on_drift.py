"""What a large defect leads to: `max_drift` and `on_drift`."""

import warnings

import pytest
import torch
from torch import nn

from resode_cuda import DriftError, ResidualStack
from tests.support.networks import half_square, mlps


def diverging(**options):
    """A stack of ordinary ResNet steps whose weights are four times too large, with batch norm and dropout."""
    blocks = []
    for _ in range(6):
        first, last = nn.Linear(6, 12), nn.Linear(12, 6)
        with torch.no_grad():
            for parameter in (*first.parameters(), *last.parameters()):
                parameter.mul_(4)
        blocks.append(nn.Sequential(first, nn.BatchNorm1d(12), nn.Tanh(), nn.Dropout(0.2), last))
    return ResidualStack(blocks, step=1.0, **{"reverse": "corrected", **options})


def trained(stack, steps, on_step=lambda n: None):
    """Gradients, statistics and random numbers of each training step, from the same start."""
    torch.manual_seed(3)
    optimizer, found = torch.optim.SGD(stack.parameters(), 1e-4), []
    for n in range(steps):
        x = torch.randn(9, 6)
        optimizer.zero_grad()
        stack(x).square().mean().backward()
        on_step(n)
        statistics = [buffer.clone() for buffer in stack.buffers()]
        found.append(([p.grad.clone() for p in stack.parameters()], statistics, torch.get_rng_state()))
        optimizer.step()
    return found


def test_checkpoint_on_drift_is_exact_from_the_second_step_on():
    stack = diverging(on_drift="checkpoint")
    exact = diverging(gradient="backprop")
    exact.load_state_dict(stack.state_dict())
    copies = []
    with pytest.warns(RuntimeWarning, match='got .*use more corrections.*gradient="checkpoint" from the next step on'):
        got = trained(stack, 4, lambda n: copies.append([p.detach().clone() for p in stack.parameters()]))
    assert stack.gradient == "checkpoint"
    # The first gradient was wrong, so both nets are compared from the weights that each step had.
    torch.manual_seed(3)
    for n, (gradients, statistics, rng) in enumerate(got):
        with torch.no_grad():
            for parameter, value in zip(exact.parameters(), copies[n], strict=True):
                parameter.copy_(value)
        exact.zero_grad()
        exact(torch.randn(9, 6)).square().mean().backward()
        error = sum((a - p.grad).square().sum() for a, p in zip(gradients, exact.parameters(), strict=True)).sqrt()
        error = error / sum(p.grad.square().sum() for p in exact.parameters()).sqrt()
        assert (error > 1e-2) if n == 0 else (error < 1e-6)
        assert torch.equal(rng, torch.get_rng_state())
        for a, b in zip(statistics, exact.buffers(), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)


def test_raise_on_drift_comes_before_a_second_bad_gradient_is_used():
    stack = diverging(on_drift="raise")
    used = []
    with pytest.raises(DriftError, match=r"the defect of step \d must be at most max_drift=0.05, got .*calibrate"):
        trained(stack, 3, used.append)
    assert len(used) < 2
    stack.gradient = "checkpoint"
    assert len(trained(stack, 2)) == 2  # nothing is left behind


def test_warn_on_drift_warns_once_with_the_step_and_the_defect():
    stack = diverging()
    with pytest.warns(RuntimeWarning, match=r"the defect of step \d must be at most") as seen:
        trained(stack, 3)
    assert len(seen) == 1
    assert stack.gradient == "adjoint"


def test_a_warning_of_drift_does_not_hide_one_of_nan():
    stack = diverging()
    with pytest.warns(RuntimeWarning, match="the defect of step"):
        trained(stack, 2)
    with torch.no_grad():
        stack[2][0].weight.fill_(torch.inf)
    with pytest.warns(RuntimeWarning, match="met NaN, Inf"):
        trained(stack, 1)


def test_ignored_drift_and_small_drift_say_nothing():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        trained(diverging(on_drift="ignore"), 2)
        trained(diverging(max_drift=1e9), 2)
        trained(ResidualStack(mlps("euler", 20), on_drift="raise"), 2)


def test_setting_the_gradient_again_ends_the_exact_steps():
    stack = diverging(on_drift="checkpoint")
    with pytest.warns(RuntimeWarning):
        trained(stack, 1)
    stack.gradient = "adjoint"
    stack(torch.randn(9, 6))
    assert stack.gradient == "adjoint"


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"max_drift": 0}, ValueError, 'max_drift must be > 0, got 0; use on_drift="ignore"'),
        ({"max_drift": float("nan")}, ValueError, "max_drift must be > 0, got nan"),
        ({"max_drift": "small"}, TypeError, "max_drift must be a number, got 'small'"),
        ({"on_drift": "stop"}, ValueError, "on_drift must be one of .*'checkpoint'.*got 'stop'"),
    ],
)
def test_bad_limits_are_refused(options, error, message):
    with pytest.raises(error, match=message):
        ResidualStack(mlps("euler", 3), **options)


@pytest.mark.gpu
@pytest.mark.parametrize("on_drift", ["raise", "checkpoint"])
def test_on_a_gpu_the_next_forward_pass_knows(on_drift):
    stack, x = diverging(on_drift=on_drift).cuda(), torch.randn(9, 6, device="cuda")
    stack(x).square().mean().backward()
    if on_drift == "raise":
        with pytest.raises(DriftError):
            stack(x)
    else:
        with pytest.warns(RuntimeWarning, match="from the next step on"):
            stack(x)
        assert stack.gradient == "checkpoint"


def test_leaving_the_adjoint_is_told_each_time_and_ends_the_last_drift():
    stack, x = ResidualStack(mlps("euler", 6), max_drift=1e-9), torch.randn(3, 6)
    with pytest.warns(RuntimeWarning, match="max_drift=1e-09"):
        half_square(stack(x)).backward()
    stack.on_drift = "checkpoint"
    for _ in range(2):
        stack.gradient = "adjoint"
        with pytest.warns(RuntimeWarning, match='gradient="checkpoint" from the next step on'):
            half_square(stack(x)).backward()
        assert stack.drift is not None
        stack(x)
        assert (stack.gradient, stack.drift) == ("checkpoint", None)
