"""What a `ResidualMLP` measures and tells of increments that it stores, and what follows from it."""

import copy
import json
import math
import warnings

import pytest
import torch

from resode_cuda import DriftError, ResidualMLP, Reverse, stored
from resode_cuda.fused.storage import StoredIncrements
from tests.support.fused_networks import ROUNDING, TIGHT, network, state, worst_error
from tests.support.networks import gradients, half_square


def train(module, x=None):
    half_square(module(torch.randn(8, 40) if x is None else x)).backward()


def ordinary(scheme="euler", depth=8, **options):
    return ResidualMLP(40, 32, depth, scheme, norm="layer", step=1.0, **options)


@pytest.mark.parametrize("bits", stored.BITS)
def test_healthy_networks_are_not_warned_of(scheme, bits):
    for seed in range(5):
        torch.manual_seed(seed)
        module = ordinary(scheme, reverse=Reverse("stored", bits=bits), on_drift="raise")
        train(module)
        assert 0 < module.drift.maximum < 0.05 * 2 ** (8 - bits)
        assert module.drift.changes is None


def test_max_drift_doubles_with_each_bit_less():
    for bits in (8, 4, 1):
        module = ordinary(reverse=Reverse("stored", bits=bits), on_drift="ignore")
        train(module)
        largest = module.drift.maximum.item() / 2 ** (8 - bits)
        module.on_drift, module.max_drift = "raise", 2 * largest
        torch.manual_seed(0)
        x = torch.randn(8, 40)
        train(module, x)
        module.max_drift = largest / 2
        expected = "" if bits == 8 else rf" times {2 ** (8 - bits)}"
        with pytest.raises(
            DriftError, match=rf"^ResidualMLP: the defect of step \d must .*{expected}, got .*stored bits"
        ):
            train(module, x)


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("place", ["x", "weights", "last"])
def test_what_is_not_finite_is_told_of(scheme, value, place):
    module, x = ordinary(scheme), torch.randn(8, 40)
    with torch.no_grad():
        if place == "x":
            x[3, 5] = value
        else:
            module.bias_out[2 if place == "weights" else -1, 7] = value
    with pytest.warns(RuntimeWarning, match="met NaN, Inf or a norm too large"):
        train(module, x)


def growing(**options):
    """States outgrow the first ones by more than units of them can say."""
    module = ResidualMLP(40, 32, 4, activation="identity", step=1.0, **options)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.mul_(40)
    return module


def test_what_could_not_be_stored_is_told_of(scheme):
    with pytest.warns(
        RuntimeWarning, match=r"^ResidualMLP: the increment of step 2 could not be stored in its bits: \d+% of it was"
    ):
        train(growing())
    # From where states are large on, the first one is no measure.
    kept = growing(anchors=(0, 1, 2, 3), on_drift="raise")
    train(kept)


@pytest.mark.parametrize("reverse", ["stored", Reverse("stored", bits=4)], ids=str)
def test_values_of_very_different_sizes_in_a_group_are_told_of_as_in_a_stack(reverse):
    module = ordinary(depth=4, reverse=reverse, on_drift="raise")
    x = torch.randn(8, 40)
    x[:, ::32] *= 1e5
    for either in (module, module.to_blocks()):
        with pytest.raises(DriftError, match=r"the increment of step 0 could not be stored in its bits"):
            train(either, x)


def test_drift_may_lead_to_storing():
    module = ResidualMLP(6, 12, 6, activation="tanh", step=1.0, reverse="corrected", on_drift="store", anchors=(0,))
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.mul_(4)
    x = torch.randn(5, 6)
    with pytest.warns(RuntimeWarning, match="8 stored bits, or checkpointing where these were not enough"):
        train(module, x)
    for copied in (module, copy.deepcopy(module)):
        train(copied, x)
        assert (copied.gradient, copied.reverse, copied.anchors) == ("adjoint", Reverse("stored"), (0,))


def test_where_8_bits_are_not_enough_it_checkpoints():
    module, x = growing(on_drift="store"), torch.randn(8, 40)
    with pytest.warns(RuntimeWarning, match="could not be stored in its bits"):
        train(module, x)
    train(module, x)
    assert module.gradient == "checkpoint"


def test_a_training_state_keeps_the_bits():
    module = ordinary(depth=3, reverse=Reverse("stored", bits=(8, 4, 2), rounded_forward=True))
    other = ordinary(depth=3)
    other.load_training_state(json.loads(json.dumps(module.training_state())))
    assert other.reverse == module.reverse


def test_the_output_may_be_modified_in_place(float64, scheme):
    """The way back starts from companions."""
    module, x = ordinary(scheme, depth=3), torch.randn(8, 40, requires_grad=True)

    def loss(y):
        y += 1
        return half_square(y)

    inputs = [x, *module.parameters()]
    expected = gradients(lambda: module(x) + 1, inputs)
    assert all(map(torch.equal, gradients(lambda: module(x), inputs, loss), expected))


@pytest.mark.parametrize("shape", [(5, 40), (5, 4, 40)], ids=str)
def test_vmap_over_x(float64, scheme, shape):
    module, x = ordinary(scheme, depth=3, anchors={1}), torch.randn(shape, requires_grad=True)
    inputs = [x, *module.parameters()]
    got = gradients(lambda: torch.vmap(module)(x), inputs)
    expected = gradients(lambda: torch.stack([module(each) for each in x]), inputs)
    torch.testing.assert_close(got, expected, rtol=TIGHT, atol=TIGHT)


@pytest.mark.parametrize("shape", [(5,), (5, 4), (5, 4, 3)], ids=str)
def test_what_is_stored_under_vmap_is_what_each_sample_stores(shape):
    net = network(dim=40, steps=3)
    method = net.method(Reverse("stored", bits=(8, 4, 3)), (1,))
    x = state(net, *shape).detach()

    def outputs(x):
        layers = *net.parameters, net.activation, net.norm, net.scheme, list(net.steps)
        solver = "stored", 0, False, False, [8, 4, 3], False, [1]
        with torch.no_grad():
            *kept, _ = torch.ops.resode.mlp_stack(x, *layers, *solver, "adjoint", "torch", None)
        return tuple(kept)

    mapped = torch.vmap(outputs)(x)
    for n, each in enumerate(x):
        expected, got = outputs(each), [tensor[n] for tensor in mapped]
        assert [tensor.shape for tensor in got] == [tensor.shape for tensor in expected]
        torch.testing.assert_close(got[:5], list(expected[:5]), rtol=TIGHT, atol=1e-5)
        for one, other in zip(*(StoredIncrements(*kept[3:]).steps(method) for kept in (got, expected)), strict=True):
            assert (one == other).double().mean() > 0.99


def test_batched_cotangents(float64, scheme):
    module = ordinary(scheme, depth=3, on_drift="raise", max_drift=1e-9)
    x, cotangents = torch.randn(5, 40, requires_grad=True), torch.randn(3, 5, 40)
    (batched,) = torch.autograd.grad(module(x), x, cotangents, is_grads_batched=True)
    assert module.drift is None
    module.on_drift = "ignore"
    each = [torch.autograd.grad(module(x), x, cotangent)[0] for cotangent in cotangents]
    torch.testing.assert_close(batched, torch.stack(each), rtol=ROUNDING, atol=ROUNDING)


def test_on_the_meta_device_no_drift_is_judged(scheme):
    module = ordinary(scheme, on_drift="raise", device="meta")
    half_square(module(torch.randn(5, 40, device="meta"))).backward()
    assert module.weight_in.grad.shape == module.weight_in.shape


def test_compiled_it_is_the_same(float64, scheme):
    module, x = ordinary(scheme, depth=3, anchors={1}), torch.randn(5, 40, requires_grad=True)
    inputs = [x, *module.parameters()]
    compiled = torch.compile(module, backend="aot_eager", fullgraph=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        got = gradients(lambda: compiled(x), inputs)
    assert worst_error(got, gradients(lambda: module(x), inputs)) < TIGHT
