"""The CUDA kernels: their own source on the CPU against the reference, what nvcc makes of it, and the same on a GPU."""

import pytest
import torch

from resode_cuda.library import require
from resode_cuda.ops import build_info, reference
from resode_cuda.ops.cuda import CompiledKernels
from resode_cuda.ops.operands import ForwardStepOperands
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

THREADS = 256
"""Threads of a block. A grid has at most 6 blocks a multiprocessor, those of the reverse updates 3."""
ONE_PROCESSOR, LARGE_GPU = 0, 1
"""Devices of the host. Tests run on the one with a single multiprocessor unless they say otherwise."""
MIXED = (torch.float32, torch.bfloat16)
BARRIERS = [case for case in CASES if case.op.startswith("reverse")]


@pytest.fixture
def host(kernels):
    kernels.host_schedule(False, True)
    kernels.host_device(ONE_PROCESSOR)
    return CompiledKernels(kernels, lambda device: 0)


@pytest.mark.parametrize("pair", DTYPE_PAIRS, ids=pair_id)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_matches_the_reference(host, case, pair):
    values = operands(case, pair, (THREADS * 4 + 13,))
    check(case, values, by_kernel(host, case, values))


@pytest.mark.parametrize("n", [1, 3, 4, 8, 17, 2 * 6 * THREADS * 4 + 5])
@pytest.mark.parametrize(
    "case", [Case("forward_step"), Case("heun_step"), *BARRIERS[:1], BARRIERS[8], CASES[2]], ids=str
)
def test_sizes(host, case, n):
    """Below a pack, whole packs, a tail, and more than two strides of the grid."""
    for pair in (MIXED, (torch.float64, torch.float32)):
        values = operands(case, pair, (n,))
        check(case, values, by_kernel(host, case, values))


@pytest.mark.parametrize("pair", DTYPE_PAIRS, ids=pair_id)
@pytest.mark.parametrize("case", BARRIERS, ids=str)
def test_every_order_of_threads_gives_the_same(kernels, host, case, pair):
    values = operands(case, pair, (THREADS * 9 + 1,))
    for greedy in (False, True):
        kernels.host_schedule(greedy, True)
        check(case, values, by_kernel(host, case, values))


@pytest.mark.parametrize("first", [0, 1])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_misaligned_operands(host, case, first):
    """Accesses of 16 bytes, which the host refuses at other addresses, are not made."""
    values = operands(case, MIXED, (67,))
    order = [*values._fields, "out"]
    check(case, values, by_kernel(host, case, values, offset=lambda name: (first + order.index(name)) % 2))


@pytest.mark.parametrize("case", CASES, ids=str)
def test_one_misaligned_operand(host, case):
    values = operands(case, (torch.float32, torch.float32), (67,))
    for odd in [name for name, value in values._asdict().items() if torch.is_tensor(value) and name != "squares"]:
        check(case, values, by_kernel(host, case, values, offset=lambda name: int(name == odd)))  # noqa: B023


@pytest.mark.parametrize("case", CASES, ids=str)
def test_any_order_of_dimensions(host, case):
    values = operands(case, (torch.float32, torch.float32), (3, 5, 11))
    values = values._make(
        value.permute(2, 0, 1) if isinstance(value, torch.Tensor) and value.dim() == 3 else value for value in values
    )
    check(case, values, by_kernel(host, case, values))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("operand", ["x", "y", "d", "k1", "k2", "g", "v1", "v2"])
def test_what_is_not_finite_goes_through(host, operand, value):
    case = Case("reverse_extrapolate_")
    values = operands(case, (torch.float32, torch.float16), (5,))
    getattr(values, operand)[3] = value
    results, expected = by_kernel(host, case, values), by_reference(case, values)
    for name in ("x", "y", "d", "g"):
        assert torch.equal(results[name].nan_to_num(nan=9.0), expected[name].nan_to_num(nan=9.0)), name
    assert torch.equal(results["squares"].isfinite(), expected["squares"].isfinite())


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("op", ["reverse_update_", "reverse_extrapolate_"])
def test_squares_of_states_of_any_size(host, op, size):
    case = Case(op)
    for stream in (torch.float32, torch.float64, torch.bfloat16):
        values = of_size(size, operands(case, (stream, stream), (THREADS * 8 + 13,)))
        check(case, values, by_kernel(host, case, values))


def rounds_as_torch_does(backend, dtype, h, device="cpu"):
    patterns = torch.arange(-(2**15), 2**15).to(torch.int16).view(dtype)  # NaNs, infinities and subnormals too
    for f in (patterns[torch.randperm(2**16)], patterns.roll(1)):
        out = torch.empty_like(patterns, device=device)
        backend.forward_step(ForwardStepOperands(patterns.to(device), f.to(device), h), out)
        out, expected = out.cpu(), patterns.float().add(f.float(), alpha=h).to(dtype)
        assert torch.equal(out.isnan(), expected.isnan())
        numbers = ~expected.isnan()
        assert torch.equal(out[numbers].view(torch.int16), expected[numbers].view(torch.int16))


@pytest.mark.parametrize("h", [0.5, 0.37])  # 0.5 makes many sums that lie halfway between two 16-bit values
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_every_16_bit_value_is_rounded_as_torch_does(host, dtype, h):
    rounds_as_torch_does(host, dtype, h)


@pytest.fixture
def deterministic():
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("pair", [pair for pair in DTYPE_PAIRS if pair[0] == pair[1]], ids=pair_id)
@pytest.mark.parametrize("op", ["reverse_update_", "reverse_extrapolate_"])
def test_deterministic_squares(kernels, host, deterministic, op, pair):
    """The order of the blocks, which the greedy schedule reverses, has no say."""
    case, found = Case(op), []
    values = operands(case, pair, (THREADS * 40 + 3,))
    for greedy in (False, True):
        kernels.host_schedule(greedy, True)
        results = by_kernel(host, case, values)
        check(case, values, results)
        found.append(results["squares"])
    assert torch.equal(*found)


@pytest.mark.parametrize("op", ["reverse_update_", "reverse_extrapolate_"])
def test_deterministic_squares_of_more_blocks_than_a_block_has_threads(kernels, host, deterministic, op):
    kernels.host_device(LARGE_GPU)
    assert kernels.most_reverse_blocks() > THREADS
    case = Case(op)
    values = operands(case, (torch.float32, torch.float32), (kernels.most_reverse_blocks() * THREADS * 4,))
    check(case, values, by_kernel(host, case, values))


def test_an_unknown_dtype_is_refused(kernels):
    with pytest.raises(ValueError, match=r"^forward_step: a dtype must be one of dtype_codes, got 17"):
        kernels.forward_step(0, 0, 0.1, 0, 5, 17, 0, 0)


def test_a_wider_stage_is_refused(kernels):
    code = kernels.dtype_codes
    with pytest.raises(ValueError, match=r"^heun_step: what is added must .*, got float64 with x float32; convert it"):
        kernels.heun_step(0, 0, 0, 0.1, 0, 5, code["float32"], code["float64"], 0)


def test_nothing_to_do(kernels):
    code = kernels.dtype_codes["float32"]
    kernels.forward_step(0, 0, 0.1, 0, 0, code, code, 0)
    kernels.adjoint_update_(0, 0, 0, 1.0, 1.0, 0, code, 0)


def test_every_kernel_has_a_name_of_its_own(kernels):
    names = [kernel["name"] for kernel in kernels.kernel_attributes()]
    assert len(set(names)) == len(names) == 9 + 2 * 9 + 4 + 1 + 6 * (9 + 2) + 4 * 12


@pytest.mark.parametrize(
    ("n", "width", "address", "most", "packs", "blocks"),
    [
        (1, 4, 64, 99, 0, 1),
        (4, 4, 64, 99, 1, 1),
        (1027, 4, 64, 99, 256, 1),
        (1028, 4, 64, 99, 257, 2),
        (1028, 2, 64, 99, 128, 1),
        (1028, 8, 64, 99, 514, 3),
        (1028, 4, 68, 99, 0, 5),  # misaligned
        (10**9, 4, 64, 99, 250_000_000, 99),
        (2**33 + 1, 2, 64, 10**6, 2**30, 10**6),
        (2**33 + 1, 2, 72, 10**8, 0, 2**25 + 1),
    ],
)
def test_plan(kernels, n, width, address, most, packs, blocks):
    assert kernels.plan(n, width, [64, address], most) == (packs, blocks)


@pytest.fixture
def library():
    if not build_info().compiled:
        pytest.fail(f"there is a GPU, and no library to test on it: {build_info().reason}")
    return CompiledKernels(require("tests"), torch._C._cuda_getCurrentRawStream)


@pytest.mark.gpu
@pytest.mark.parametrize("case", CASES, ids=str)
def test_on_a_gpu(library, case):
    for pair in DTYPE_PAIRS:
        for n in (1, 2053, 300_001):
            values = operands(case, pair, (n,))
            check(case, values, by_kernel(library, case, values, "cuda"))


@pytest.mark.gpu
@pytest.mark.parametrize("case", CASES, ids=str)
def test_misaligned_operands_on_a_gpu(library, case):
    values = operands(case, MIXED, (2053,))
    order = [*values._fields, "out"]
    for offset in (lambda name: order.index(name) % 2, lambda name: 1):
        check(case, values, by_kernel(library, case, values, "cuda", offset))


@pytest.mark.gpu
@pytest.mark.parametrize("pair", DTYPE_PAIRS, ids=pair_id)
def test_deterministic_squares_on_a_gpu(library, deterministic, pair):
    case = Case("reverse_update_")
    values = operands(case, pair, (3_000_001,))
    first = by_kernel(library, case, values, "cuda")
    check(case, values, first)
    for _ in range(5):
        assert torch.equal(by_kernel(library, case, values, "cuda")["squares"], first["squares"])


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_every_16_bit_value_on_a_gpu(library, dtype):
    rounds_as_torch_does(library, dtype, 0.5, "cuda")


@pytest.mark.gpu
def test_runs_on_the_current_stream(library):
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        x, out = torch.ones(1 << 20, device="cuda"), torch.empty(1 << 20, device="cuda")
        torch.cuda._sleep(50_000_000)  # a kernel on another stream would read x before this fill
        x.fill_(2.0)
        library.forward_step(ForwardStepOperands(x, x, 0.5), out)
    torch.cuda.current_stream().wait_stream(stream)
    assert torch.equal(out, reference.forward_step(ForwardStepOperands(x, x, 0.5)))


@pytest.mark.gpu
def test_offsets_beyond_32_bits(library):
    n = 2**31 + 5
    if torch.cuda.mem_get_info()[0] < 10 * n:
        pytest.skip("needs 20 GiB of free GPU memory")
    x, y, f = (torch.zeros(n, dtype=torch.float16, device="cuda") for _ in range(3))
    x[-9:] = f[-9:] = 1.0
    library.forward_step(ForwardStepOperands(x, f, 1.0), y)
    assert torch.equal(y[-9:], torch.full_like(y[-9:], 2.0))
    assert y[:-9].count_nonzero() == 0


@pytest.mark.gpu
def test_attributes_on_a_gpu(library):
    for kernel in require("tests").kernel_attributes():
        assert kernel["registers"] > 0
        is_fused = kernel["name"].startswith("mlp_")
        assert kernel["local"] == 0 or (is_fused and kernel["name"].endswith("128>")), f"{kernel['name']} spills"
        assert kernel["blocks_per_processor"] >= (1 if is_fused else 3)
