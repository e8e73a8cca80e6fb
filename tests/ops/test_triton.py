"""The Triton backend of the ops: in Triton's interpreter, compiled for GPUs that are not there, and on one that is."""

import importlib.util
import json
import re
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import torch

from resode_cuda.ops import reference
from resode_cuda.ops import triton as triton_ops
from resode_cuda.ops.operands import ForwardStepOperands, HeunStepOperands, ReverseUpdateOperands
from tests.support.interpreted import assert_passes
from tests.support.kernel_cases import CASES, DTYPE_PAIRS, SCALARS, Case, by_kernel, check, operands, pair_id

HAS_TRITON = importlib.util.find_spec("triton") is not None
needs_triton = pytest.mark.skipif(not HAS_TRITON, reason="Triton is not installed")
if HAS_TRITON:
    from tests.support import triton_compiled
    from tests.support.triton_compiled import TESTED, Configuration, compiled
else:
    TESTED = []

TILE = max(triton_ops.VALUES_PER_TILE.values())
FLOAT32, FLOAT64 = (torch.float32, torch.float32), (torch.float64, torch.float64)


pytestmark = pytest.mark.usefixtures("triton_cache")


@needs_triton
def test_in_the_interpreter():
    assert_passes("tests/ops/interpreted.py")


def wide_accesses(kernel, kind):
    """How many accesses of 16 bytes a thread makes in a tile that needs no mask."""
    return len(re.findall(rf"\b{kind}\.global\.(?:v4\.b32|v2\.b64)\b", kernel.asm["ptx"]))


@needs_triton
@pytest.mark.parametrize("configuration", TESTED, ids=str)
def test_compiles_within_its_budget(configuration):
    used = triton_compiled.most_resources(configuration)
    assert used["local"] == 0, "registers are spilled"
    budget = json.loads(triton_compiled.BUDGET.read_text())[str(configuration)]
    assert {name: used[name] for name in budget if used[name] > budget[name]} == {}, (
        f"above the budget {budget}; if it must be, run python -m tests.support.triton_compiled"
    )

    kernel, *_ = compiled(configuration)
    values = operands(configuration.case, configuration.pair, (1,))
    stream, stage = configuration.pair
    bytes_of_a_thread = triton_ops.VALUES_PER_TILE[stream] * stream.itemsize // 128
    states = [name for name, value in values._asdict().items() if torch.is_tensor(value) and name != "squares"]
    # Values of a narrower stage take accesses of less: as many values as fill 16 bytes of the stream.
    read = [name for name in states if stage == stream or name not in ("f", "k1", "k2")]
    written = [name for name in configuration.case.written if name != "squares"]
    assert wide_accesses(kernel, "ld") == len(read) * bytes_of_a_thread // 16
    assert wide_accesses(kernel, "st") == len(written) * bytes_of_a_thread // 16


@needs_triton
def test_the_budget_is_of_what_is_tested():
    assert list(json.loads(triton_compiled.BUDGET.read_text())) == list(map(str, TESTED))


@needs_triton
def test_an_odd_size_takes_wide_accesses_too():
    for case in (Case("forward_step"), Case("reverse_extrapolate_")):
        even, odd = (compiled(Configuration(case, FLOAT32), n)[0] for n in (4096, 4097))
        assert odd.hash == even.hash
        assert wide_accesses(odd, "ld") > 0


@needs_triton
def test_misaligned_tensors_take_no_wide_accesses():
    (kernel,) = compiled(Configuration(Case("forward_step"), FLOAT32), offset=1)
    assert wide_accesses(kernel, "ld") == wide_accesses(kernel, "st") == 0


@needs_triton
@pytest.mark.parametrize("case", [Case("forward_step"), Case("reverse_extrapolate_")], ids=str)
def test_no_value_of_a_scalar_or_size_compiles_a_kernel_of_its_own(case):
    used = [name for name in operands(case, FLOAT32, (1,))._fields if name in SCALARS]
    kernels = [
        compiled(Configuration(case, FLOAT32), n, **dict.fromkeys(used, scalar))[0]
        for n, scalar in ((4096, 0.1), (4096, 0.0), (17, 1.0), (1, 1e300))
    ]
    assert len({kernel.hash for kernel in kernels}) == 1


@needs_triton
def test_what_was_compiled_is_launched_again_for_the_same_dtypes_and_alignment(monkeypatch):
    compilations, launches = [], []

    class Compiled:
        def __getitem__(self, grid):
            return lambda *arguments: launches.append((grid, arguments))

    def run(self, *arguments, grid, warmup, **options):
        compilations.append((grid, arguments))
        return Compiled()

    monkeypatch.setattr("triton.runtime.jit.JITFunction.run", run)
    monkeypatch.setattr(triton_ops, "_compiled", {})
    x = torch.zeros(4101)
    for values, h in ((x[:4096], 0.1), (x[:4096], 0.2), (x[4:], 0.3), (x[1:], 0.4), (x[1:], 0.5)):
        triton_ops.forward_step(ForwardStepOperands(values, values, h), values)
    triton_ops.forward_step(ForwardStepOperands(x[:8], x[:8].half(), 0.6), x[:8])
    triton_ops.heun_step(HeunStepOperands(x[:8], x[:8], x[:8], 0.8), x[:8])
    assert [arguments[4] for _, arguments in compilations] == [0.1, 0.4, 0.6, 0.4]
    assert [(grid, arguments[4:]) for grid, arguments in launches] == [
        ((4, 1, 1), (0.2, 4096, 1024)),
        ((5, 1, 1), (0.3, 4097, 1024)),
        ((5, 1, 1), (0.5, 4100, 1024)),
    ]


@needs_triton
@pytest.mark.parametrize("pair", [FLOAT32, FLOAT64], ids=pair_id)
def test_a_step_is_one_fused_multiply_add_by_a_float64_scalar(pair):
    (kernel,) = compiled(Configuration(Case("forward_step"), pair))
    ptx = kernel.asm["ptx"]
    per_thread = triton_ops.VALUES_PER_TILE[pair[0]] // 128
    kind = "f32" if pair == FLOAT32 else "f64"
    assert len(re.findall(rf"\bfma\.rn\.{kind}\b", ptx)) == 2 * per_thread  # with a mask and without
    assert not re.findall(r"\b(?:add|sub|mul|mad)\.(?:\w+\.)*f(?:32|64)\b", ptx)
    assert bool(re.findall(r"\bcvt\.rn\.f32\.f64\b", ptx)) == (pair == FLOAT32)
    assert not re.findall(r"\bcvt\.f64\.f32\b", ptx)


@needs_triton
@pytest.mark.parametrize("case", [Case("forward_step"), Case("adjoint_update_"), Case("reverse_update_")], ids=str)
def test_addresses_of_tiles_have_64_bits(case):
    (kernel,) = compiled(Configuration(case, FLOAT32))
    ttir = kernel.asm["ttir"]
    assert re.search(r"arith\.extsi %\w+ : i32 to i64", ttir)
    assert re.search(r"arith\.muli %\w+, %\w+ : i64", ttir)
    assert not re.search(r"arith\.muli .* : i32", ttir)


@needs_triton
def test_a_deterministic_step_is_two_launches_without_atomics():
    configuration = Configuration(Case("reverse_update_"), FLOAT32, deterministic=True)
    for kernels, launches in (
        (compiled(configuration), 2),
        (compiled(Configuration(Case("reverse_update_"), FLOAT32)), 1),
    ):
        assert len(kernels) == launches
        atomics = [len(re.findall(r"\b(?:atom|red)\.", kernel.asm["ptx"])) for kernel in kernels]
        assert atomics == ([0, 0] if launches == 2 else [2])


CUDA = torch.device("cuda:0")


def load_alone():
    """The backend's module, loaded anew."""
    spec = importlib.util.find_spec(triton_ops.__name__)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_without_triton_the_module_loads_and_says_so(monkeypatch):
    monkeypatch.setitem(sys.modules, "triton", None)
    assert re.match(r"Triton can't be used here: .*triton", load_alone().reason(CUDA))


@needs_triton
def test_without_a_gpu_it_says_so():
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    assert load_alone().reason(CUDA).startswith("Triton can't be used here: ")


class OneGoodDevice:
    """Stands for torch.cuda and for Triton's driver on a machine whose device 1 alone Triton can use."""

    current = 0

    @contextmanager
    def device(self, index):
        before, self.current = self.current, index
        try:
            yield
        finally:
            self.current = before

    def get_current_target(self):
        if self.current != 1:
            raise RuntimeError(f"not on device {self.current}")


def test_why_it_cannot_be_used_is_asked_of_each_device(monkeypatch):
    machine = OneGoodDevice()
    driver = SimpleNamespace(active=machine)
    monkeypatch.setitem(sys.modules, "triton", SimpleNamespace(runtime=SimpleNamespace(driver=driver)))
    monkeypatch.setattr(torch.cuda, "device", machine.device)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: machine.current)
    module = load_alone()
    for index in (0, 1, 2, 1):
        found = module.reason(torch.device("cuda", index))
        assert found == (None if index == 1 else f"Triton can't be used here: RuntimeError: not on device {index}")
    assert module.reason(torch.device("cuda")).endswith("not on device 0")
    machine.current = 1
    assert module.reason(torch.device("cuda")) is None


@needs_triton
def test_threads_compile_a_kernel_once_and_one_after_the_other(monkeypatch):
    compiling, compilations, launches = [], [], []

    class Compiled:
        def __getitem__(self, grid):
            return lambda *arguments: launches.append(grid)

    def run(self, *arguments, grid, warmup, **options):
        compiling.append(self)
        most = len(compiling)
        time.sleep(0.02)
        compilations.append((self, most, len(compiling)))
        compiling.pop()
        return Compiled()

    monkeypatch.setattr("triton.runtime.jit.JITFunction.run", run)
    monkeypatch.setattr(triton_ops, "_compiled", {})
    x = torch.zeros(8)
    ready = threading.Barrier(4)

    def step(is_heun):
        ready.wait()
        if is_heun:
            triton_ops.heun_step(HeunStepOperands(x, x, x, 0.1), x)
        else:
            triton_ops.forward_step(ForwardStepOperands(x, x, 0.1), x)

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(step, (False, True, False, True)))
    assert [seen[1:] for seen in compilations] == [(1, 1), (1, 1)]
    assert launches == [(1, 1, 1)] * 2


@pytest.mark.gpu
@needs_triton
def test_with_a_gpu_it_can_be_used():
    assert triton_ops.reason(CUDA) is None


@pytest.fixture
def deterministic():
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.gpu
@needs_triton
@pytest.mark.parametrize("case", CASES, ids=str)
def test_on_a_gpu(case):
    for pair in DTYPE_PAIRS:
        for n in (1, TILE + 5):
            values = operands(case, pair, (n,))
            check(case, values, by_kernel(triton_ops, case, values, "cuda"))


@pytest.mark.gpu
@needs_triton
@pytest.mark.parametrize("op", ["forward_step", "heun_step", "reverse_extrapolate_", "adjoint_update_"])
def test_misaligned_operands_on_a_gpu(op):
    case = Case(op)
    values = operands(case, (torch.float32, torch.bfloat16), (TILE + 3,))
    order = [*values._fields, "out"]
    for offset in (lambda name: order.index(name) % 2, lambda name: 1):
        check(case, values, by_kernel(triton_ops, case, values, "cuda", offset))


@pytest.mark.gpu
@needs_triton
@pytest.mark.parametrize("pair", DTYPE_PAIRS, ids=pair_id)
def test_several_tiles_a_program_on_a_gpu(pair):
    case = Case("reverse_extrapolate_")
    programs = triton_ops.most_programs(torch.device("cuda", torch.cuda.current_device()))
    values = operands(case, pair, ((2 * programs + 1) * TILE + 5,))
    check(case, values, by_kernel(triton_ops, case, values, "cuda"))


@pytest.mark.gpu
@needs_triton
@pytest.mark.parametrize("pair", DTYPE_PAIRS, ids=pair_id)
def test_deterministic_squares_on_a_gpu(deterministic, pair):
    case = Case("reverse_update_")
    values = operands(case, pair, (3_000_001,))
    first = by_kernel(triton_ops, case, values, "cuda")
    check(case, values, first)
    for _ in range(5):
        assert torch.equal(by_kernel(triton_ops, case, values, "cuda")["squares"], first["squares"])


@pytest.mark.gpu
@needs_triton
def test_every_16_bit_value_is_rounded_as_torch_does():
    for dtype in (torch.float16, torch.bfloat16):
        patterns = torch.arange(-(2**15), 2**15).to(torch.int16).view(dtype)  # NaNs, infinities and subnormals too
        for f in (patterns[torch.randperm(2**16)], patterns.roll(1)):
            out = torch.empty_like(patterns, device="cuda")
            triton_ops.forward_step(ForwardStepOperands(patterns.cuda(), f.cuda(), 0.5), out)
            expected = patterns.float().add(f.float(), alpha=0.5).to(dtype)
            numbers = ~expected.isnan()
            assert torch.equal(out.cpu().isnan(), ~numbers)
            assert torch.equal(out.cpu()[numbers].view(torch.int16), expected[numbers].view(torch.int16))


@pytest.mark.gpu
@needs_triton
def test_runs_on_the_current_stream():
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        x, out = torch.ones(1 << 20, device="cuda"), torch.empty(1 << 20, device="cuda")
        triton_ops.forward_step(ForwardStepOperands(x, x, 0.5), out)  # compiled before the race
        torch.cuda._sleep(50_000_000)  # a kernel on another stream would read x before this fill
        x.fill_(2.0)
        triton_ops.forward_step(ForwardStepOperands(x, x, 0.5), out)
    torch.cuda.current_stream().wait_stream(stream)
    assert torch.equal(out, reference.forward_step(ForwardStepOperands(x, x, 0.5)))


@pytest.mark.gpu
@needs_triton
def test_offsets_beyond_32_bits():
    n = 2**31 + 5
    if torch.cuda.mem_get_info()[0] < 10 * n:
        pytest.skip("needs 20 GiB of free GPU memory")
    x, y, f = (torch.zeros(n, dtype=torch.float16, device="cuda") for _ in range(3))
    x[-9:] = f[-9:] = 1.0
    triton_ops.forward_step(ForwardStepOperands(x, f, 1.0), y)
    assert torch.equal(y[-9:], torch.full_like(y[-9:], 2.0))
    assert y[:-9].count_nonzero() == 0
    squares = torch.zeros(2, device="cuda", dtype=torch.float64)
    triton_ops.reverse_update_(ReverseUpdateOperands(x, y, f, None, -1.0, squares, None, None, None, 1.0, 1.0))
    assert torch.equal(x[-9:], y[-9:])
    assert x[:-9].count_nonzero() == 0
    assert squares.tolist() == [0.0, 36.0]
