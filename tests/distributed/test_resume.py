"""Trainings that are killed in the middle of a backward pass and started again from their last checkpoint."""

from __future__ import annotations

import copy
import signal

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch import distributed, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict, set_model_state_dict
from torch.distributed.fsdp import fully_shard

from resode_cuda import ResidualStack, Reverse
from tests.support.networks import half_square, mlps
from tests.support.resumable import EVERY, STEPS, Training, launch, log_of

DEATH = 5
RESUMED = DEATH // EVERY * EVERY
"""The step that the second run begins with."""

STORED = {"step": 1.0, "reverse": Reverse("stored", bits=4)}
FALLING_BACK = {"on_drift": "checkpoint", "max_drift": 0.0125}
"""The defects of the first of two ranks become larger than this in the third step, those of the second never."""
CASES = {
    "corrected": {"options": {"reverse": "corrected"}},
    "stored": {"options": STORED | {"anchors": {0, 2}}},
    "heun, momentum": {"options": {"scheme": "heun", "reverse": "paper"}, "optimizer": "momentum"},
    "checkpoint": {"options": {"gradient": "checkpoint"}},
    "plan": {"tolerance": 3e-2},
    "plan of a stack that stores": {"options": STORED, "tolerance": 1e-4},
    "falls back": {"options": FALLING_BACK},
    "stores, then falls back": {"options": STORED | {"on_drift": "store", "max_drift": 0.0025}},
    "calibrates again": {"recalibrates": 3},
}
RUNS = [
    *(("alone", 1, case) for case in CASES),
    *(("ddp", 2, case) for case in ("plan", "falls back", "stores, then falls back", "calibrates again")),
    *(("fsdp", 2, case) for case in ("heun, momentum", "plan of a stack that stores", "falls back")),
]


def errors(training):
    return "\n".join(path.read_text() for path in training.folder.glob("errors of rank *"))


def trained(training):
    """The logs of all ranks of a training that nothing interrupts."""
    assert set(launch(training)) == {0}, errors(training)
    logs = [log_of(training, rank) for rank in range(training.ranks)]
    assert all(list(log) == [*range(STEPS)] for log in logs)
    return logs


def killed(training):
    """The logs of all ranks of a training that dies."""
    codes = launch(training._replace(dies_at=DEATH))
    assert codes[-1] == -signal.SIGKILL, errors(training)
    assert 0 not in codes
    return [log_of(training, rank) for rank in range(training.ranks)]


def resumed(training):
    """The logs of all ranks, what came before included."""
    assert set(launch(training)) == {0}, errors(training)
    return [log_of(training, rank) for rank in range(training.ranks)]


@pytest.mark.parametrize(("way", "ranks", "case"), RUNS, ids=[f"{way} {ranks}: {case}" for way, ranks, case in RUNS])
def test_a_killed_training_goes_on_as_if_it_had_not_been(tmp_path, way, ranks, case):
    """Losses to the last bit, and how the stack trains: gradient, solver, anchors, what is measured next, counters."""
    training = Training(tmp_path / "killed", way, ranks, **CASES[case])
    expected = trained(training._replace(folder=tmp_path / "uninterrupted"))
    before = killed(training)
    assert before == [{step: log[step] for step in range(DEATH)} for log in expected]
    assert resumed(training) == expected


def test_decisions_that_are_kept_are_those_of_each_rank(tmp_path):
    first, second = trained(Training(tmp_path, "ddp", 2, FALLING_BACK))
    assert first[RESUMED]["training"]["gradient"] == "checkpoint"
    assert second[RESUMED]["training"]["gradient"] == "adjoint"


@pytest.mark.parametrize(("before", "after"), [(2, 3), (3, 2)])
def test_another_number_of_ranks_goes_on_with_the_same_training(tmp_path, before, after):
    training = Training(tmp_path / "killed", "fsdp", before, STORED)
    (expected, *_) = trained(training._replace(folder=tmp_path / "uninterrupted"))
    killed(training)
    found = resumed(training._replace(ranks=after))[0]
    assert {step: log["training"] for step, log in found.items()} == {
        step: log["training"] for step, log in expected.items()
    }
    assert [log["loss"] for log in found.values()] == pytest.approx(
        [log["loss"] for log in expected.values()], rel=1e-12, abs=0
    )


def sharded(options, seed):
    torch.manual_seed(seed)
    stack = ResidualStack(mlps("euler", 4), **options)
    for block in stack:
        fully_shard(block)
    return fully_shard(stack)


def whole_state(mesh, options):
    """One rank has the whole state on its CPU, and gives it to all others of another stack."""
    torch.set_default_dtype(torch.float64)
    x = torch.randn(4, 6)
    stack, other = sharded(options, 1), sharded(options, 2)
    gathered = get_model_state_dict(stack, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
    is_first = mesh.get_local_rank() == 0
    if is_first:
        plain = nn.Sequential(*mlps("euler", 4))
        plain.load_state_dict(gathered, strict=True)
    else:
        assert gathered == {}
    given = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True, strict=True)
    set_model_state_dict(other, gathered, options=given)
    out = stack(x)
    half_square(out).backward()
    assert torch.equal(other(x), out)
    other.load_state_dict(copy.deepcopy(stack.state_dict()), strict=True)
    return [*gathered] if is_first else [name for name, _ in plain_names()]


def plain_names():
    return nn.Sequential(*mlps("euler", 4)).named_parameters()


@pytest.mark.parametrize("options", [{"reverse": "stored"}, {"gradient": "checkpoint"}])
def test_the_whole_state_of_a_sharded_stack_is_the_plain_one(ranks, options):
    for names in ranks.run(whole_state, options, count=3):
        assert names == [name for name, _ in plain_names()]


def kept_by_dcp(mesh, settings, others, folder):
    """The training state of a stack, from a checkpoint that was loaded into that of another one."""
    stacks = [made(ResidualStack(mlps("euler", 4))) for made in (settings, others)]
    expected = stacks[0].training_state()
    group = mesh.get_group()
    dcp.save({"training": expected}, checkpoint_id=folder, process_group=group)
    state = {"training": stacks[1].training_state()}
    dcp.load(state, checkpoint_id=folder, process_group=group)
    stacks[1].load_training_state(state["training"])
    found = stacks[1].training_state()
    distributed.barrier(group)
    return without_times(found) == without_times(expected)


def without_times(state):
    """Each rank measures others, and the checkpoint has those of any of them."""
    kept = {key: value for key, value in state["recalibration"].items() if "seconds" not in key}
    return state | {"recalibration": kept}


def fresh(stack):
    return stack


def with_anchors(stack):
    stack.anchors, stack.reverse, stack.max_drift = {0, 2}, Reverse("stored", bits=(8, 4, 2, 1)), float("inf")
    return stack


def calibrating(stack):
    half_square(stack.recalibrate_every(3)(torch.randn(3, 6))).backward()
    return stack


@pytest.mark.parametrize("settings", [fresh, with_anchors, calibrating])
@pytest.mark.parametrize("others", [fresh, with_anchors, calibrating])
def test_a_training_state_goes_through_a_distributed_checkpoint(ranks, tmp_path, settings, others):
    """Value by value, into a stack that was made with other settings."""
    assert ranks.run(kept_by_dcp, settings, others, tmp_path) == [True, True]
