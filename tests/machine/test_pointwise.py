"""The pointwise Triton kernels, and those of stored increments, executed by the PTX machine in every dtype.

make machine     every case, for Hopper and Ampere
"""

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed")

from resode_cuda import stored
from resode_cuda.ops import triton as triton_ops
from resode_cuda.ops.operands import ForwardStepOperands
from tests.support import kernel_cases, storing_cases
from tests.support.kernel_cases import CASES, DTYPE_PAIRS, Case, pair_id
from tests.support.ptx.launching import executing
from tests.support.storing_cases import EVERY_PAIR, EVERY_SHAPE, StoringCase

GPUS = (90, 80)
PROGRAMS = 3
BF16 = torch.bfloat16
TILE = max(triton_ops.VALUES_PER_TILE.values())


@pytest.fixture(autouse=True)
def _like_a_small_gpu(monkeypatch):
    monkeypatch.setattr(triton_ops, "most_programs", lambda device: PROGRAMS)


def check_steps(gpu, case, pair, n):
    values = kernel_cases.operands(case, pair, (n,))
    with executing(gpu):
        kernel_cases.check(case, values, kernel_cases.by_kernel(triton_ops, case, values))


def check_storing(gpu, case):
    values = storing_cases.operands(case)
    with executing(gpu):
        storing_cases.check(values, storing_cases.by_kernel(triton_ops, values))


@pytest.mark.parametrize("case", [Case("heun_step"), Case("reverse_extrapolate_"), Case("adjoint_update_")], ids=str)
def test_steps(case):
    pairs = [(BF16, BF16)] if case.op == "adjoint_update_" else [(BF16, BF16), (torch.float32, BF16)]
    for pair in pairs:
        check_steps(90, case, pair, TILE + 5)


def test_deterministic_squares():
    torch.use_deterministic_algorithms(True)
    try:
        check_steps(90, Case("reverse_update_"), (torch.float32, BF16), 3 * TILE + 5)
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize(
    "case",
    [
        StoringCase("store_step", 3, (BF16, BF16), stages=2),
        StoringCase("store", 4, (BF16, BF16)),
        StoringCase("stored_step", 6),
    ],
    ids=str,
)
def test_increments(case):
    check_storing(90, case)


@pytest.mark.machine
@pytest.mark.parametrize("gpu", GPUS)
@pytest.mark.parametrize("pair", DTYPE_PAIRS, ids=pair_id)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_every_step(case, pair, gpu):
    if case.op == "adjoint_update_" and pair[0] != pair[1]:
        pytest.skip("it has one dtype")
    for n in (1, TILE + 5):
        check_steps(gpu, case, pair, n)


@pytest.mark.machine
@pytest.mark.parametrize("gpu", GPUS)
@pytest.mark.parametrize("case", [*EVERY_PAIR, *EVERY_SHAPE], ids=str)
def test_every_increment(case, gpu):
    check_storing(gpu, case)


@pytest.mark.machine
@pytest.mark.parametrize("bits", stored.BITS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_every_scale(dtype, bits):
    values = storing_cases.at_every_scale(dtype, bits)
    with executing(90):
        storing_cases.check(values, storing_cases.by_kernel(triton_ops, values))


@pytest.mark.parametrize("dtype", [pytest.param(torch.float16, marks=pytest.mark.machine), BF16])
def test_every_16_bit_value_is_rounded_as_torch_does(dtype):
    patterns = torch.arange(-(2**15), 2**15).to(torch.int16).view(dtype)  # NaNs, infinities and subnormals too
    f = patterns[torch.randperm(2**16)]
    out = torch.empty_like(patterns)
    with executing(90):
        triton_ops.forward_step(ForwardStepOperands(patterns, f, 0.5), out)
    expected = patterns.float().add(f.float(), alpha=0.5).to(dtype)
    numbers = ~expected.isnan()
    assert torch.equal(out.isnan(), ~numbers)
    assert torch.equal(out[numbers].view(torch.int16), expected[numbers].view(torch.int16))
