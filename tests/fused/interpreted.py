"""The depth-fused Triton kernels in the interpreter: `test_fused_triton.py` runs this file in a process of its own.

    TRITON_INTERPRET=1 python -m pytest tests/fused/interpreted.py

bfloat16 is left out, as in `tests/ops/interpreted.py`.
"""

import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
import triton
from triton.runtime import interpreter

from resode_cuda import stored
from resode_cuda.fused import slabs
from resode_cuda.fused.signature import Wanted
from resode_cuda.fused.triton import passes as triton_passes
from resode_cuda.fused.triton import wide
from resode_cuda.fused.triton.tiles import Tile, Tiles
from resode_cuda.ops import triton as triton_ops
from resode_cuda.reverse import Reverse
from tests.support import traffic
from tests.support.fused_cases import CASES, STORED_CASES, Case, Wide, check, prefer_one_pass
from tests.support.fused_networks import Calls

assert triton.knobs.runtime.interpret, "run this file with TRITON_INTERPRET=1"
# numpy warns of how the interpreter takes a scalar out of an array.
pytestmark = pytest.mark.filterwarnings("ignore:Conversion of an array with ndim > 0:DeprecationWarning")


def _reduce(self, kind, desc, value, indices):
    pointers, mask = desc.materialize_pointers(indices)
    old = self.create_masked_load(pointers, mask, None, "", "", False)
    self.create_masked_store(pointers, interpreter.TensorHandle(old.data + value.data, old.dtype), mask, None, None)
    return interpreter.TensorHandle(np.zeros(1, np.int32), triton.language.int32)


@pytest.fixture(autouse=True)
def _like_a_small_gpu(monkeypatch):
    small = Tile(16, 16, 4)
    monkeypatch.setattr(triton_passes, "capability_of", lambda device: (9, 0))
    prefer_one_pass(monkeypatch)
    # The interpreter has no reductions by descriptor; here they are additions to memory, one after the other.
    monkeypatch.setattr(interpreter.InterpreterBuilder, "create_descriptor_reduce", _reduce, raising=False)
    # The weight-gradient pass has tiles of its own, and several ranges of rows.
    monkeypatch.setattr(triton_passes, "tiles_for", lambda *_: Tiles(small, small, small, small, Tile(32, 16, 4)))
    monkeypatch.setattr(triton_ops, "most_programs", lambda device: 8 * triton_ops.PROGRAMS_PER_PROCESSOR)


@pytest.mark.parametrize("case", [*CASES, *STORED_CASES], ids=str)
def test_matches_the_specification(case):
    check(triton_passes, case, torch.float32)


@pytest.mark.parametrize(
    "case",
    [
        Case(reverse="extrapolated", norm="rms"),
        Case("heun", activation="gelu_tanh", two_passes=True),
        Case(reverse=Reverse("stored", bits=4), dim=40, anchors=(1,)),
    ],
    ids=str,
)
def test_float16(case):
    check(triton_passes, case, torch.float16)


@pytest.mark.parametrize(
    "case",
    [
        Case(reverse="extrapolated", dim=24, hidden=40),
        Case("heun", norm="layer"),
        Case(bias=False, rows=3),
        Case("heun", reverse="stored", dim=40),
    ],
    ids=str,
)
def test_gpus_without_a_copy_engine(monkeypatch, case):
    monkeypatch.setattr(triton_passes, "capability_of", lambda device: (8, 0))
    check(triton_passes, case, torch.float32)
    check(triton_passes, case, torch.float16)


@pytest.mark.parametrize(
    ("scheme", "norm", "reverse", "step_bytes"),
    # u and c of 16 values and r, for each of a step's layers
    [
        ("euler", None, "extrapolated", 132),
        ("heun", "rms", "corrected", 264),
        ("euler", None, "stored", 260),  # of 32 values, as groups have
    ],
)
def test_slabs_of_rows_and_ranges_of_the_depth(monkeypatch, scheme, norm, reverse, step_bytes):
    monkeypatch.setattr(slabs, "THINNEST_SLAB", 32)
    case = Case(scheme, norm=norm, reverse=reverse, steps=4, rows=37, two_passes=True, anchors=(0, 3))
    for fitting_steps, length in ((4, 4), (3, 2)):
        monkeypatch.setattr(slabs, "SCRATCH_BYTES", 32 * fitting_steps * step_bytes)
        assert slabs.slabs(case.rows, case.steps, step_bytes, 64, unit=32, wave=256) == (32, length)
        check(triton_passes, case, torch.float32)


def test_ranges_of_rows_that_add_to_the_same_gradients():
    # Not deterministic, and beyond the dim of which gradients are reduced by the state pass.
    check(triton_passes, Case(rows=50, dim=80, hidden=16, steps=1), torch.float32)


def test_gradients_are_repeated_bit_by_bit():
    case = Case(rows=37, steps=2)
    network, x, g = case.operands(torch.float32)
    torch.use_deterministic_algorithms(True)
    try:
        method = network.method(case.solver)
        states = triton_passes.forward(network, method, x)
        first, second = (
            triton_passes.adjoint(network, method, g, states, Wanted(parameters=True)).gradients for _ in range(2)
        )
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize(("anchors", "n"), [((), 0), ((0,), 1), ((), 2)])
def test_what_is_not_finite_reaches_the_squares(value, anchors, n):
    """In a step's input: of the first one, of the first after a kept state, of the last."""
    case = Case(reverse="stored", dim=40, anchors=anchors)
    network, x, g = case.operands(torch.float32)
    method = network.method(case.solver, anchors)
    if n == 0:
        x[3, 35] = value
    else:
        network.bias_out[n - 1, 35] = value
    states = triton_passes.forward(network, method, x)
    squares = triton_passes.adjoint(network, method, g, states, Wanted(parameters=True)).squares
    assert not squares[n:].isfinite().all()
    if n == 0:
        rows = [row for row in range(case.rows) if row != 3]
        assert states.stored.companions[:, rows].isfinite().all()


@pytest.mark.parametrize("bits", [1, 2, 3, 4, 6, 8])
def test_companions_come_back_to_the_last_bit_over_many_steps(bits):
    case = Case(reverse=Reverse("stored", bits=bits), dim=40, steps=30, rows=17, activation="tanh")
    network, x, g = case.operands(torch.float32)
    method = network.method(case.solver)
    states = triton_passes.forward(network, method, x)
    found = triton_passes.adjoint(network, method, g, states, Wanted(parameters=False, input=True)).x
    unit = states.stored.units[0].repeat_interleave(stored.GROUP, 1)[:, :40]
    assert torch.equal(found, (x / unit).round() * unit)


WIDE = [
    *(
        Case(scheme, norm=norm, reverse=reverse, dim=20)
        for scheme, norm, reverse in [
            ("euler", "rms", "extrapolated"),
            ("euler", "layer", "corrected"),
            ("heun", "rms", "extrapolated"),
        ]
    ),
    *(Case(activation=activation, bias=activation != "tanh") for activation in ("relu", "gelu", "gelu_tanh", "tanh")),
    Case(reverse=Reverse("step", corrections=2), anchors=(0, 2), rows=75),
    Case(reverse="extrapolated", anchors=(0, 2, 4), steps=5, rows=1),
    Case("heun", reverse="stored", norm="rms", dim=40),
    Case(reverse=Reverse("stored", bits=(8, 4, 2, 1, 3), rounded_forward=True), anchors=(0, 3), steps=5, dim=40),
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("case", WIDE, ids=str)
def test_wide_layers(monkeypatch, case, dtype):
    monkeypatch.setattr(wide, "RANGE_ROWS", 32)
    monkeypatch.setattr(wide, "COLUMNS", 16)
    check(Wide, case, dtype)


@pytest.mark.parametrize(("reverse", "products"), [("extrapolated", 8), ("corrected", 10), ("paper", 9), ("stored", 8)])
def test_products_of_wide_layers(reverse, products):
    """Products of an Euler step, forward pass included; the first and the last steps differ and cancel."""

    def count(steps):
        case = Case(reverse=reverse, norm="rms", steps=steps)
        network, x, g = case.operands(torch.float32)
        with Calls() as calls:
            method = network.method(case.solver)
            Wide.adjoint(network, method, g, Wide.forward(network, method, x), Wanted(parameters=True))
        return calls.products()

    assert count(6) - count(4) == 2 * products


TRAFFIC = {
    ("forward", "corrected"): [(6, 4), (5, 2)],
    ("forward", "stored"): [(13, 4), (12, 2)],
    ("adjoint", "paper"): [(19, 14), (15.5, 7)],
    ("adjoint", "corrected"): [(23, 15), (19.5, 7.5)],
    ("adjoint", "extrapolated"): [(20, 11), (17.5, 5.5)],
    ("adjoint", "stored"): [(20, 11), (17.5, 5.5)],
    ("exact", "corrected"): [(15, 13), (12.5, 6.5)],
}
"""Reads and writes of a step, of states and of hidden activations, in units of 4 bytes a value: float32, float16."""


@pytest.mark.parametrize(("mode", "reverse"), TRAFFIC)
def test_memory_traffic_of_wide_layers(mode, reverse):
    counted = [traffic.per_step(mode, reverse, dtype=dtype) for dtype in (torch.float32, torch.float16)]
    assert [(units.states, units.hidden) for units in counted] == TRAFFIC[mode, reverse]


def test_wide_layers_are_the_backends_beyond_what_fits_on_chip(monkeypatch):
    monkeypatch.setitem(triton_passes.LARGEST_DIM, 4, 8)
    check(triton_passes, Case(reverse="extrapolated", norm="layer"), torch.float32)


@pytest.mark.parametrize("backend", [triton_passes, Wide], ids=["on chip", "wide"])
def test_threads_may_launch_at_once(backend):
    cases = [Case(norm="rms", rows=rows, steps=2) for rows in (17, 33, 49, 65)]
    ready = threading.Barrier(len(cases))

    def checked(case):
        ready.wait()
        check(backend, case, torch.float32)

    with ThreadPoolExecutor(len(cases)) as pool:
        list(pool.map(checked, cases))
