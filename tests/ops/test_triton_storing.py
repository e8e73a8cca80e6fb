"""Triton's kernels of stored increments: in the interpreter, compiled for GPUs that are not there, and on one."""

import importlib.util
import json
import math
import re

import pytest
import torch

from resode_cuda import ops, stored
from resode_cuda.ops import triton as triton_ops
from tests.support.interpreted import assert_passes
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

HAS_TRITON = importlib.util.find_spec("triton") is not None
pytestmark = [
    pytest.mark.usefixtures("triton_cache"),
    pytest.mark.skipif(not HAS_TRITON, reason="Triton is not installed"),
]
if HAS_TRITON:
    from tests.support.storing_compiled import (
        BUDGET,
        SHORT,
        TESTED_STORING,
        WHOLE,
        WIDE,
        StoringConfiguration,
        compiled,
    )
    from tests.support.triton_compiled import resources
else:
    TESTED_STORING = []


def test_in_the_interpreter():
    assert_passes("tests/ops/interpreted_storing.py")


@pytest.mark.parametrize("configuration", TESTED_STORING, ids=str)
def test_compiles_within_its_budget(configuration):
    used = resources(compiled(configuration))
    assert used["local"] == 0, "registers are spilled"
    budget = json.loads(BUDGET.read_text())[str(configuration)]
    assert {name: used[name] for name in budget if used[name] > budget[name]} == {}, (
        f"above the budget {budget}; if it must be, run python -m tests.support.storing_compiled"
    )


def test_the_budget_is_of_what_is_tested():
    assert list(json.loads(BUDGET.read_text())) == list(map(str, TESTED_STORING))


@pytest.mark.parametrize("bits", stored.BITS)
@pytest.mark.parametrize(("op", "read", "written"), [("store", 2, 1), ("store_step", 4, 2), ("stored_step", 1, 1)])
def test_whole_groups_take_wide_accesses(op, read, written, bits):
    """A thread's 8 values of each state are two accesses of 16 bytes, and states are read and written once."""
    kernel = compiled(StoringConfiguration(StoringCase(op, bits, WIDE, WHOLE, stages=2)))
    loads, stores = (len(re.findall(rf"\b{kind}\.global\.v4\.b32", kernel.asm["ptx"])) for kind in ("ld", "st"))
    assert (loads, stores) == (2 * read, 2 * written)


@pytest.mark.parametrize("op", OPS)
def test_places_of_values_have_64_bits(op):
    for shape in (WHOLE, SHORT):
        ttir = compiled(StoringConfiguration(StoringCase(op, 4, WIDE, shape))).asm["ttir"]
        places = re.findall(r"tt\.addptr .*, tensor<\d+x\d+x(i\d+)>", ttir)
        assert places
        assert set(places) == {"i64"}


@pytest.mark.parametrize("bits", [1, 8])
def test_divisions_are_rounded_as_ieee_says(bits):
    ptx = compiled(StoringConfiguration(StoringCase("store", bits, WIDE, WHOLE))).asm["ptx"]
    assert re.findall(r"\bdiv\.rn\.f32\b", ptx)
    assert not re.findall(r"\bdiv\.(?:full|approx)|\brcp\.|\bfma\.|\b(?:add|sub|mul|div)[.\w]*\.ftz", ptx)


@pytest.mark.gpu
@pytest.mark.parametrize("bits", stored.BITS)
def test_on_a_gpu(bits):
    for case in EVERY_PAIR + EVERY_SHAPE:
        if case.bits == bits:
            values = operands(case)
            check(values, by_kernel(triton_ops, values, "cuda"))


@pytest.mark.gpu
@pytest.mark.parametrize("bits", stored.BITS)
def test_every_scale_on_a_gpu(bits):
    for dtype in (torch.float32, torch.float64):
        cases = [at_every_scale(dtype, bits), *(not_finite(value, bits, dtype) for value in (math.nan, math.inf))]
        for values in (*cases, *([halves(dtype, bits)] if bits > 2 else [])):
            check(values, by_kernel(triton_ops, values, "cuda"))


@pytest.mark.gpu
@pytest.mark.parametrize("op", OPS)
def test_misaligned_operands_on_a_gpu(op):
    for shape in ((3, 64), (2, 70)):
        values = operands(StoringCase(op, 3, (torch.float32, torch.bfloat16), shape, stages=2))
        check(values, by_kernel(triton_ops, values, "cuda", offset=1))


@pytest.mark.gpu
def test_the_ops_launch_them():
    values = operands(StoringCase("store_step", 3, (torch.float32, torch.bfloat16), (2, 3, 64)))
    there = [value.cuda() if torch.is_tensor(value) else value for value in values]
    with ops.using("triton"):
        check(values, [result.cpu() for result in ops.store_step(*there)])


@pytest.mark.gpu
def test_offsets_beyond_32_bits():
    n = 2**31 + 64
    if torch.cuda.mem_get_info()[0] < 12 * n:
        pytest.skip("needs 24 GiB of free GPU memory")
    x = torch.zeros(1, n, dtype=torch.float16, device="cuda")
    companion, unit = torch.zeros(1, n, device="cuda"), torch.full((1, n // 32), 2.0**-10, device="cuda")
    x[:, -9:] = 1.0
    with ops.using("triton"):
        moved, packed, scales = ops.store(x, companion, unit, 2)
        assert (moved[:, -9:] - 1.0).abs().max() < 0.1
        assert moved[:, :-9].count_nonzero() == 0
        assert scales.count_nonzero() == 1
        del x, companion
        assert ops.stored_step(moved, packed, scales, unit, 2).count_nonzero() == 0
