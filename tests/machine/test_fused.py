"""The depth-fused Triton kernels, compiled for Hopper and Ampere and executed by the PTX machine.

    make machine     every case, in 16 bits, by both gradient forms

What is not marked `machine` is a part of it, for every day.
"""

import itertools

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed")

from dataclasses import replace

from resode_cuda.fused.signature import Wanted
from resode_cuda.fused.triton import passes as triton_passes
from resode_cuda.reverse import PRESETS, Reverse
from tests.support.fused_cases import CASES, STORED_CASES, Case, Wide, check
from tests.support.ptx.fused import fused_on

pytestmark = pytest.mark.usefixtures("off_the_kink")
DTYPES = (torch.bfloat16, torch.float16)
LAUNCHES = [(90, "one_pass"), (90, "two_pass"), (80, "two_pass")]
SIZES = [
    Case(reverse="extrapolated", dim=64, hidden=128, rows=150),
    Case(reverse="corrected", dim=64, hidden=100, rows=70, steps=2, norm="layer"),
    Case("heun", reverse="extrapolated", dim=32, hidden=64, rows=40, steps=2, norm="rms"),
    Case(reverse="paper", dim=128, hidden=130, rows=70, steps=2, activation="gelu_tanh"),
    Case("heun", reverse="extrapolated", dim=128, hidden=96, rows=40, steps=2, anchors=(1,)),
    Case(reverse="extrapolated", dim=200, hidden=140, rows=40, steps=2, activation="tanh"),
    Case("heun", reverse="corrected", dim=256, hidden=64, rows=20, steps=2, norm="layer"),
    Case(reverse=Reverse("stored", bits=4), dim=64, hidden=128, rows=150, anchors=(1,)),
    Case("heun", reverse="stored", dim=128, hidden=96, rows=70, steps=2, norm="rms"),
    Case(reverse=Reverse("stored", bits=2, rounded_forward=True), dim=256, hidden=64, rows=40, steps=2),
]
"""The tiles that these sizes have on a GPU, with rows and hidden units that do not fill them."""
EVERYDAY = [
    ((90, "one_pass"), torch.bfloat16, SIZES[0]),
    (
        (90, "two_pass"),
        torch.bfloat16,
        Case(reverse="extrapolated", dim=128, hidden=96, rows=40, steps=2, anchors=(1,)),
    ),
    ((90, "two_pass"), torch.bfloat16, SIZES[7]),
    ((90, "one_pass"), torch.bfloat16, Case("heun", norm="layer", dim=24)),
    ((90, "two_pass"), torch.float16, Case(reverse="extrapolated", anchors=(0, 2, 4), steps=5)),
    ((80, "two_pass"), torch.bfloat16, Case(activation="gelu", bias=False)),
    ((80, "two_pass"), torch.bfloat16, Case(reverse=Reverse("stored", bits=3), dim=33, steps=2)),
    ((80, "two_pass"), torch.float16, SIZES[1]),
]


def check_on(launch, case, dtype, backend=triton_passes, schedules=(False, True)):
    """With copies and products that end at once, and with some that end only where they are waited for."""
    gpu, gradient_form = launch
    for late in schedules:
        torch.manual_seed(1)
        with fused_on(gpu, gradient_form, late=late) as record:
            check(backend, case, dtype)
        assert record.programs or not case.rows


def ids(value):
    return "-".join(map(str, value)) if isinstance(value, tuple) else str(value).removeprefix("torch.")


@pytest.mark.parametrize(("launch", "dtype", "case"), EVERYDAY, ids=ids)
def test_matches_the_specification(launch, dtype, case):
    check_on(launch, case, dtype, schedules=[True])


@pytest.mark.machine
@pytest.mark.parametrize("dtype", DTYPES, ids=ids)
@pytest.mark.parametrize("launch", LAUNCHES, ids=ids)
@pytest.mark.parametrize("case", [*CASES, *STORED_CASES, *SIZES], ids=str)
def test_every_case(launch, case, dtype):
    if launch[1] == "one_pass" and (case.two_passes or case.dim > triton_passes.LARGEST_ONE_PASS_DIM):
        pytest.skip("gradients take a pass of their own")
    check_on(launch, case, dtype)


def test_what_is_taken_back_from_a_state_is_what_was_added_to_it():
    """With an h that is no power of two, and so many steps that roundings of their own would show."""
    steps = 96
    network, x, g = Case(reverse="extrapolated", steps=steps, dim=16, hidden=32, bias=False, rows=64).operands(
        torch.bfloat16
    )
    phase = torch.arange(steps)[:, None, None] / steps
    for weights in (network.weight_in, network.weight_out):
        weights.copy_(phase.cos() * weights[0] + phase.sin() * weights[1])
    network = replace(network, steps=(1 / steps,) * steps)
    method = network.method(PRESETS["extrapolated"])
    with fused_on(90):
        states = triton_passes.forward(network, method, x)
        rebuilt = triton_passes.adjoint(network, method, g, states, Wanted(parameters=False, input=True)).x
    assert (rebuilt - x).norm() <= 1.3e-4 * x.norm()


WIDE = [
    Case("heun", norm="layer", reverse="extrapolated", dim=300, hidden=200, rows=40),
    Case(norm="rms", reverse="corrected", dim=300, hidden=70, rows=70, anchors=(1,)),
    *(Case(activation=activation, dim=70) for activation in ("gelu", "gelu_tanh", "tanh", "relu")),
    Case(norm="layer", reverse=Reverse("stored", bits=(8, 3, 1)), dim=300, hidden=40),
]


@pytest.mark.parametrize(("gpu", "case"), [(90, WIDE[0]), (80, WIDE[6])], ids=ids)
def test_wide_layers(gpu, case):
    check_on((gpu, "wide"), case, torch.bfloat16, Wide, schedules=[True])


@pytest.mark.machine
@pytest.mark.parametrize(("gpu", "dtype", "case"), list(itertools.product((90, 80), DTYPES, WIDE)), ids=ids)
def test_every_wide_layer(gpu, dtype, case):
    check_on((gpu, "wide"), case, dtype, Wide)
