"""What a training step of the depth-fused ops costs in plain torch: matrix products, memory, looks at the device."""

import pytest
import torch

from bench.harness.memory import measure
from resode_cuda import ResidualMLP, Reverse, squares
from resode_cuda.fused.reference import passes as reference
from resode_cuda.schemes import SCHEMES
from tests.support.fused_networks import Calls, network, run, state, wanted
from tests.support.networks import half_square, pretend_to_capture


@pytest.fixture
def calls(monkeypatch):
    """The operators called within the ops, which a mode outside does not see."""
    calls = Calls()

    def watched(function):
        def call(*args):
            with calls:
                return function(*args)

        return call

    for name in ("forward", "adjoint", "exact_adjoint"):
        monkeypatch.setattr(reference, name, watched(getattr(reference, name)))
    return calls


# Matrix products.


def products(calls, net, solver):
    """Number of matrix products in a training step."""
    x = state(net, 5)
    calls.names.clear()
    torch.autograd.grad(half_square(run(net, x, solver)), wanted(net, x) or [x])
    return calls.products()


PRODUCTS = {
    "checkpoint": (8, 16),
    Reverse("extrapolate"): (8, 16),
    Reverse("step", reuse=False): (9, 19),  # Heun's first stage is needed for its second
    Reverse("step"): (10, 20),
    Reverse("extrapolate", 1): (10, 20),
    Reverse("stored"): (8, 16),
    Reverse("stored", bits=3, rounded_forward=True): (8, 16),
    Reverse("step", 2): (14, 28),
}


@pytest.mark.parametrize("frozen", [False, True], ids=["", "frozen"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("solver", PRODUCTS, ids=str)
def test_products_of_a_step(calls, scheme, solver, dtype, frozen):
    per_step, counts = SCHEMES[scheme].blocks_per_step, []
    for steps in (5, 8):
        net = network(scheme, norm="rms", steps=steps, dtype=dtype)
        for parameter in net.parameters:
            parameter.requires_grad_(not frozen)
        counts.append(products(calls, net, solver))
    assert (counts[1] - counts[0]) / 3 == PRODUCTS[solver][per_step - 1] - 2 * frozen * per_step


def test_products_of_a_step_of_the_exact_adjoint_in_segments(calls, scheme, monkeypatch):
    """Two more than in one piece, less the product that no segment needs after its last step."""
    monkeypatch.setattr(reference, "_segmented", lambda *_: (5, 4))
    few, many = (products(calls, network(scheme, steps=steps), "checkpoint") for steps in (8, 16))
    per_step = SCHEMES[scheme].blocks_per_step
    assert many - few == 8 * 10 * per_step - 2


# Looks at the device.


@pytest.mark.parametrize("solver", PRODUCTS, ids=str)
@pytest.mark.parametrize("is_module", [False, True], ids=["op", "module"])
def test_a_training_step_reads_nothing_back_from_the_device(calls, monkeypatch, scheme, solver, is_module):
    """The module while a graph is captured; else a CPU's drift is judged at once."""
    pretend_to_capture(monkeypatch)
    monkeypatch.setattr(squares, "READ_FREELY", ())  # the CPU stands for a device
    if is_module:
        options = {"gradient": "checkpoint"} if solver == "checkpoint" else {"reverse": solver}
        mlp = ResidualMLP(6, 10, 5, scheme, norm="layer", anchors=2, on_drift="raise", **options)
        forward = lambda: mlp(torch.randn(7, 6))  # noqa: E731
    else:
        net = network(scheme, norm="layer")
        x, place = state(net, 7), torch.zeros(5, 2, dtype=torch.float64)
        forward = lambda: run(net, x, solver, (0, 2), place)  # noqa: E731
    with Calls() as outside:
        half_square(forward()).backward()
    assert calls.names
    assert outside.names.count("mlp_stack") == 1
    assert not {"_local_scalar_dense", "item", "is_nonzero", "nonzero", "equal"} & {*calls.names, *outside.names}


# Memory.

ROWS, DIM, HIDDEN = 4096, 64, 128
STATE = ROWS * DIM * 4
MODES = [{"reverse": "paper"}, {"reverse": "corrected"}, {"reverse": "extrapolated"}, {"gradient": "checkpoint"}]


def memory(scheme, steps, rows=ROWS, **options):
    """Peak of a step without the parameters' gradients, and what is held after the forward pass, in states."""
    mlp = ResidualMLP(DIM, HIDDEN, steps, scheme, on_drift="ignore", **options)
    gradients = 0
    for parameter in mlp.parameters():  # to which those of the step are added
        parameter.grad = torch.zeros_like(parameter)
        gradients += parameter.nbytes
    mlp(torch.randn(1, DIM)).sum().backward()
    x = torch.randn(rows, DIM)
    step = measure(lambda: mlp(x).square().mean(), x.device)
    return (step.peak - gradients) / STATE, step.held / STATE


@pytest.mark.parametrize("options", MODES, ids=lambda options: next(iter(options.values())))
@pytest.mark.parametrize(("scheme", "depths", "limit"), [("euler", (16, 64), 12), ("heun", (8, 32), 14)], ids=SCHEMES)
def test_memory_does_not_grow_with_depth(scheme, depths, limit, options):
    (shallow, held), (deep, deep_held) = (memory(scheme, steps, **options) for steps in depths)
    assert deep <= 1.01 * shallow
    assert shallow <= limit
    assert deep_held == pytest.approx(held, rel=0.01)
    assert held == pytest.approx(3 if options.get("reverse") == "extrapolated" else 1, rel=0.01)
    if "reverse" in options:
        assert deep == pytest.approx(shallow, rel=0.01)


@pytest.mark.parametrize("bits", [1, 4, 8])
def test_memory_of_stored_increments(scheme, bits):
    """A companion, a unit for each group of it, b + 1/4 bits a value and step, and x_N, which the loss keeps."""
    reverse = Reverse("stored", bits=bits)
    (shallow, held), (deep, deep_held) = (memory(scheme, steps, reverse=reverse) for steps in (8, 32))
    a_step = (bits + 0.25) / 32
    assert held == pytest.approx(2 + 1 / 32 + 8 * a_step, rel=0.01)
    assert deep_held - held == pytest.approx(24 * a_step, rel=0.01)
    assert deep - shallow <= 1.02 * 24 * a_step
    assert shallow - held <= 14
    anchored = memory(scheme, 8, reverse=reverse, anchors=(0, 4))[1]
    assert anchored == pytest.approx(3 + 2 * (1 + 1 / 32) + 6 * a_step, rel=0.01)


@pytest.mark.parametrize("options", MODES, ids=lambda options: next(iter(options.values())))
def test_a_last_tile_of_fewer_rows_takes_no_memory_of_its_own(scheme, options):
    assert memory(scheme, 8, ROWS - 96, **options)[0] <= memory(scheme, 8, **options)[0]


def test_without_gradients_nothing_is_held(scheme):
    mlp, x = ResidualMLP(DIM, HIDDEN, 16, scheme, reverse="extrapolated", anchors=1), torch.randn(ROWS, DIM)
    with torch.no_grad():
        out = mlp(x)
        kept = torch.ops.resode.mlp_stack(
            x, mlp.weight_in, None, mlp.weight_out, None, "gelu", None, scheme, mlp.steps,
            "stored", 0, False, False, [8], False, [0, 4], "checkpoint", "torch", None,
        )  # fmt: skip
    assert out.grad_fn is None
    assert [tensor.numel() for tensor in kept] == [x.numel(), *[0] * 7]
