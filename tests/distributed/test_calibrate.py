"""Plans, recalibrations and fallbacks that ranks decide together."""

from __future__ import annotations

import copy
import math
import pickle
import warnings
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from resode_cuda import ResidualStack, calibrate, recalibration
from resode_cuda.plan import Plan
from resode_cuda.worst_rank import WorstRank
from tests.distributed.test_parallel_kinds import Synced
from tests.support.exact import errors_of
from tests.support.networks import half_square, mlps

DIM, ROWS, STEPS = 6, 12, 5
WILD = 1
"""The rank whose batch is hard to rebuild."""


class Curved(nn.Module):
    """Nearly linear near zero, and steep where a state is large."""

    def __init__(self):
        super().__init__()
        self.inner = mlps("euler", 1)[0]

    def forward(self, x):
        return self.inner(x) + x.square() / 40


def stack_of(dtype=torch.float64, **options):
    torch.set_default_dtype(dtype)
    torch.manual_seed(0)
    return ResidualStack([Curved() for _ in range(STEPS)], **{"on_drift": "ignore", **options})


def batch_of(rank):
    """Tame on all ranks but one; of another size on each."""
    torch.manual_seed(10 + rank)
    return torch.randn(ROWS + rank, DIM) * (6.0 if rank == WILD else 0.3)


def figures(plan):
    return [(str(c), c.evaluations, c.held_bytes, c.seconds, c.defect, *c.errors) for c in plan.candidates]


def alone_and_together(mesh, options, settings):
    stack, x = stack_of(**options), batch_of(mesh.get_local_rank())
    alone = calibrate(stack, x, **settings)
    together = calibrate(stack, x, group=mesh.get_group(), **settings)
    stack.apply_plan(together)
    return str(alone.chosen), str(together.chosen), figures(together), errors_of(stack, x)


CASES = {
    "rebuilt": ({}, {"tolerance": 1e-5}),
    "stored": ({}, {"tolerance": 1e-2, "rebuild": False}),
    "checkpoint": ({"step": 1.0}, {"tolerance": 1e-2, "rebuild": False, "prefer": "time"}),
}


@pytest.mark.parametrize(("options", "settings"), CASES.values(), ids=CASES)
def test_all_ranks_get_the_plan_that_the_worst_one_needs(ranks, options, settings):
    alone, together, measured, errors = zip(*ranks.run(alone_and_together, options, settings, count=3), strict=True)
    assert len(set(alone)) > 1
    assert set(together) == {alone[WILD]}
    assert measured[0] == measured[1] == measured[2]
    assert max(errors) <= settings["tolerance"]


def of_synchronised(mesh):
    torch.set_default_dtype(torch.float64)
    rank, group = mesh.get_local_rank(), mesh.get_group()
    stack = ResidualStack([Synced(group) for _ in range(STEPS)], on_drift="ignore")
    return figures(calibrate(stack, batch_of(rank)[:ROWS], tolerance=1e-3, group=group))


def test_blocks_that_compute_over_all_ranks(ranks):
    first, second = ranks.run(of_synchronised)
    assert first == second
    assert first[-1][5] <= 1e-3


def limits(mesh):
    stack, x = stack_of(torch.float32, step=1.0), batch_of(mesh.get_local_rank())
    settings = {"tolerance": "amp", "rebuild": False}
    return calibrate(stack, x, **settings).tolerance, calibrate(stack, x, group=mesh.get_group(), **settings).tolerance


def test_a_tolerance_that_is_measured_is_the_strictest_rank_s(ranks):
    (first, agreed), (second, other) = ranks.run(limits)
    assert first != second
    assert agreed == other == min(first, second)


def raised(run):
    try:
        return run()
    except Exception as error:
        return type(error).__name__, str(error)


def failing(mesh, what):
    """What a calibration raises that fails on the second rank alone, and the next one's plan."""
    rank, group, stack = mesh.get_local_rank(), mesh.get_group(), stack_of()
    x, calls = batch_of(0), []

    def loss(out):
        calls.append(rank)
        if what == "loss" and rank and len(calls) == 1:
            raise KeyError("labels")
        return half_square(out)

    given = x * (math.nan if what == "gradient" and rank else 1)
    found = raised(lambda: calibrate(stack, given, loss=loss, group=group))
    return found, str(calibrate(stack, x, loss=loss, group=group).chosen)


def test_what_fails_on_one_rank_fails_on_all_and_no_rank_waits(ranks):
    ((first, message), plan), ((second, other_message), other_plan) = ranks.run(failing, "gradient")
    assert first == second == "CalibrationError"
    assert "finite and not zero, got another one on another rank" in message
    assert "got a norm of nan" in other_message
    assert plan == other_plan
    ((first, message), plan), (second, other_plan) = ranks.run(failing, "loss")
    assert first == "RuntimeError"
    assert "got an error on another one" in message
    assert second == ("KeyError", "'labels'")
    assert plan == other_plan


def numbers(mesh):
    rank = mesh.get_local_rank()
    return WorstRank("here", mesh.get_group(), torch.device("cpu")).of([rank, -rank, math.nan if rank else 0.0])


def test_the_largest_number_counts_and_what_is_none_is_infinite(ranks):
    assert ranks.run(numbers, count=3) == [[2, 0, math.inf]] * 3


def recalibrated(mesh, slow):
    """The training steps that calibrated. Each takes a second; on one rank a calibration takes as long as is said."""
    rank, stack, found, clock = mesh.get_local_rank(), stack_of(), [], SimpleNamespace(now=0.0, calls=0)
    plan = calibrate(stack, batch_of(0))

    def pretended(stack, x, **options):
        clock.calls += 1
        clock.now += slow if rank == WILD else 0.0
        return plan

    before = recalibration.calibrate, recalibration.time
    recalibration.calibrate, recalibration.time = pretended, SimpleNamespace(perf_counter=lambda: clock.now)
    try:
        stack.recalibrate_every(2, share=0.5, group=mesh.get_group())
        for n in range(9):
            half_square(stack(batch_of(rank))).backward()
            clock.now += 1.0
            found += [n] * (clock.calls - len(found))
    finally:
        recalibration.calibrate, recalibration.time = before
    return found


def test_a_rank_that_has_no_time_for_a_calibration_leaves_it_out_for_all(ranks):
    assert ranks.run(recalibrated, 0.0) == [[0, 2, 4, 6, 8]] * 2
    assert ranks.run(recalibrated, 3.0) == [[0, 6]] * 2


def trained(mesh, wraps, broken):
    """The plans of each training step, and what was warned of, where one rank's first batch is wild or broken."""
    rank, stack = mesh.get_local_rank(), stack_of()
    model = nn.Sequential(nn.Linear(DIM, DIM), stack, nn.Linear(DIM, 3))
    if wraps == "ddp":
        model = DistributedDataParallel(model, process_group=mesh.get_group())
    else:
        fully_shard(model, mesh=mesh)
    stack.recalibrate_every(1, tolerance=1e-2, share=1.0, group=mesh.get_group())
    found = []
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        for n in range(3):
            x = batch_of(rank) * (math.nan if broken and rank == WILD and n == 0 else 1)
            half_square(model(x)).backward()
            found.append((stack.gradient, str(stack.reverse), stack.anchors))
    return found, ["left out this time" in str(warning.message) for warning in seen]


@pytest.mark.parametrize("wraps", ["ddp", "the model sharded"])
def test_training_goes_on_with_the_same_plans(ranks, wraps):
    (first, warned), (second, other_warned) = ranks.run(trained, wraps, False)
    assert first == second
    assert not warned
    assert not other_warned
    (first, warned), (second, other_warned) = ranks.run(trained, wraps, True)
    assert first == second
    assert any(warned)
    assert any(other_warned)


def kept(mesh):
    stack = stack_of().recalibrate_every(3, group=mesh.get_group())
    stack(batch_of(0))
    state = stack.training_state()
    copies = [copy.deepcopy(stack), pickle.loads(pickle.dumps(stack))]
    without = raised(lambda: stack_of().load_training_state(state))
    with_it = stack_of().recalibrate_every(1, group=mesh.get_group())
    with_it.load_training_state(state)
    same = with_it._recalibration.group is mesh.get_group() and with_it.training_state()["recalibration"]["count"] == 1
    return [copied._recalibration for copied in copies], state["recalibration"]["has_group"], without, same


def test_a_group_is_kept_as_a_loss_is(ranks):
    for copies, has_group, (name, message), is_same in ranks.run(kept):
        assert copies == [None, None]
        assert has_group
        assert name == "ValueError"
        assert "its recalibration has a group, got none; call recalibrate_every(..., group=...) before" in message
        assert is_same


def refused(mesh, way):
    stack = stack_of()
    for block in stack if way == "blocks" else ():
        fully_shard(block, mesh=mesh)
    if way != "blocks":
        fully_shard(stack, mesh=mesh)
    x = batch_of(0)
    first = raised(lambda: calibrate(stack, x, group=mesh.get_group()))
    stack.recalibrate_every(1, group=mesh.get_group())
    second = raised(lambda: stack(x))
    stack.recalibrate_every(0)
    half_square(stack(x)).backward()
    plan = calibrate(stack_of(), x, group=mesh.get_group())
    assert isinstance(plan, Plan)
    half_square(stack.apply_plan(plan)(x)).backward()
    return first, second


@pytest.mark.parametrize("way", ["blocks", "stack"])
def test_sharded_stacks_are_refused_by_name_and_train_on(ranks, way):
    for errors in ranks.run(refused, way):
        for name, message in errors:
            assert name == "TypeError"
            assert "must be whole on each rank, got sharded ones; calibrate a copy of the stack, or before" in message


def fallen_back(mesh, on_drift, shards):
    """How the stack trained in each pass, where the third batch drifts on the second rank alone."""
    rank, stack = mesh.get_local_rank(), stack_of(on_drift=on_drift, max_drift=0.025, reverse="corrected")
    if shards:
        for block in stack:
            fully_shard(block, mesh=mesh)
        fully_shard(stack, mesh=mesh)
        model = stack
    else:
        model = DistributedDataParallel(stack, process_group=mesh.get_group())
    found = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        for n in range(5):
            x = batch_of(0) * (30 if n == 2 and rank == WILD else 1)
            half_square(model(x)).backward()
            found.append(stack.gradient if stack.reverse.predictor == "step" else stack.reverse.predictor)
    return found


@pytest.mark.parametrize(("on_drift", "then"), [("store", "stored"), ("checkpoint", "checkpoint")])
def test_one_rank_s_drift_counts_for_all_where_blocks_are_sharded(ranks, on_drift, then):
    all_fall_back = ["adjoint"] * 3 + [then] * 2
    assert ranks.run(fallen_back, on_drift, True) == [all_fall_back] * 2
    assert ranks.run(fallen_back, on_drift, False) == [["adjoint"] * 5, all_fall_back]
