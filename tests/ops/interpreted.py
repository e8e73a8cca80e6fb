"""The Triton kernels in Triton's interpreter, on the CPU: `test_triton.py` runs this file in a process of its own.

    TRITON_INTERPRET=1 python -m pytest tests/ops/interpreted.py

Triton reads the variable when it compiles a kernel's decorator. bfloat16 is left out: the interpreter truncates where a
GPU rounds. Its fused multiply-add rounds twice; here it is replaced by the C library's.
"""

import math
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import triton

from resode_cuda.ops import triton as triton_ops
from resode_cuda.ops import triton_kernels
from resode_cuda.ops.operands import ForwardStepOperands
from tests.support.fused_multiply_add import replace_fused_multiply_add
from tests.support.kernel_cases import (
    CASES,
    DTYPE_PAIRS,
    SIZES,
    Case,
    by_kernel,
    by_reference,
    check,
    of_size,
    operands,
    pair_id,
)

assert triton.knobs.runtime.interpret, "run this file with TRITON_INTERPRET=1"
pytestmark = [
    # numpy warns of what floating point does: NaN, infinity, and values too large for a dtype;
    pytest.mark.filterwarnings("ignore:(invalid value|overflow) encountered:RuntimeWarning"),
    # and of how the interpreter takes a scalar out of an array.
    pytest.mark.filterwarnings("ignore:Conversion of an array with ndim > 0:DeprecationWarning"),
]

PAIRS = [pair for pair in DTYPE_PAIRS if torch.bfloat16 not in pair]
PROGRAMS, TILE = 3, 64
"""Small, for speed: what a GPU takes is compiled in `test_triton.py`."""


@pytest.fixture(autouse=True)
def _like_a_small_gpu(monkeypatch):
    replace_fused_multiply_add(monkeypatch)
    monkeypatch.setattr(triton_ops, "most_programs", lambda device: PROGRAMS)
    monkeypatch.setattr(triton_ops, "VALUES_PER_TILE", dict.fromkeys(triton_ops.VALUES_PER_TILE, TILE))


MANY = (2 * PROGRAMS + 1) * TILE + 5
"""Up to three tiles a program, with a masked one at the end."""


@pytest.mark.parametrize("pair", PAIRS, ids=pair_id)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_matches_the_reference(case, pair):
    values = operands(case, pair, (MANY,))
    check(case, values, by_kernel(triton_ops, case, values))


@pytest.mark.parametrize("n", [1, TILE - 1, TILE, PROGRAMS * TILE])
@pytest.mark.parametrize("case", CASES[:2] + CASES[-1:], ids=str)
def test_sizes(case, n):
    values = operands(case, (torch.float32, torch.float16), (n,))
    check(case, values, by_kernel(triton_ops, case, values))


@pytest.mark.parametrize("first", [0, 1])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_misaligned_operands(case, first):
    values = operands(case, (torch.float32, torch.float16), (TILE + 3,))
    order = [*values._fields, "out"]
    check(case, values, by_kernel(triton_ops, case, values, offset=lambda name: (first + order.index(name)) % 2))


@pytest.mark.parametrize("case", CASES, ids=str)
def test_any_order_of_dimensions(case):
    values = operands(case, (torch.float32, torch.float32), (3, 5, 11))
    values = values._make(
        value.permute(2, 0, 1) if isinstance(value, torch.Tensor) and value.dim() == 3 else value for value in values
    )
    results = by_kernel(triton_ops, case, values)
    check(case, values, results)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize(
    ("op", "operand"),
    [
        *(("forward_step", operand) for operand in ("x", "f")),
        *(("heun_step", operand) for operand in ("x", "k1", "k2")),
        *(("reverse_extrapolate_", operand) for operand in ("x", "y", "d", "k1", "k2", "g", "v1", "v2")),
    ],
)
def test_what_is_not_finite_goes_through(op, operand, value):
    case = Case(op)
    values = operands(case, (torch.float32, torch.float16), (5,))
    getattr(values, operand)[3] = value
    results, expected = by_kernel(triton_ops, case, values), by_reference(case, values)
    for name in set(results) - {"squares"}:
        assert torch.equal(results[name].nan_to_num(nan=9.0), expected[name].nan_to_num(nan=9.0)), name
    if "squares" in results:
        assert torch.equal(results["squares"].isfinite(), expected["squares"].isfinite())


@pytest.mark.parametrize("h", [0.5, 0.37])  # 0.5 makes many sums that lie halfway between two 16-bit values
def test_every_16_bit_value_is_rounded_as_torch_does(monkeypatch, h):
    monkeypatch.setitem(triton_ops.VALUES_PER_TILE, torch.float16, 2**16)
    patterns = torch.arange(-(2**15), 2**15).to(torch.int16).view(torch.float16)  # NaNs, infinities and subnormals too
    shuffled = patterns[torch.randperm(2**16, generator=torch.Generator().manual_seed(0))]
    for f in (shuffled, patterns.roll(1)):
        out = torch.empty_like(patterns)
        triton_ops.forward_step(ForwardStepOperands(patterns, f, h), out)
        expected = patterns.float().add(f.float(), alpha=h).half()
        assert torch.equal(out.isnan(), expected.isnan())
        numbers = ~expected.isnan()
        assert torch.equal(out[numbers].view(torch.int16), expected[numbers].view(torch.int16))


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("op", ["reverse_update_", "reverse_extrapolate_"])
def test_squares_of_states_of_any_size(op, size):
    case = Case(op)
    for stream in (torch.float32, torch.float64):
        values = of_size(size, operands(case, (stream, stream), (MANY,)))
        check(case, values, by_kernel(triton_ops, case, values))


@pytest.fixture
def deterministic():
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("pair", [pair for pair in PAIRS if pair[0] == pair[1]], ids=pair_id)
@pytest.mark.parametrize("op", ["reverse_update_", "reverse_extrapolate_"])
def test_deterministic_squares(deterministic, op, pair):
    case = Case(op)
    values = operands(case, pair, (MANY,))
    results = by_kernel(triton_ops, case, values)
    check(case, values, results)
    assert torch.equal(results["squares"], by_kernel(triton_ops, case, values)["squares"])


@pytest.mark.parametrize("count", [1, 1023, 1024, 2500])  # 1024 are added at a time
def test_partial_squares_are_all_added(count):
    partial_squares = torch.arange(2 * count, dtype=torch.float64).view(2, count)
    squares = torch.tensor([0.5, 0.25], dtype=torch.float64)
    expected = squares + partial_squares.sum(1)
    launch = triton_kernels.add_partial_squares_kernel[(2,)]
    launch(partial_squares, squares, count, triton_ops.PARTIAL_SQUARES_AT_A_TIME)
    assert torch.equal(squares, expected)


def test_threads_may_launch_at_once():
    case = Case("reverse_extrapolate_")
    operands_of = [operands(case, (torch.float32, torch.float16), (MANY + n,)) for n in range(4)]
    ready = threading.Barrier(len(operands_of))

    def launched(values):
        ready.wait()
        return by_kernel(triton_ops, case, values)

    with ThreadPoolExecutor(len(operands_of)) as pool:
        for values, results in zip(operands_of, pool.map(launched, operands_of), strict=True):
            check(case, values, results)
