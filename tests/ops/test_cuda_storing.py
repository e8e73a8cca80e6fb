"""The CUDA kernels of stored increments: their own source on the CPU against the reference, and the same on a GPU."""

import math

import pytest
import torch

from resode_cuda import ops, stored
from resode_cuda.library import require
from resode_cuda.ops import build_info
from resode_cuda.ops.cuda import CompiledKernels
from tests.support.storing_cases import (
    EVERY_PAIR,
    EVERY_SHAPE,
    OPS,
    StoringCase,
    at_every_scale,
    by_kernel,
    check,
    halves,
    not_finite,
    operands,
)
from tests.support.storing_layouts import LAYOUTS, check_layouts

WIDE = [torch.float32, torch.float64]
GROUPS_OF_A_STRIDE = 4 * 32
"""Groups that the blocks of one multiprocessor take at a time, at most: those of stored_step are 6 * 32."""


@pytest.fixture
def host(kernels):
    kernels.host_schedule(False, True)
    kernels.host_device(0)  # with a single multiprocessor
    return CompiledKernels(kernels, lambda device: 0)


@pytest.mark.parametrize("case", EVERY_PAIR, ids=str)
def test_every_pair_of_dtypes(host, case):
    values = operands(case)
    check(values, by_kernel(host, values))


@pytest.mark.parametrize("case", EVERY_SHAPE, ids=str)
def test_every_shape(kernels, host, case):
    values = operands(case)
    for greedy in (False, True):
        kernels.host_schedule(greedy, True)
        check(values, by_kernel(host, values))


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("values_of_a_sample", [32, 33])
def test_more_than_two_strides_of_the_grid(host, values_of_a_sample, op):
    shape = 3 * GROUPS_OF_A_STRIDE + 5, values_of_a_sample
    values = operands(StoringCase(op, 3, (torch.float32, torch.bfloat16), shape, stages=2))
    check(values, by_kernel(host, values))


@pytest.mark.parametrize("bits", stored.BITS)
@pytest.mark.parametrize("dtype", WIDE)
def test_every_scale(host, dtype, bits):
    values = at_every_scale(dtype, bits)
    check(values, by_kernel(host, values))


@pytest.mark.parametrize("bits", stored.BITS[2:])
@pytest.mark.parametrize("dtype", WIDE)
def test_halves_are_rounded_to_even(host, dtype, bits):
    values = halves(dtype, bits)
    check(values, by_kernel(host, values))


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("bits", stored.BITS)
def test_what_is_not_finite_is_in_its_group_alone(host, bits, value):
    values = not_finite(value, bits)
    check(values, by_kernel(host, values))


@pytest.mark.parametrize("bits", stored.BITS)
@pytest.mark.parametrize("op", OPS)
def test_misaligned_operands(host, op, bits):
    """Accesses of several values, which the host refuses at other addresses, are not made."""
    for offset in (1, 2):
        values = operands(StoringCase(op, bits, shape=(3, 64)))
        check(values, by_kernel(host, values, offset=offset))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_any_layout(monkeypatch, host, layout):
    check_layouts(host, layout, monkeypatch)


@pytest.mark.parametrize("bits", stored.BITS)
def test_bytes_at_any_address_are_unpacked(monkeypatch, host, bits):
    values = operands(StoringCase("stored_step", bits, shape=(3, 64)))
    shifted = torch.cat([values.packed.flatten()[:1], values.packed.flatten()])[1:].view(values.packed.shape)
    out = torch.full_like(values.companion, torch.nan)
    host.stored_step(values._replace(packed=shifted), out)
    check(values, [out])


def test_what_is_not_served_is_refused(kernels):
    code = kernels.dtype_codes
    with pytest.raises(ValueError, match=r"^store: bits must be 1, 2, 3, 4, 6 or 8, got 5$"):
        kernels.store(0, 0, 0, 1.0, 32, 1, 1, 5, 0, 0, 0, code["float32"], 0)
    with pytest.raises(ValueError, match=r"^stored_step: the companion must be float64 or float32, got bfloat16$"):
        kernels.stored_step(0, 0, 0, 0, 32, 1, 1, 4, 0, code["bfloat16"], 0)


@pytest.fixture
def library():
    if not build_info().compiled:
        pytest.fail(f"there is a GPU, and no library to test on it: {build_info().reason}")
    return CompiledKernels(require("tests"), torch._C._cuda_getCurrentRawStream)


@pytest.mark.gpu
@pytest.mark.parametrize("bits", stored.BITS)
def test_on_a_gpu(library, bits):
    for case in EVERY_PAIR + EVERY_SHAPE:
        if case.bits == bits:
            values = operands(case)
            check(values, by_kernel(library, values, "cuda"))


@pytest.mark.gpu
@pytest.mark.parametrize("bits", stored.BITS)
def test_every_scale_on_a_gpu(library, bits):
    for dtype in WIDE:
        cases = [at_every_scale(dtype, bits), *(not_finite(value, bits, dtype) for value in (math.nan, math.inf))]
        for values in (*cases, *([halves(dtype, bits)] if bits > 2 else [])):
            check(values, by_kernel(library, values, "cuda"))


@pytest.mark.gpu
@pytest.mark.parametrize("op", OPS)
def test_misaligned_operands_on_a_gpu(library, op):
    for shape in ((3, 64), (2, 70)):
        values = operands(StoringCase(op, 3, (torch.float32, torch.bfloat16), shape, stages=2))
        check(values, by_kernel(library, values, "cuda", offset=1))


@pytest.mark.gpu
def test_the_ops_launch_them(library):
    values = operands(StoringCase("store_step", 3, (torch.float32, torch.bfloat16), (2, 3, 64)))
    there = [value.cuda() if torch.is_tensor(value) else value for value in values]
    with ops.using("cuda"):
        check(values, [result.cpu() for result in ops.store_step(*there)])
