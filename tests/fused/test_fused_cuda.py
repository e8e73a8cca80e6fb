"""The depth-fused ops in CUDA C++: their own source executed on the CPU, and the same on a GPU."""

import itertools
import re
from dataclasses import replace

import pytest
import torch

from resode_cuda.fused import cuda, cuda_operands, selection, slabs
from resode_cuda.fused.cuda import driver_of
from resode_cuda.fused.op import BACKENDS
from resode_cuda.fused.reference import passes
from resode_cuda.fused.signature import Wanted
from resode_cuda.method import Method
from resode_cuda.ops import build_info
from resode_cuda.reverse import Reverse
from tests.support.fused_cases import CASES, Case, check, check_that_gradients_are_repeated
from tests.support.host_build import ROOT
from tests.support.networks import Midpoint, pretend_to_have_a_gpu

pytestmark = pytest.mark.usefixtures("off_the_kink")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
ONE_PROCESSOR, LARGE_GPU = 0, 1
"""Devices of the host. On that with a single multiprocessor a block takes two groups of 16 rows, on the other one."""
SCHEDULES = list(itertools.product((False, True), (False, True)))
"""Whether warps run ahead of each other, and whether copies land late."""
SIZES = [(16, 24), (16, 130), (32, 64), (24, 7), (64, 100), (128, 40), (100, 65)]
"""dim and hidden: padded and not; a chunk has 64 hidden units, or 32."""


@pytest.fixture
def host(kernels):
    kernels.host_schedule(False, True)
    kernels.host_device(ONE_PROCESSOR)
    yield driver_of(kernels, lambda device: 0)
    kernels.host_schedule(False, True)
    kernels.host_device(ONE_PROCESSOR)


@pytest.fixture(params=[ONE_PROCESSOR, LARGE_GPU], ids=["two groups", "one group"])
def processors(kernels, host, request):
    kernels.host_device(request.param)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_matches_the_specification(host, case, dtype):
    check(host, case, dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("dim", "hidden"), SIZES)
def test_sizes(host, processors, dim, hidden, dtype):
    check(host, Case("heun", reverse="extrapolated", norm="layer", dim=dim, hidden=hidden, rows=33, steps=2), dtype)
    check(host, Case(dim=dim, hidden=hidden, rows=18, steps=2, two_passes=True), dtype)


@pytest.mark.parametrize(("greedy", "late"), SCHEDULES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("scheme", ["euler", "heun"])
def test_every_order_of_threads_and_copies(kernels, host, processors, scheme, dtype, greedy, late):
    kernels.host_schedule(greedy, late)
    for dim, hidden in ((16, 130), (64, 70), (128, 70)):
        solver = Reverse("step", corrections=1)
        check(host, Case(scheme, reverse=solver, norm="rms", dim=dim, hidden=hidden, rows=19, steps=2), dtype)
    check(host, Case(scheme, reverse="extrapolated", anchors=(0, 2), steps=4, hidden=60), dtype)


@pytest.mark.parametrize("activation", ["identity", "relu", "gelu", "gelu_tanh", "silu", "tanh"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_activations_with_every_norm(host, activation, dtype):
    for norm in (None, "rms", "layer"):
        check(host, Case(activation=activation, norm=norm, steps=2, rows=9), dtype)


@pytest.mark.parametrize("activation", ["identity", "relu", "gelu", "gelu_tanh", "silu", "tanh"])
@pytest.mark.parametrize("size", [1e3, 1.9e19, 1e25, 3e38])
def test_slopes_are_finite_wherever_z_is(host, activation, size):
    network, x, g = Case(activation=activation, steps=1).operands(torch.float32)
    # A hidden unit that counts for nothing: its slope is multiplied by a cotangent of zero.
    network.bias_in[:, ::2], network.bias_in[:, 1::2] = size, -size
    network.weight_out.zero_()
    g_first, _ = host.exact_adjoint(network, network.method(), g, x, True)
    assert torch.equal(g_first, g)


@pytest.mark.parametrize("scheme", ["euler", "heun"])
def test_slabs_and_ranges_of_the_depth(monkeypatch, host, scheme):
    monkeypatch.setattr(slabs, "THINNEST_SLAB", 32)
    case = Case(scheme, reverse="extrapolated", rows=75, steps=5, anchors=(0, 3), norm="rms")
    for fitting in (2**16, 2**14, 2**13):
        monkeypatch.setattr(slabs, "SCRATCH_BYTES", fitting)
        for two_passes in (False, True):
            check(host, replace(case, two_passes=two_passes), torch.float32)
        check(host, replace(case, reverse="corrected"), torch.float32)


@pytest.mark.parametrize("solver", [Reverse("step"), Reverse("extrapolate", corrections=1)], ids=str)
@pytest.mark.parametrize("scheme", ["euler", "heun"])
def test_any_set_of_steps_can_be_anchored(host, scheme, solver):
    case = Case(scheme, steps=5, norm="rms", reverse=solver, anchors=(0, 2, 3))
    check(host, case, torch.float32)
    network, x, g = case.operands(torch.float32)
    method = network.method(solver, case.anchors)
    squares = host.adjoint(network, method, g, host.forward(network, method, x), Wanted(parameters=False)).squares
    assert [n for n, (_, size) in enumerate(squares.tolist()) if size == 0] == [0, 2, 3]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_deterministic_gradients_do_not_depend_on_the_device(kernels, host, dtype):
    network, x, g = Case(rows=100, hidden=70).operands(dtype)
    states = passes.forward(network, network.method(), x)
    found = []
    torch.use_deterministic_algorithms(True)
    try:
        for device, greedy in ((ONE_PROCESSOR, False), (LARGE_GPU, True)):
            kernels.host_device(device)
            kernels.host_schedule(greedy, True)
            adjoint = host.adjoint(network, network.method(), g, states, Wanted(parameters=True))
            found.append((adjoint.g, *adjoint.gradients))
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_products_of_floats_are_not_rounded(host):
    """They are IEEE's: a tf32 product would be off by 1e-3."""
    network, x, _ = Case(activation="identity", steps=1, dim=64, hidden=64).operands(torch.float32)
    x_last, *_ = host.forward(network, network.method(), x)
    expected, *_ = passes.forward(network, network.method(), x)
    torch.testing.assert_close(x_last, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_not_finite_stays_in_its_row(host, value):
    network, x, _ = Case(rows=20).operands(torch.bfloat16)
    x[3, 5] = value
    x_last, *_ = host.forward(network, network.method(), x)
    assert not x_last[3].isfinite().any() or x_last[3].isnan().any()
    others = torch.arange(20) != 3
    assert x_last[others].isfinite().all()


def test_bad_calls_of_the_launchers_are_refused(kernels):
    network = (0, 0, 0, 0, 0, 64, 16, False, 0, 0, 1e-5)
    states = (0, 0, 0, 0, 5, 5, 1, 0)
    code = kernels.dtype_codes
    how = (16, code["float32"], 1, 0)
    with pytest.raises(ValueError, match=r"^mlp_forward: the padded dim must be 16, 32, 64 or 128, got 48; pad it"):
        kernels.mlp_forward(network, (48, *how[1:]), states)
    with pytest.raises(ValueError, match=r"^mlp_forward: parameters must be float32, .* got float64; use backend="):
        kernels.mlp_forward(network, (16, code["float64"], 1, 0), states)
    for activation, norm in ((6, 0), (-1, 0), (0, 3)):
        unknown = (*network[:8], activation, norm, 1e-5)
        with pytest.raises(ValueError, match=rf"^mlp_forward: activation and norm must be .*, got {activation} and"):
            kernels.mlp_forward(unknown, how, states)
    with pytest.raises(ValueError, match=r"^mlp_forward: must be given 8 operands, got 9; give them in the order"):
        kernels.mlp_forward(network, how, (*states, 0))
    with pytest.raises(TypeError, match=r"^mlp_forward: operands must be numbers that fit their types, got None;"):
        kernels.mlp_forward(network, how, (None, *states[1:]))


STRUCTURES = {
    "network.h": {"Network": cuda_operands.NetworkOperands, "MlpLaunch": cuda_operands.LaunchOperands},
    "forward.h": {"MlpForward": cuda_operands.ForwardOperands},
    "adjoint.h": {"MlpAdjoint": cuda_operands.AdjointOperands},
    "exact.h": {"MlpExact": cuda_operands.ExactOperands},
    "gradients.h": {"MlpGradients": cuda_operands.GradientOperands},
}


@pytest.mark.parametrize("header", STRUCTURES)
def test_operands_have_the_fields_of_the_structures(header):
    text = re.sub("//.*", "", (ROOT / "csrc" / "mlp" / header).read_text())
    declared = dict(re.findall(r"^struct (\w+) \{(.*?)^\};", text, re.M | re.S))
    assert declared.keys() == STRUCTURES[header].keys()
    for name, operands in STRUCTURES[header].items():
        fields = [re.search(r"\w+$", part)[0] for part in re.findall(r"[^;,]+(?=[;,])", declared[name])]
        assert tuple(fields) == operands._fields


def test_names_that_the_kernels_lack_are_told(kernels):
    network = Case().operands(torch.float32)[0]
    assert cuda.unknown_name(kernels, network, network.method()) is None
    for change, told in (
        ({"activation": "softplus"}, "activations identity, relu, gelu, gelu_tanh, silu, tanh, got 'softplus'"),
        ({"norm": "batch"}, "norms None, rms, layer, got 'batch'"),
    ):
        told = f"kernels in CUDA C++ have the {told}"
        assert cuda.unknown_name(kernels, replace(network, **change), network.method()) == told
    told = "kernels in CUDA C++ have the schemes euler, heun, got 'midpoint'"
    assert cuda.unknown_name(kernels, network, Method(Midpoint, network.steps)) == told


def test_an_unknown_name_is_the_last_reason(monkeypatch, kernels):
    network = replace(Case().operands(torch.float32)[0], activation="softplus")
    pretend_to_have_a_gpu(monkeypatch)
    monkeypatch.setattr(cuda.library, "_load", lambda: (None, "it is not there"))
    assert cuda.reason(network, network.method(), torch.device("cuda")) == "it is not there"
    monkeypatch.setattr(cuda.library, "_load", lambda: (kernels, None))
    assert cuda.reason(network, network.method(), torch.device("cuda")).endswith("got 'softplus'")
    assert cuda.reason(replace(network, activation="silu"), network.method(), torch.device("cuda")) is None


def reason_on_cuda(monkeypatch, case, dtype=torch.float32, capability=(9, 0), solver=None):
    pretend_to_have_a_gpu(monkeypatch, capability)
    network = case.operands(dtype)[0]
    return cuda.reason(network, network.method(solver), torch.device("cuda"))


def test_what_the_kernels_cannot_compute_is_told(monkeypatch):
    missing = build_info().reason
    assert reason_on_cuda(monkeypatch, Case()) == missing
    assert "float64" in reason_on_cuda(monkeypatch, Case(), torch.float64)
    assert "at most 128 values" in reason_on_cuda(monkeypatch, Case(dim=129))
    too_old = reason_on_cuda(monkeypatch, Case(), capability=(7, 5))
    assert 'need compute capability 8.0, got 7.5; on this GPU backend="torch" computes all of it' in too_old
    accelerated = Reverse("step", corrections=2)
    assert "accelerate" in reason_on_cuda(monkeypatch, Case(), solver=accelerated)
    assert reason_on_cuda(monkeypatch, Case(), solver=replace(accelerated, accelerate=False)) == missing
    network = Case().operands(torch.float32)[0]
    assert "got tensors on cpu" in cuda.reason(network, network.method(), torch.device("cpu"))


def test_a_missing_library_is_an_error_where_it_is_asked_for(monkeypatch):
    monkeypatch.setattr(cuda.library, "_load", lambda: (None, "it is not there"))
    assert reason_on_cuda(monkeypatch, Case()) == "it is not there"
    network, x, _ = Case().operands(torch.float32)
    monkeypatch.setattr(cuda, "reason", lambda *_: cuda.library.build_info().reason)
    with pytest.raises(ValueError, match=r"^here: backend='cuda' can't compute this: it is not there; use \"auto\""):
        selection.select("here", BACKENDS, "cuda", network, network.method(), x)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_matches_the_specification_on_a_gpu(case, dtype):
    check(cuda, case, dtype, "cuda")


@pytest.mark.gpu
@pytest.mark.parametrize("rows", [40, 4300])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("dim", "hidden"), [*SIZES, (64, 128), (128, 512)])
def test_sizes_on_a_gpu(dim, hidden, dtype, rows):
    for reverse in ("corrected", "extrapolated"):
        for two_passes in (False, True):
            case = Case(reverse=reverse, dim=dim, hidden=hidden, rows=rows, steps=6, two_passes=two_passes)
            check(cuda, case, dtype, "cuda")
            check(cuda, replace(case, scheme="heun", norm="layer"), dtype, "cuda")


@pytest.mark.gpu
@pytest.mark.parametrize("dim", [16, 128])
def test_sanitize_on_a_gpu(dim):
    """Small: compute-sanitizer makes every access slow."""
    for dtype in DTYPES:
        for scheme in ("euler", "heun"):
            check(
                cuda,
                Case(scheme, reverse="extrapolated", norm="layer", dim=dim, hidden=70, rows=33),
                dtype,
                "cuda",
            )


@pytest.mark.gpu
def test_deterministic_gradients_on_a_gpu():
    check_that_gradients_are_repeated(cuda, Case(dim=64, hidden=128, rows=3000, steps=10))
