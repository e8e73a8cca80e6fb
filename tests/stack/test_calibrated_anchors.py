"""calibrate: which states it keeps, and in which order it tries them."""

import math

import pytest
import torch

from resode_cuda import ResidualStack, calibrate
from resode_cuda.candidates import FIRST_STATE, sets_by_defect, sets_by_size
from resode_cuda.method import anchored_steps
from tests.support.exact import errors_of
from tests.support.networks import (
    mlps,
)


def test_anchors_are_tried_where_steps_are_rebuilt_badly_before_they_are_at_regular_distances():
    defects = [0.0, 1e-3, 0.5, 1e-3, 0.2, 2e-2, 1e-3, 1e-3]
    assert list(sets_by_defect(defects, 1e-2)) == [(0, 2), (0, 2, 4), (0, 2, 4, 5)]
    assert list(sets_by_defect(defects, 0.3)) == [(0, 2)]
    assert list(sets_by_defect(defects, 1.0)) == []
    # A step whose state is not finite hides those before it, which start from it.
    assert list(sets_by_defect([0.0, math.nan, math.nan, 0.5, 0.0, 0.2], 0.1)) == [(0, 2), (0, 2, 3), (0, 2, 3, 5)]
    assert list(sets_by_defect([0.0, *[math.nan] * 7, *[1e-3] * 4], 0.1)) == [(0, 7)]
    assert list(sets_by_defect([0.5] * 8, 0.1)) == [(0, 1), (0, 1, 2), (0, 1, 2, 3, 4)]


def wild(stack, *steps):
    """The stack with the blocks of these steps as large as a trained transformer's first layer."""
    with torch.no_grad():
        for n in steps:
            for parameter in stack[n].parameters():
                parameter.mul_(8)
    return stack


def test_the_same_steps_are_not_tried_twice():
    stack = wild(ResidualStack(mlps("euler", 9), step=0.1, on_drift="ignore"), 3, 6)
    candidates = calibrate(stack, torch.randn(16, 6), tolerance=1e-9).candidates
    tried = [candidate.anchors for candidate in candidates if candidate.reverse is not None]
    steps = [anchored_steps(anchors, 9) for anchors in dict.fromkeys(tried)]
    assert len(set(steps)) == len(steps)


@pytest.mark.parametrize(("steps", "expected"), [((0,), FIRST_STATE), ((0, 5), (0, 5)), ((0, 3, 6), (0, 3, 6))])
@pytest.mark.usefixtures("float64")
def test_states_before_wild_layers_are_found_and_kept(steps, expected):
    stack = wild(ResidualStack(mlps("euler", 12), step=0.1, on_drift="ignore"), *steps)
    x = torch.randn(16, 6)
    plan = calibrate(stack, x, tolerance=1e-3)
    assert plan.chosen.anchors == expected
    assert errors_of(stack.apply_plan(plan), x) <= 1e-3


def test_states_before_large_increments_are_proposed():
    assert list(sets_by_size([9.7, 4.2, 0.19, 0.6, 0.18, 0.1], 0.5)) == [(0,), (0, 1), (0, 1, 3)]
    assert list(sets_by_size([0.1, 0.2], 0.5)) == []
    assert list(sets_by_size([math.nan, 0.7, 0.1, 0.1], 0.5)) == [(0,), (0, 1)]
