"""Calibrating again while a network trains."""

import copy
import math
import pickle
import time

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from resode_cuda import ResidualStack, calibrate
from tests.support.exact import errors_of
from tests.support.networks import (
    half_square,
    mlps,
)


def counted(monkeypatch, plan, seconds):
    """`calibrate` replaced by one that returns the plan after so many seconds, and the options it was called with."""
    import resode_cuda.recalibration as module

    calls = []

    def calibrate_quickly(stack, x, *args, **options):
        calls.append(options)
        time.sleep(seconds)
        return plan

    monkeypatch.setattr(module, "calibrate", calibrate_quickly)
    return calls


def test_recalibration_comes_every_so_many_training_steps(monkeypatch):
    stack, x = ResidualStack(mlps("euler", 4)), torch.randn(3, 6)
    calls = counted(monkeypatch, calibrate(stack, x, tolerance=1e-4), seconds=0)
    stack.recalibrate_every(3, 1e-4, share=1.0, loss=half_square)
    for _ in range(7):
        half_square(stack(x)).backward()
        with torch.no_grad():
            stack(x)
    assert len(calls) == 3
    assert calls[0] == {"tolerance": 1e-4, "loss": half_square, "prefer": "memory", "group": None}
    assert errors_of(stack, x) <= 1e-4
    stack.eval()
    for _ in range(4):
        stack(x)
    stack.train().recalibrate_every(0)
    for _ in range(4):
        stack(x)
    assert len(calls) == 3


def test_recalibration_keeps_to_its_share_of_the_time(monkeypatch):
    stack, x = ResidualStack(mlps("euler", 2)), torch.randn(3, 6)
    calls = counted(monkeypatch, calibrate(stack, x), seconds=0.05)
    stack.recalibrate_every(1, share=1e-6)
    for _ in range(10):
        half_square(stack(x)).backward()
    assert len(calls) == 1  # the first, without which there would be no plan


def test_a_calibration_is_no_training_step(monkeypatch):
    """Nor one of another stack inside the loss: neither is calibrated, changed or measured on the way."""
    blocks, x = mlps("euler", 6, scale=3), torch.randn(4, 6)
    alone = calibrate(ResidualStack(blocks, step=1.0), x, tolerance=1e-4)
    stack = ResidualStack(blocks, step=1.0).recalibrate_every(1, tolerance=0.9)
    assert [c.error for c in calibrate(stack, x, tolerance=1e-4).candidates] == [c.error for c in alone.candidates]
    other = ResidualStack(mlps("euler", 4), max_drift=1e-9, on_drift="checkpoint").recalibrate_every(1)
    plan = calibrate(ResidualStack(mlps("euler", 6)), x, loss=lambda out: half_square(other(out)))
    assert not plan.is_last_resort
    assert (other.gradient, other.drift, other._monitor.fallback_requested) == ("adjoint", None, False)


@pytest.mark.parametrize("batch", [torch.zeros(0, 6), torch.full((3, 6), math.nan)], ids=["empty", "nan"])
def test_a_batch_that_allows_no_calibration_does_not_end_the_training(batch):
    stack = ResidualStack(mlps("euler", 4)).recalibrate_every(1, share=1.0)
    with pytest.warns(RuntimeWarning, match="recalibration is left out this time"):
        stack(batch)
    half_square(stack(torch.randn(3, 6))).backward()


def test_a_checkpoint_around_the_stack_repeats_its_forward_pass(monkeypatch):
    stack = ResidualStack(mlps("euler", 6), reverse="extrapolated").recalibrate_every(2, 1e-9, share=1.0)
    calls = counted(monkeypatch, calibrate(stack, torch.randn(3, 6), tolerance=1e-9), seconds=0)
    for _ in range(4):
        x = torch.randn(3, 6, requires_grad=True)
        half_square(checkpoint(stack, x, use_reentrant=False)).backward()
    assert len(calls) == 2


def test_copies_and_pickles_do_not_calibrate():
    stack = ResidualStack(mlps("euler", 3)).recalibrate_every(1, loss=lambda out: out.sum())
    for copied in (copy.deepcopy(stack), pickle.loads(pickle.dumps(stack))):
        assert copied._recalibration is None
    assert stack._recalibration is not None
