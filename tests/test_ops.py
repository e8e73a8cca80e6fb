"""torch.ops.resode against its specification, by each backend: the reference, the CUDA source on the host, a GPU."""

import importlib.util
import itertools
import math
import os
import shutil
import subprocess
import sys
import sysconfig
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from filelock import FileLock

from resode_cuda import ops
from resode_cuda.ops import compiled, reference

ROOT = Path(__file__).parents[1]
OP = torch.ops.resode.forward_step
H = 0.1  # not representable, so that each rounding shows

STREAMS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
DTYPE_PAIRS = [(x, f) for x, f in itertools.product(STREAMS, STREAMS) if x == f or x.itemsize > f.itemsize]
SHAPES = [(), (0,), (1,), (3, 0, 5), (7,), (8,), (9,), (5, 51), (64, 33), (2049,)]


def pair_id(value):
    return str(value).removeprefix("torch.")


def random(shape, dtype, seed, device="cpu"):
    """Normal values, the same on every device."""
    values = torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    return values.to(dtype).to(device)


def fp32_arithmetic(x, f, h):
    """What a kernel computes for a 16-bit stream: product and sum rounded to float32, the result to 16 bits."""
    return (x.float() + h * f.float()).to(x.dtype)


@dataclass(frozen=True)
class Backend:
    device: str
    is_kernel: bool
    step: Callable[[torch.Tensor, torch.Tensor, float], torch.Tensor]


@pytest.fixture(scope="session")
def host_kernels(tmp_path_factory):
    """The pybind11 module with csrc/ compiled for the host; it reads and writes CPU memory."""
    path = os.pathsep.join([os.environ["PATH"], sysconfig.get_path("scripts")])  # an environment need not be activated
    for what, names in {"cmake": ["cmake"], "ninja": ["ninja"], "a C++ compiler": ["c++", "g++", "clang++"]}.items():
        if not any(shutil.which(name, path=path) for name in names):
            pytest.skip(f"the host build needs {what}")
    pybind11 = pytest.importorskip("pybind11")
    # Workers of pytest-xdist share one build: the first makes it, the others find nothing left to do.
    shared = tmp_path_factory.getbasetemp()
    build = (shared.parent if "PYTEST_XDIST_WORKER" in os.environ else shared) / "host_kernels"
    configure = ["cmake", "-G", "Ninja", "-S", ROOT, "-B", build, "-DRESODE_HOST=ON"]
    configure += [f"-DPython_EXECUTABLE={sys.executable}", f"-Dpybind11_DIR={pybind11.get_cmake_dir()}"]
    with FileLock(f"{build}.lock"):
        for command in (configure, ["cmake", "--build", build]):
            done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "PATH": path})
            assert done.returncode == 0, done.stdout + done.stderr
    spec = importlib.util.spec_from_file_location("_kernels", next(build.glob("_kernels.*")))
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


KERNELS = ["host", pytest.param("gpu", marks=pytest.mark.gpu)]


@pytest.fixture(params=["reference", *KERNELS])
def backend(request):
    if request.param == "reference":
        return Backend("cpu", False, OP)
    if request.param == "host":
        kernels = request.getfixturevalue("host_kernels")
        return Backend("cpu", True, lambda x, f, h: compiled.forward_step(kernels, x, f, h, stream=0))
    if not ops.build_info().compiled:
        pytest.skip(ops.build_info().cause)
    return Backend("cuda", True, OP)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtypes", DTYPE_PAIRS, ids=lambda pair: "-".join(map(pair_id, pair)))
def test_matches_the_float64_reference(backend, dtypes, shape):
    x, f = random(shape, dtypes[0], 1, backend.device), random(shape, dtypes[1], 2, backend.device)
    out = backend.step(x, f, H)
    exact = reference.forward_step(x.double(), f.double(), H)
    own = reference.forward_step(x, f, H)
    assert (out.shape, out.dtype, out.device) == (x.shape, x.dtype, x.device)
    if x.numel() == 0:
        return
    band = torch.finfo(x.dtype).eps * exact.abs().max()
    budget = 2 * ((own - exact).abs().max() + band)
    assert (out - exact).abs().max() <= budget
    if x.dtype.itemsize >= 4:
        assert torch.equal(out, own)
    elif backend.is_kernel:
        assert torch.equal(out, fp32_arithmetic(x, f, H))


@pytest.mark.parametrize("backend", KERNELS, indirect=True)
@pytest.mark.parametrize("h", [0.5, 0.37])  # 0.5 makes many sums that lie halfway between two 16-bit values
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=pair_id)
def test_kernel_rounds_every_16_bit_value_as_torch_does(backend, dtype, h):
    patterns = torch.arange(-(2**15), 2**15).to(torch.int16).view(dtype)  # NaNs, infinities and subnormals too
    shuffled = patterns[torch.randperm(2**16, generator=torch.Generator().manual_seed(0))]
    neighbours = patterns.roll(1)
    for f in (torch.full_like(patterns, -0.0), shuffled, neighbours):
        expected = fp32_arithmetic(patterns, f, h)
        out = backend.step(patterns.to(backend.device), f.to(backend.device), h).cpu()
        assert torch.equal(out.isnan(), expected.isnan())
        numbers = ~expected.isnan()
        assert torch.equal(out[numbers].view(torch.int16), expected[numbers].view(torch.int16))


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_goes_through(backend, value):
    x, f = torch.tensor([1.0, value], device=backend.device), torch.tensor([value, 1.0], device=backend.device)
    torch.testing.assert_close(backend.step(x, f, H), torch.full_like(x, value), equal_nan=True)


SQUARE = (12, 12)
LAYOUTS = {
    "both transposed": (torch.t, torch.t),
    "x transposed": (torch.t, torch.Tensor.clone),
    "f transposed": (torch.Tensor.clone, torch.t),
    "every second column": (lambda t: t[:, ::2], lambda t: t[:, ::2]),
    "x strided": (lambda t: t[:, ::2], lambda t: t[:, :6].contiguous()),
    "offset by one value": (lambda t: t.flatten()[1:134], lambda t: t.flatten()[1:134]),
    "f offset by one value": (lambda t: t.flatten()[:133], lambda t: t.flatten()[1:134]),
    "x expanded": (lambda t: t[:1].expand(SQUARE), torch.t),
    "channels last": (lambda t: t.view(1, 3, 4, 12).contiguous(memory_format=torch.channels_last),) * 2,
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("f_dtype", [torch.float32, torch.bfloat16], ids=pair_id)
def test_layouts(backend, layout, f_dtype):
    of_x, of_f = LAYOUTS[layout]
    x = of_x(random(SQUARE, torch.float32, 1, backend.device))
    f = of_f(random(SQUARE, f_dtype, 2, backend.device))
    out = backend.step(x, f, H)
    assert torch.equal(out, reference.forward_step(x, f, H))
    assert out.stride() == torch.empty_like(x).stride()


def test_dense_tensors_of_one_layout_are_not_copied(host_kernels):
    seen = []

    class Spy:
        dtype_codes = host_kernels.dtype_codes

        def forward_step(self, x, f, *rest):
            seen.append((x, f))

    x, f = random(SQUARE, torch.float32, 1).t(), random(SQUARE, torch.float16, 2).t()
    compiled.forward_step(Spy(), x, f, H, stream=0)
    assert seen == [(x.data_ptr(), f.data_ptr())]


@pytest.mark.parametrize("offsets", list(itertools.product((0, 1), repeat=3)), ids=str)
@pytest.mark.parametrize("n", [1, 7, 8, 31, 2048 + 5])
@pytest.mark.parametrize("dtypes", DTYPE_PAIRS, ids=lambda pair: "-".join(map(pair_id, pair)))
def test_kernel_writes_every_value_and_nothing_else(host_kernels, dtypes, n, offsets):
    """Arrays start so many values after a 16-byte boundary: an access that needs alignment would raise.

    Around the inputs lie NaNs, so that a value read from there shows; around the output sevens, which must stay.
    """
    margin = 16

    def array(dtype, offset, around):
        whole = torch.full((n + 2 * margin,), around, dtype=dtype)
        return whole, whole[margin + offset : margin + offset + n]

    x = array(dtypes[0], offsets[0], math.nan)[1].copy_(random((n,), dtypes[0], 1))
    f = array(dtypes[1], offsets[1], math.nan)[1].copy_(random((n,), dtypes[1], 2))
    whole, out = array(dtypes[0], offsets[2], 7.0)
    out.fill_(math.nan)
    codes = [host_kernels.dtype_codes[pair_id(dtype)] for dtype in dtypes]
    host_kernels.forward_step(x.data_ptr(), f.data_ptr(), out.data_ptr(), H, n, *codes, stream=0)
    expected = reference.forward_step(x, f, H) if dtypes[0].itemsize >= 4 else fp32_arithmetic(x, f, H)
    assert torch.equal(out, expected)
    out.fill_(7.0)
    assert (whole == 7.0).all()


def test_kernel_refuses_a_grid_that_does_not_fit(host_kernels):
    unaligned, code = 1, host_kernels.dtype_codes["float32"]
    with pytest.raises(RuntimeError, match=r"^forward_step: a launch must fit in 2147483647 blocks, got 4294967296"):
        host_kernels.forward_step(unaligned, unaligned, unaligned, H, 2**40, code, code, 0)


@pytest.mark.parametrize(
    ("x", "f", "message"),
    [
        ("float32", "float64", r"f must have x's dtype or a narrower one, got codes 0 \(f\) and 1 \(x\); convert f"),
        ("float16", "bfloat16", r"f must have x's dtype or a narrower one, got codes 3 \(f\) and 2 \(x\); convert f"),
        ("float32", None, r"a dtype must be one of dtype_codes, got 99; take"),
    ],
)
def test_kernel_refuses_dtypes_that_it_does_not_serve(host_kernels, x, f, message):
    codes = [99 if dtype is None else host_kernels.dtype_codes[dtype] for dtype in (x, f)]
    with pytest.raises(ValueError, match=rf"^forward_step: {message}"):
        host_kernels.forward_step(0, 0, 0, H, 1, *codes, 0)


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="needs nvcc")
def test_kernel_compiles_to_16_byte_accesses_and_no_fused_multiply_add(tmp_path):
    ptx = tmp_path / "forward_step.ptx"
    command = ["nvcc", "-std=c++17", "-arch=compute_90", "-ptx", "-o", ptx, ROOT / "csrc" / "forward_step.cu"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    code = ptx.read_text()
    assert "fma." not in code
    assert "st.global.v4.f32" in code
    assert "st.global.v2.f64" in code


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("wants", list(itertools.product((False, True), repeat=2)), ids=str)
@pytest.mark.parametrize("dtypes", DTYPE_PAIRS, ids=lambda pair: "-".join(map(pair_id, pair)))
def test_opcheck(dtypes, wants, device):
    x, f = (random((4, 3), dtype, 1, device).requires_grad_(want) for dtype, want in zip(dtypes, wants, strict=True))
    torch.library.opcheck(OP, (x, f, H))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_fake_has_the_real_layout(layout):
    x, f = (of(random(SQUARE, torch.float32, seed)) for seed, of in enumerate(LAYOUTS[layout]))
    torch.library.opcheck(OP, (x, f, H), test_utils="test_faketensor")


def test_first_and_second_gradients():
    x, f = (random((3, 2), torch.float64, seed).requires_grad_() for seed in (1, 2))
    assert torch.autograd.gradcheck(lambda x, f: OP(x, f, H), (x, f))
    assert torch.autograd.gradgradcheck(lambda x, f: OP(x, f, H), (x, f))


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("dtypes", DTYPE_PAIRS, ids=lambda pair: "-".join(map(pair_id, pair)))
def test_gradients_have_their_inputs_dtype(dtypes, device):
    x, f = (random((5, 3), dtype, 1, device).requires_grad_() for dtype in dtypes)
    g = random((5, 3), dtypes[0], 3, device)
    OP(x, f, H).backward(g)
    assert torch.equal(x.grad, g)
    assert torch.equal(f.grad, (H * g).to(f.dtype))


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_compiles_whole(device):
    def loss(x, f):
        return (torch.ops.resode.forward_step(x.sin(), f, H) ** 2).sum()

    x, f = (random((4, 3), torch.float32, seed, device).requires_grad_() for seed in (1, 2))
    expected = torch.autograd.grad(loss(x, f), (x, f))
    compiled_loss = torch.compile(loss, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(torch.autograd.grad(compiled_loss(x, f), (x, f)), expected)


X = torch.zeros(8, 64)


@pytest.mark.parametrize(
    ("x", "f", "error", "message"),
    [
        (
            X,
            X[:4],
            ValueError,
            r"^forward_step: f must have x's shape, got \[4, 64\] with x \[8, 64\]; nothing is broadcast: expand f$",
        ),
        (
            X,
            X[0],
            ValueError,
            r"^forward_step: f must have x's shape, got \[64\] with x \[8, 64\]; nothing is broadcast: expand f$",
        ),
        (X, X.to("meta"), ValueError, r"^forward_step: f must be on x's device, got meta with x on cpu; move f there$"),
        (X.int(), X, TypeError, r"^forward_step: x must be one of float64, .*, bfloat16, got int32; convert x$"),
        (
            X,
            X.double(),
            TypeError,
            r"^forward_step: f must have x's dtype or .*, got float64 with x float32; convert f to",
        ),
        (X.half(), X.bfloat16(), TypeError, r"got bfloat16 with x float16; convert f to float16$"),
        (X, X.to(torch.int8), TypeError, r"got int8 with x float32; convert f to float32$"),
    ],
)
@pytest.mark.parametrize("implementation", [OP, ops._forward_step_fake])
def test_errors_say_what_must_hold(implementation, x, f, error, message):
    with pytest.raises(error, match=message):
        implementation(x, f, H)


@pytest.fixture
def missing(monkeypatch):
    """As if the library were missing."""
    monkeypatch.setattr(compiled, "_load", lambda: (None, "no nvcc was found"))
    compiled.notice_reference_runs.cache_clear()
    yield
    compiled.notice_reference_runs.cache_clear()


def test_without_the_library_the_reference_runs_with_one_notice(missing):
    x, f = random((5,), torch.float32, 1), random((5,), torch.float32, 2)
    with pytest.warns(RuntimeWarning, match=r"^resode_cuda: plain torch computes .*; no nvcc was found$"):
        out = ops._forward_step_cuda(x, f, H)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert torch.equal(ops._forward_step_cuda(x, f, H), out)
    assert torch.equal(out, reference.forward_step(x, f, H))


def test_asking_for_a_missing_library_by_name_gives_the_cause(missing):
    assert ops.build_info() == ops.BuildInfo(compiled=False, cause="no nvcc was found")
    with pytest.raises(RuntimeError, match=r"^forward_step: needs the compiled library; no nvcc was found$"):
        compiled.require("forward_step")


@pytest.mark.parametrize("present", [True, False])
def test_why_the_library_does_not_load(monkeypatch, tmp_path, present):
    if present:
        (tmp_path / f"not_a_library{sysconfig.get_config_var('EXT_SUFFIX')}").write_bytes(b"no machine code")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(compiled, "NAME", "not_a_library")
    monkeypatch.setattr(compiled, "_load", compiled._load.__wrapped__)
    info = ops.build_info()
    assert not info.compiled
    if present:
        assert info.cause.startswith("not_a_library is present but does not load: ")
        assert str(tmp_path) in info.cause  # the loader's own words follow
    else:
        assert "no nvcc was found when it was installed" in info.cause


@pytest.fixture
def library():
    if not ops.build_info().compiled:
        pytest.skip(ops.build_info().cause)
    return compiled.require("this test")


def test_build_info_of_the_library(library):
    info = ops.build_info()
    assert info.cause is None
    assert int(info.cuda.split(".")[0]) >= 12
    assert info.architectures
    assert all(entry.removesuffix("-real").rstrip("af").isdecimal() for entry in info.architectures)
    assert info.compiler.startswith("NVIDIA ")


def test_a_refused_launch_raises_with_cudarts_words(library):
    if torch.cuda.is_available():
        pytest.skip("with a GPU this launch would not be refused")
    code = library.dtype_codes["float32"]
    with pytest.raises(RuntimeError, match=r"^forward_step: the kernel launch failed: .* \(cudaError[A-Za-z]+\)$"):
        library.forward_step(0, 0, 0, H, 1, code, code, 0)
    library.forward_step(0, 0, 0, H, 0, code, code, 0)  # nothing to do, nothing launched


@pytest.mark.gpu
def test_runs_on_the_current_stream(library):
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        x = torch.ones(1 << 20, device="cuda")
        torch.cuda._sleep(50_000_000)  # a kernel on another stream would read x before this fill
        x.fill_(2.0)
        out = OP(x, x, H)
    torch.cuda.current_stream().wait_stream(stream)
    assert torch.equal(out, reference.forward_step(x, x, H))


@pytest.mark.gpu
def test_offsets_beyond_32_bits(library):
    n = 2**31 + 5
    if torch.cuda.mem_get_info()[0] < 8 * n:
        pytest.skip("needs 16 GiB of free GPU memory")
    x = torch.zeros(n, dtype=torch.float16, device="cuda")
    x[-9:] = 1.0
    out = OP(x, x, 1.0)
    assert torch.equal(out[-9:], torch.full_like(out[-9:], 2.0))
    assert out[:-9].count_nonzero() == 0
