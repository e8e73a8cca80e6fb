"""Runs that are interrupted: copies, pickles, and `training_state` beside `state_dict`."""

import copy
import json
import math
import pickle
import warnings

import pytest
import torch

from resode_cuda import ResidualMLP, ResidualStack, Reverse, calibrate
from tests.support.networks import half_square, mlps


def saved_and_loaded(value, tmp_path, weights_only=True):
    torch.save(value, tmp_path / "run.pt")
    return torch.load(tmp_path / "run.pt", weights_only=weights_only)


KEPT = {
    "as it is": lambda state, tmp_path: state,
    "torch.save": saved_and_loaded,
    "JSON": lambda state, tmp_path: json.loads(json.dumps(state, allow_nan=False)),
}
COPIES = {
    "deepcopy": lambda module, tmp_path: copy.deepcopy(module),
    "pickle": lambda module, tmp_path: pickle.loads(pickle.dumps(module)),
    "torch.save": lambda module, tmp_path: saved_and_loaded(module, tmp_path, weights_only=False),
}
MAKERS = {
    "stack": lambda **options: ResidualStack(mlps("euler", 5, scale=2.0), **options),
    "mlp": lambda **options: ResidualMLP(6, 10, 5, **options),
}


def train(module, batches):
    """Plain gradient descent, without state of its own; the settings that each step ended with."""
    seen = []
    for x in batches:
        module.zero_grad()
        half_square(module(x)).backward()
        with torch.no_grad():
            for parameter in module.parameters():
                parameter.sub_(parameter.grad, alpha=1e-3)
        seen.append((module.gradient, module.reverse, module.anchors, module._monitor.fallback_requested))
    return seen


def assert_same(module, other):
    for mine, theirs in zip(module.parameters(), other.parameters(), strict=True):
        assert torch.equal(mine, theirs)


def resumed(make, module, keep, tmp_path):
    """Another module with the weights and the training state of this one."""
    weights, state = copy.deepcopy(module.state_dict()), keep(module.training_state(), tmp_path)
    other = make()
    other.load_state_dict(weights)
    other.load_training_state(state)
    assert other.training_state() == module.training_state()
    return other


@pytest.mark.parametrize("copied", COPIES.values(), ids=COPIES)
@pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS)
def test_a_copy_falls_back_as_the_original_does(make, copied, tmp_path):
    module, x = make(max_drift=1e-12, on_drift="checkpoint"), torch.randn(3, 6)
    with pytest.warns(RuntimeWarning, match='gradient="checkpoint" from the next step on'):
        train(module, [x])
    twin = copied(module, tmp_path)
    assert twin._monitor.fallback_requested
    assert (twin.gradient, twin.drift) == ("adjoint", None)
    train(module, [x, x])
    train(twin, [x, x])  # no further warning
    assert twin.gradient == module.gradient == copied(module, tmp_path).gradient == "checkpoint"
    assert_same(module, twin)


@pytest.mark.parametrize("keep", KEPT.values(), ids=KEPT)
@pytest.mark.parametrize("after", [0, 1, 2, 4])
@pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS)
def test_an_interrupted_run_goes_on_as_if_it_had_not_been(make, after, keep, tmp_path):
    """The first step's defects lead to checkpointing from the second on, whenever the run is interrupted."""
    module, batches = make(reverse="paper", anchors={0, 3}), torch.randn(5, 3, 6)
    module.reverse, module.max_drift, module.on_drift = Reverse("step", corrections=1), 1e-12, "checkpoint"
    start = copy.deepcopy(module)
    with pytest.warns(RuntimeWarning):
        train(module, batches)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        train(start, batches[:after])
        other = resumed(make, start, keep, tmp_path)
        train(other, batches[after:])
    assert other.training_state() == module.training_state()
    assert other.gradient == "checkpoint"
    assert_same(module, other)


def test_a_plan_and_its_ratio_are_kept(tmp_path):
    make, x = MAKERS["stack"], torch.randn(3, 6)
    stack = make()
    stack.apply_plan(calibrate(stack, x))
    stack.max_drift = math.inf
    other = resumed(make, stack, KEPT["JSON"], tmp_path)
    for module in (stack, other):
        train(module, [x])
    assert other.max_drift == math.inf
    assert torch.equal(stack.drift.gradient_error, other.drift.gradient_error)


@pytest.mark.parametrize("keep", KEPT.values(), ids=KEPT)
def test_recalibration_goes_on_where_it_stood(monkeypatch, keep, tmp_path):
    import resode_cuda.recalibration as module

    calls, make = [], MAKERS["stack"]
    plan = calibrate(make(), torch.randn(3, 6))
    monkeypatch.setattr(module, "calibrate", lambda stack, x, **options: calls.append(options) or plan)
    batches = torch.randn(9, 3, 6)
    stack = make().recalibrate_every(4, 1e-3, share=1.0, loss=half_square)
    stack._recalibration.share = math.inf  # whenever it is due
    train(stack, batches[:6])
    assert len(calls) == 2  # in the first training step and in the fifth
    state = keep({**stack.training_state(), "recalibration": stack._recalibration.state() | {"share": 1.0}}, tmp_path)
    other = make().recalibrate_every(100, loss=torch.sum)
    other.load_state_dict(stack.state_dict())
    other.load_training_state(state)
    other._recalibration.share = math.inf
    train(other, batches[6:])
    train(stack, batches[6:])
    assert [options["tolerance"] for options in calls] == [1e-3] * 4
    assert [options["loss"] for options in calls[2:]] == [torch.sum, half_square]
    assert_same(stack, other)
    clock = ("seconds", "seconds_spent", "seconds_of_the_last")
    mine, theirs = stack._recalibration.state(), other._recalibration.state()
    assert {key: mine[key] for key in mine if key not in clock} == {
        key: theirs[key] for key in mine if key not in clock
    }
    assert 0 <= theirs["seconds"] < math.inf


def test_the_time_between_two_runs_is_no_time_of_training(monkeypatch):
    import resode_cuda.recalibration as module

    stack = ResidualStack(mlps("euler", 5)).recalibrate_every(1, share=0.5)
    recalibration, clock = stack._recalibration, 1000.0
    monkeypatch.setattr(module.time, "perf_counter", lambda: clock)
    recalibration._count, recalibration._begin, recalibration._spent, recalibration._last = 7, 900.0, 30.0, 10.0
    state = stack.training_state()
    clock = 5.0  # of another process
    other = ResidualStack(mlps("euler", 5))
    other.load_training_state(state)
    assert other.training_state() == state
    assert other._recalibration.state()["seconds"] == 100


def test_a_state_without_recalibration_ends_it():
    stack = ResidualStack(mlps("euler", 5)).recalibrate_every(3)
    stack.load_training_state(ResidualStack(mlps("euler", 5)).training_state())
    assert stack._recalibration is None


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"steps": 6}, "needs the training_state of a module with 5 steps, got another: steps must be 5, got 6"),
        ({"colour": "red"}, r"must have the keys .*'gradient'.*, got one without \[\] and with \['colour'\]"),
        ({"gradient": "magic"}, "gradient must be one of"),
        ({"reverse": None}, "must be a mapping"),
        ({"reverse": {"predictor": "step"}}, "reverse must have the keys"),
        ({"reverse": {"predictor": "guess", "corrections": 0, "reuse": True, "accelerate": False}}, "predictor must"),
        ({"anchors": [5]}, "anchors must be numbers of the 5 steps, got 5"),
        ({"max_drift": "small"}, "max_drift must be a number"),
        ({"on_drift": "stop"}, "on_drift must be one of"),
        ({"fallback_requested": 1}, "fallback_requested must be True or False, got 1"),
        ({"gradient_error_per_defect": -1.0}, "gradient_error_per_defect must be finite"),
        ({"recalibration": {}}, "recalibration must have the keys"),
        ({"recalibration": {"has_loss": True}}, "its recalibration has a loss, got none"),
        ({"recalibration": {"count": -1}}, "must have a count and times >= 0"),
        ({"recalibration": {"seconds": math.nan}}, "must have a count and times >= 0"),
        ({"recalibration": {"steps": 0}}, "needs steps >= 1"),
    ],
    ids=str,
)
def test_a_state_that_does_not_fit_changes_nothing(change, message):
    stack = MAKERS["stack"](reverse="paper", anchors=2, max_drift=0.5)
    stack._monitor.gradient_error_per_defect = 3.0
    other = MAKERS["stack"](gradient="checkpoint", on_drift="raise").recalibrate_every(3)
    state = other.training_state()
    if change.get("recalibration"):
        change = {"recalibration": state["recalibration"] | change["recalibration"]}
    before, method, monitor = stack.training_state(), stack._method, stack._monitor
    with pytest.raises(ValueError, match=f"^ResidualStack: load_training_state .*{message}"):
        stack.load_training_state(state | change)
    assert stack.training_state() == before
    assert stack._method is method
    assert stack._monitor is monitor


def test_what_is_no_state_is_refused():
    stack = MAKERS["stack"]()
    for given in (None, [], "run.pt", stack.state_dict()):
        with pytest.raises(ValueError, match=r"^ResidualStack: load_training_state .*the state must"):
            stack.load_training_state(given)
    with pytest.raises(ValueError, match="a ResidualMLP does not calibrate, got a recalibration"):
        MAKERS["mlp"]().load_training_state(MAKERS["stack"]().recalibrate_every(2).training_state())


@pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS)
def test_the_state_is_of_plain_values_and_no_part_of_state_dict(make):
    module = make(anchors={1, 2})
    keys = list(module.state_dict())
    state = module.training_state()
    assert state == json.loads(json.dumps(state, allow_nan=False))
    assert list(module.state_dict()) == keys == [name for name, _ in module.named_parameters()]
