"""The drift of a `ResidualMLP`, and what follows from it."""

import warnings

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from resode_cuda import DriftError, ResidualMLP, Reverse
from tests.support.fused_networks import ROUNDING, worst_error
from tests.support.networks import gradients, half_square, pretend_to_capture


def train(module, x=None):
    half_square(module(torch.randn(5, 6) if x is None else x)).backward()


def drifting(**options):
    """Ordinary ResNet steps with weights four times too large, rebuilt."""
    module = ResidualMLP(6, 12, 6, activation="tanh", step=1.0, **{"reverse": "corrected", **options})
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.mul_(4)
    return module


def test_drift_is_that_of_the_last_backward_pass(scheme):
    module = ResidualMLP(6, 10, 4, scheme, anchors=2)
    assert module.drift is None
    out = module(torch.randn(5, 6))
    assert module.drift is None
    half_square(out).backward()
    first = module.drift
    assert first.defects.shape == (4,)
    assert first.maximum == first.defects.max()
    assert (first.defects[::2] == 0).all()  # from anchors
    assert (first.defects[1::2] > 0).all()
    train(module)
    assert not torch.equal(first.defects, module.drift.defects)


@pytest.mark.parametrize("setting", [("reverse", "paper"), ("gradient", "checkpoint"), ("gradient", "backprop")])
def test_no_drift_is_left_of_other_settings(setting):
    module = ResidualMLP(6, 10, 4)
    train(module)
    assert module.drift is not None
    setattr(module, *setting)
    train(module)
    assert module.drift is None


def test_warn_on_drift_warns_once():
    module = drifting()
    with pytest.warns(RuntimeWarning, match=r"^ResidualMLP: the defect of step \d must be at most max_drift=0.05"):
        train(module)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        train(module)
        train(drifting(on_drift="ignore"))
        train(drifting(max_drift=1e9))


def test_raise_on_drift():
    module = drifting(on_drift="raise", max_drift=0.1)
    with pytest.raises(DriftError, match=r"^ResidualMLP: the defect of step \d must be at most max_drift=0.1, got "):
        train(module)
    module.gradient = "checkpoint"
    train(module)


def test_compiled_it_raises_on_drift_by_leaving_the_graph():
    module = drifting(on_drift="raise")
    compiled = torch.compile(module, backend="eager")
    with pytest.raises(DriftError):
        half_square(compiled(torch.randn(5, 6))).backward()


def test_checkpoint_on_drift_is_exact_from_the_next_step_on():
    module = drifting(on_drift="checkpoint")
    with pytest.warns(RuntimeWarning, match='gradient="checkpoint" from the next step on'):
        train(module)
    assert module.gradient == "adjoint"
    x = torch.randn(5, 6)
    got = gradients(lambda: module(x), list(module.parameters()))
    assert module.gradient == "checkpoint"
    module.gradient = "backprop"
    assert worst_error(got, gradients(lambda: module(x), list(module.parameters()))) < 1e-5
    module.gradient = "adjoint"
    module(x)
    assert module.gradient == "adjoint"


def test_a_state_that_is_not_finite_is_told():
    module = ResidualMLP(6, 10, 4, on_drift="ignore")
    with torch.no_grad():
        module.weight_in[2] = torch.inf
    with pytest.warns(RuntimeWarning, match=r"^ResidualMLP: the reconstruction of step \d met NaN, Inf"):
        train(module)


@pytest.mark.parametrize("reverse", ["corrected", "extrapolated", Reverse("step", 2)], ids=str)
@pytest.mark.parametrize("exponent", [-100, -70, 66, 100])
def test_defects_of_states_of_any_size(scheme, reverse, exponent):
    """A network that is homogeneous to the last bit has the same at every size."""
    module = ResidualMLP(6, 10, 4, scheme, activation="relu", bias=False, reverse=reverse)
    x, seen = torch.randn(5, 6), []
    for size in (1.0, 2.0**exponent):
        module(size * x).backward(torch.ones(5, 6))
        seen.append(module.drift.defects)
    assert seen[0].count_nonzero() >= 2
    torch.testing.assert_close(seen[1], seen[0], rtol=1e-6, atol=0)


def test_drift_is_judged_after_a_forward_pass_in_another_dtype(scheme):
    module, x = ResidualMLP(6, 10, 4, scheme, on_drift="raise", max_drift=1e-9), torch.randn(5, 6)
    out = module(x)
    wide = {name: parameter.detach().double().requires_grad_() for name, parameter in module.named_parameters()}
    torch.func.functional_call(module, wide, (x.double(),))
    with pytest.raises(DriftError):
        half_square(out).backward()
    assert module.drift.maximum > 1e-9


@pytest.mark.parametrize("gradient", ["adjoint", "checkpoint"])
def test_batched_cotangents(float64, scheme, gradient):
    module = ResidualMLP(6, 10, 4, scheme, gradient=gradient, on_drift="raise", max_drift=1e-9)
    x, cotangents = torch.randn(5, 6, requires_grad=True), torch.randn(3, 5, 6)
    (batched,) = torch.autograd.grad(module(x), x, cotangents, is_grads_batched=True)
    assert module.drift is None
    module.on_drift = "ignore"
    each = [torch.autograd.grad(module(x), x, cotangent)[0] for cotangent in cotangents]
    torch.testing.assert_close(batched, torch.stack(each), rtol=ROUNDING, atol=ROUNDING)


@pytest.mark.parametrize("on_drift", ["warn", "raise"])
def test_on_the_meta_device_no_drift_is_judged(scheme, on_drift):
    module = ResidualMLP(6, 10, 4, scheme, on_drift=on_drift, device="meta")
    x = torch.randn(5, 6, device="meta", requires_grad=True)
    half_square(module(x)).backward()
    assert module.weight_in.grad.shape == module.weight_in.shape
    assert module.drift.defects.is_meta


@pytest.mark.parametrize("on_drift", ["ignore", "raise"])
def test_checkpointing_around_the_module(scheme, on_drift):
    module, x = ResidualMLP(6, 10, 4, scheme, max_drift=1e-9, on_drift=on_drift), torch.randn(5, 6)
    around = lambda: checkpoint(module, x, use_reentrant=False)  # noqa: E731
    if on_drift == "raise":
        with pytest.raises(DriftError):
            half_square(around()).backward()
    else:
        expected = gradients(lambda: module(x), list(module.parameters()))
        defects = module.drift.defects
        assert all(map(torch.equal, gradients(around, list(module.parameters())), expected))
        assert torch.equal(module.drift.defects, defects)


class Untouchable:
    """An event of the device, of which nobody may ask anything while a graph is captured."""

    def query(self):
        raise AssertionError

    synchronize = query


def test_drift_is_measured_and_not_judged_while_a_graph_is_captured(monkeypatch):
    module = drifting(on_drift="raise")
    with monkeypatch.context() as context:
        pretend_to_capture(context)
        context.setattr(module._monitor, "_arriving", [(torch.zeros(7, 2), Untouchable())])
        train(module)
        train(module)
    assert module.drift.maximum > module.max_drift


def test_replicas_of_data_parallel_leave_the_drift_alone():
    module = drifting(on_drift="raise", max_drift=0.1)
    replica = module._replicate_for_data_parallel()
    for name, parameter in module.named_parameters():
        setattr(replica, name, parameter)
    with pytest.raises(DriftError):
        train(replica)
    assert replica.drift is not None
    assert module.drift is None
