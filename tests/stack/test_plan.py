"""Plans: printed, kept as JSON, applied."""

import json

import pytest
import torch

from resode_cuda import Candidate, Plan, ResidualStack, Reverse, calibrate
from tests.support.networks import (
    half_square,
    mlps,
)


def test_a_plan_prints_and_keeps(tmp_path):
    stack = ResidualStack(mlps("euler", 8, scale=3.0), step=1.0, on_drift="ignore")
    plan = calibrate(stack, torch.randn(3, 6), tolerance=1e-2)
    lines = str(plan).splitlines()
    heads = "evaluations", "ms", "held MiB", "KiB a step", "gradient error", "input's", "worst layer's"
    assert [head for head in heads if head not in lines[0]] == []
    assert len(lines) == len(plan.candidates) + 2
    plan.save(tmp_path / "plan.json")
    assert Plan.load(tmp_path / "plan.json") == plan
    (tmp_path / "other.json").write_text("[]")
    with pytest.raises(ValueError, match=r"Plan\.load: .*other\.json must hold a plan"):
        Plan.load(tmp_path / "other.json")


def test_a_plan_keeps_its_set_of_anchors(tmp_path):
    cost = {"evaluations": 24, "seconds": 0.1, "held_bytes": 100}
    candidate = Candidate("adjoint", Reverse("step"), (0, 3), **cost, error=1e-3, defect=1e-3)
    plan = Plan(1e-2, (candidate,))
    assert "step, anchors {0, 3}" in str(plan)
    plan.save(tmp_path / "plan.json")
    assert Plan.load(tmp_path / "plan.json") == plan
    stack = ResidualStack(mlps("euler", 5)).apply_plan(plan)
    assert stack.anchors == (0, 3)
    short = ResidualStack(mlps("euler", 2), gradient="checkpoint")
    with pytest.raises(ValueError, match="anchors must be numbers of the 2 steps, got 3"):
        short.apply_plan(plan)
    assert (short.gradient, short.anchors) == ("checkpoint", None)


@pytest.mark.parametrize(
    "change",
    [
        {"gradient": "backprop"},
        {"reverse": None},
        {"anchors": 2.5},
        {"anchors": 0},
        {"anchors": [0, 1.5]},
        {"anchors": [-1]},
        {"anchors": "0"},
        {"error": "small"},
        {"error": -1.0},
        {"defect": -1.0},
    ],
    ids=str,
)
def test_a_plan_that_was_edited_wrongly_does_not_load(tmp_path, change):
    calibrate(ResidualStack(mlps("euler", 4)), torch.randn(3, 6)).save(tmp_path / "plan.json")
    record = json.loads((tmp_path / "plan.json").read_text())
    record["candidates"][0].update(change)
    (tmp_path / "plan.json").write_text(json.dumps(record))
    with pytest.raises(ValueError, match=r"Plan\.load: .* must hold a plan"):
        Plan.load(tmp_path / "plan.json")


def test_another_solver_has_no_estimate_of_the_gradients_error():
    stack, x = ResidualStack(mlps("euler", 6)), torch.randn(3, 6)
    for name, value in {"reverse": "extrapolated", "anchors": 2, "gradient": "adjoint"}.items():
        stack.apply_plan(calibrate(stack, x))
        half_square(stack(x)).backward()
        assert stack.drift.gradient_error is not None
        setattr(stack, name, value)
        half_square(stack(x)).backward()
        assert stack.drift.gradient_error is None
