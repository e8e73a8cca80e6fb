"""calibrate: stored increments among the candidates, what is preferred, and the tolerance of mixed precision."""

import itertools
import math

import pytest
import torch

from resode_cuda import ResidualStack, Reverse, calibrate, smooth_init_
from resode_cuda.candidates import EXACT, SOLVERS, STORED, Choice, all_choices, first_choices, has_prospect
from tests.support.exact import errors_of
from tests.support.networks import mlp, mlps


def trained_like(steps=8, wild=()):
    """A network of h = 1 that nothing can be rebuilt for."""
    torch.manual_seed(0)
    stack = ResidualStack([mlp(32, 64) for _ in range(steps)], step=1.0, on_drift="ignore")
    with torch.no_grad():
        for n in wild:
            stack[n][-1].weight *= 30
    return stack


def test_candidates_go_from_the_cheapest_on():
    for prefer in ("memory", "time"):
        found = [*first_choices(prefer), *all_choices(16, prefer, [(0, 3)], [(0,), (0, 1)])]
        assert len(set(found)) == len(found)
        solvers = {choice.reverse for choice in found}
        assert solvers >= {*STORED}
        assert solvers == {*SOLVERS, *STORED} or prefer == "time"
        costs = [(choice.states(16), choice.evaluations(16)) for choice in found]
        if prefer == "time":
            costs = [cost[::-1] for cost in costs]
        assert costs[len(first_choices(prefer)) :] == sorted(costs[len(first_choices(prefer)) :])


def test_costs():
    assert EXACT.states(16) == 16
    assert EXACT.evaluations(16) == 2
    assert Choice("adjoint", Reverse("step", 1), (0, 3)).evaluations(16) == 1 + (2 + 14 * 3) / 16
    assert Choice("adjoint", Reverse("extrapolate")).states(16) == 3
    stored = Choice("adjoint", Reverse("stored", bits=4), (0, 3))
    assert stored.states(16) == 2 + 1 + 14 * 4.25 / 32
    assert stored.evaluations(16) == 2


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("prefer", ["memory", "time"])
def test_what_cannot_be_rebuilt_is_stored(prefer):
    stack, x = trained_like(), torch.randn(16, 32)
    for tolerance in (5e-2, 6e-3):
        plan = calibrate(stack, x, tolerance=tolerance, prefer=prefer)
        chosen = plan.chosen
        assert chosen.error <= tolerance
        assert chosen.reverse.is_stored or prefer == "memory"
        assert errors_of(stack.apply_plan(plan), x) == pytest.approx(chosen.error, rel=1e-6)
        assert chosen.steps == 8
        assert 0 < chosen.input_error < 1
        assert chosen.error <= chosen.layer_error < 1
        if chosen.reverse.is_stored:
            assert f"stored, {chosen.reverse.bits} bits" in str(plan)


@pytest.mark.usefixtures("float64")
def test_wild_steps_are_kept():
    stack, x = trained_like(wild=(0,)), torch.randn(16, 32)
    plan = calibrate(stack, x, tolerance=6e-3)
    assert plan.chosen.anchors is not None
    assert 0 in ((plan.chosen.anchors,) if isinstance(plan.chosen.anchors, int) else plan.chosen.anchors)


def test_the_tolerance_of_mixed_precision():
    stack, x = trained_like(), torch.randn(64, 32)
    calls = []

    def loss(out):
        calls.append(out.dtype)
        return out.float().square().sum() / 2

    plan = calibrate(stack, x, tolerance="amp", loss=loss)
    assert 1e-3 < plan.tolerance < 5e-2
    assert plan.chosen.error <= plan.tolerance
    assert len(calls) == 2
    stack.recalibrate_every(10, "amp", prefer="time")
    stack(x).sum().backward()
    assert stack.reverse.is_stored or stack.gradient == "checkpoint"
    state = stack.training_state()
    other = trained_like()
    other.load_training_state(state)
    assert other._recalibration.tolerance == "amp"
    assert other._recalibration.prefer == "time"


def test_what_is_in_vain_is_left_out():
    diverging = {Choice("adjoint", Reverse("step", k)): error for k, error in enumerate((0.5, 0.6))}
    assert not has_prospect(Choice("adjoint", Reverse("step", 2, accelerate=False)), diverging, 1e-2)
    assert has_prospect(Choice("adjoint", Reverse("step", 2)), diverging, 1e-2)
    converging = {Choice("adjoint", Reverse("step", k)): error for k, error in enumerate((0.5, 0.1))}
    assert has_prospect(Choice("adjoint", Reverse("step", 2, accelerate=False)), converging, 1e-2)
    assert not has_prospect(Choice("adjoint", Reverse("step", 2, accelerate=False)), converging, 1e-5)
    broken = {Choice("adjoint", Reverse("step", k)): error for k, error in enumerate((0.5, math.inf))}
    assert not any(has_prospect(Choice("adjoint", Reverse("step", 2, accelerate=a)), broken, 1) for a in (True, False))
    one_bit = {Choice("adjoint", STORED[0]): 0.4}
    tried = [solver.bits for solver in STORED[1:] if has_prospect(Choice("adjoint", solver), one_bit, 1e-2)]
    assert tried == [6, 8]
    for fewer, more in itertools.pairwise(STORED):
        assert fewer.bits < more.bits


def test_bad_arguments():
    stack, x = ResidualStack(mlps("euler", 4)), torch.randn(3, 6)
    with pytest.raises(ValueError, match=r"prefer must be one of \('memory', 'time'\), got 'speed'"):
        calibrate(stack, x, prefer="speed")
    with pytest.raises(ValueError, match="tolerance must be positive and finite, got 'AMP'"):
        calibrate(stack, x, tolerance="AMP")
    with pytest.raises(ValueError, match="recalibrate_every needs prefer among"):
        stack.recalibrate_every(5, prefer="speed")


def test_time_first_leaves_out_what_takes_longer_than_checkpointing():
    found = all_choices(12, "time", [(0, 1, 2, 3)], [(0,)])
    assert found
    assert all(choice.evaluations(12) <= EXACT.evaluations(12) for choice in found)


def test_narrow_samples_fill_whole_groups():
    choice = Choice("adjoint", STORED[-1])
    assert choice.states(12, padding=16.0) == 1 + 12 * 16 * 8.25 / 32
    assert not any(choice.reverse.is_stored for choice in all_choices(12, "memory", [], [], padding=32.0))


def test_a_stack_with_auxiliaries_needs_a_loss():
    class WithLoss(torch.nn.Module):
        def forward(self, x):
            return x, x.sum()

    with pytest.raises(TypeError, match="a stack with auxiliary returns a tuple, which needs a loss"):
        calibrate(ResidualStack([WithLoss()], auxiliary=sum), torch.randn(3, 6))


def test_a_plan_without_solvers_that_rebuild():
    torch.manual_seed(0)
    stack = smooth_init_(ResidualStack([mlp(6) for _ in range(16)]))
    x = torch.randn(8, 6)
    assert not calibrate(stack, x).chosen.reverse.is_stored
    for tolerance, chosen in ((1e-1, "adjoint"), (1e-3, "adjoint"), (1e-9, "checkpoint")):
        plan = calibrate(stack, x, tolerance=tolerance, rebuild=False)
        assert plan.chosen.gradient == chosen
        assert all(tried.reverse is None or tried.reverse.is_stored for tried in plan.candidates)
