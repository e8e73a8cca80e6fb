"""The Triton kernels of stored increments in Triton's interpreter: `test_triton_storing.py` runs this file.

    TRITON_INTERPRET=1 python -m pytest tests/ops/interpreted_storing.py

As `interpreted.py` says, without bfloat16, and with a fused multiply-add that rounds once.
"""

import math

import pytest
import torch
import triton

from resode_cuda import stored
from resode_cuda.ops import triton as triton_ops
from tests.support.fused_multiply_add import replace_fused_multiply_add
from tests.support.storing_cases import (
    EVERY_PAIR,
    EVERY_SHAPE,
    at_every_scale,
    by_kernel,
    check,
    halves,
    not_finite,
    operands,
)
from tests.support.storing_layouts import LAYOUTS, check_layouts

assert triton.knobs.runtime.interpret, "run this file with TRITON_INTERPRET=1"
pytestmark = [
    # numpy warns of what floating point does: NaN, infinity, and values too large for a dtype;
    pytest.mark.filterwarnings("ignore:(invalid value|overflow|divide by zero) encountered:RuntimeWarning"),
    # and of how the interpreter takes a scalar out of an array.
    pytest.mark.filterwarnings("ignore:Conversion of an array with ndim > 0:DeprecationWarning"),
]
WIDE = [torch.float32, torch.float64]


@pytest.fixture(autouse=True)
def _small_tiles(monkeypatch):
    """Tiles of two groups: what a GPU takes is compiled in `test_triton_storing.py`."""
    replace_fused_multiply_add(monkeypatch)
    tile = 2 * stored.GROUP
    monkeypatch.setattr(triton_ops, "VALUES_PER_TILE", dict.fromkeys(triton_ops.VALUES_PER_TILE, tile))


@pytest.mark.parametrize("case", [case for case in EVERY_PAIR if torch.bfloat16 not in case.pair], ids=str)
def test_every_pair_of_dtypes(case):
    values = operands(case)
    check(values, by_kernel(triton_ops, values))


@pytest.mark.parametrize("case", EVERY_SHAPE, ids=str)
def test_every_shape(case):
    values = operands(case)
    check(values, by_kernel(triton_ops, values))


@pytest.mark.parametrize("bits", stored.BITS)
@pytest.mark.parametrize("dtype", WIDE)
def test_every_scale(monkeypatch, dtype, bits):
    monkeypatch.setitem(triton_ops.VALUES_PER_TILE, dtype, 256 * stored.GROUP)  # fewer programs, for speed
    values = at_every_scale(dtype, bits)
    check(values, by_kernel(triton_ops, values))


@pytest.mark.parametrize("bits", stored.BITS[2:])
@pytest.mark.parametrize("dtype", WIDE)
def test_halves_are_rounded_to_even(dtype, bits):
    values = halves(dtype, bits)
    check(values, by_kernel(triton_ops, values))


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("bits", stored.BITS)
def test_what_is_not_finite_is_in_its_group_alone(bits, value):
    values = not_finite(value, bits)
    check(values, by_kernel(triton_ops, values))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_any_layout(monkeypatch, layout):
    check_layouts(triton_ops, layout, monkeypatch)
