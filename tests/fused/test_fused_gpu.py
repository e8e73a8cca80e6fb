"""The depth-fused ops by Triton on a GPU: what the interpreter and the compiler cannot show."""

import importlib.util
from dataclasses import replace

import pytest
import torch

from resode_cuda import ResidualMLP, Reverse, smooth_init_
from resode_cuda.fused import slabs
from resode_cuda.fused.reference import passes as reference
from resode_cuda.fused.reference import tile
from resode_cuda.fused.signature import SavedStates, Wanted
from resode_cuda.fused.storage import unfilled
from resode_cuda.fused.triton import passes as triton_passes
from resode_cuda.fused.triton.arguments import APPROXIMATED
from tests.support.fused_cases import (
    CASES,
    STORED_CASES,
    Case,
    check,
    check_that_gradients_are_repeated,
    moved,
    prefer_one_pass,
)

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.usefixtures("off_the_kink"),
    pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed"),
]
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
GRADIENTS = ("adjoint", "checkpoint")


@pytest.fixture(autouse=True)
def _one_pass_where_it_can_be(monkeypatch):
    prefer_one_pass(monkeypatch)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", [*CASES, *STORED_CASES], ids=str)
def test_matches_the_specification(case, dtype):
    check(triton_passes, case, dtype, "cuda")


@pytest.mark.parametrize("two_passes", [False, True])
@pytest.mark.parametrize(("dim", "hidden"), [(16, 16), (32, 100), (64, 128), (100, 300), (128, 512), (256, 512)])
@pytest.mark.parametrize("reverse", ["paper", "corrected", "extrapolated", "stored"])
def test_sizes_and_presets(reverse, dim, hidden, two_passes):
    case = Case(
        reverse=reverse, dim=dim, hidden=hidden, rows=1000, steps=6, activation="gelu_tanh", two_passes=two_passes
    )
    check(triton_passes, case, torch.bfloat16, "cuda")
    check(triton_passes, replace(case, norm="rms"), torch.bfloat16, "cuda")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("norm", [None, "rms", "layer"])
@pytest.mark.parametrize("scheme", ["euler", "heun"])
def test_wide_layers(scheme, norm, dtype):
    case = Case(scheme, norm=norm, reverse="extrapolated", dim=300, hidden=520, rows=1100)
    check(triton_passes, case, dtype, "cuda")
    check(triton_passes, replace(case, reverse=Reverse("step", corrections=2), anchors=(0, 2)), dtype, "cuda")
    check(triton_passes, replace(case, reverse="stored", anchors=(1,)), dtype, "cuda")


def test_products_in_16_bits_are_added_to_wider_sums_by_the_product_itself():
    device = torch.device("cuda", torch.cuda.current_device())
    acc, a = torch.randn(64, 64, device=device), torch.randn(64, 64, device=device, dtype=torch.bfloat16)
    expected = acc.double() + 0.5 * (a.double() @ a.double())
    assert tile.adds_to_wider(device, torch.bfloat16)
    torch.ops.aten.addmm.dtype_out(acc, a, a, torch.float32, alpha=0.5, out=acc)
    torch.testing.assert_close(acc.double(), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dim", [64, 128])
def test_sanitize(dim):
    """Small: compute-sanitizer makes every access slow."""
    for two_passes in (False, True):
        for scheme in ("euler", "heun"):
            case = Case(
                scheme, reverse="extrapolated", norm="layer", dim=dim, hidden=70, rows=133, two_passes=two_passes
            )
            check(triton_passes, case, torch.bfloat16, "cuda")
            check(triton_passes, replace(case, reverse="stored", anchors=(1,)), torch.bfloat16, "cuda")


@pytest.mark.parametrize("scheme", ["euler", "heun"])
@pytest.mark.parametrize(("dim", "hidden"), [(64, 128), (200, 300)])
def test_ranges_of_rows_that_add_to_the_same_gradients(monkeypatch, scheme, dim, hidden):
    monkeypatch.setattr(triton_passes, "gradient_form", lambda *_: "two_pass")
    for norm in (None, "layer"):
        case = Case(scheme, reverse="extrapolated", norm=norm, dim=dim, hidden=hidden, rows=5000, steps=3)
        check(triton_passes, case, torch.bfloat16, "cuda")


def test_slabs_and_ranges_of_the_depth(monkeypatch):
    monkeypatch.setattr(slabs, "THINNEST_SLAB", 512)
    for fitting in (2**21, 2**19):
        monkeypatch.setattr(slabs, "SCRATCH_BYTES", fitting)
        for scheme in ("euler", "heun"):
            case = Case(
                scheme,
                reverse="extrapolated",
                dim=64,
                hidden=128,
                rows=1500,
                steps=20,
                two_passes=True,
                anchors=(0, 7, 14),
            )
            check(triton_passes, case, torch.bfloat16, "cuda")


def test_gradients_in_two_passes_are_repeated_bit_by_bit():
    check_that_gradients_are_repeated(triton_passes, Case(dim=64, hidden=128, rows=20_000, steps=10))


def trained(gradient, reverse="extrapolated", depth=32, rows=40_000, dim=64, hidden=128):
    torch.manual_seed(0)
    mlp = ResidualMLP(
        dim, hidden, depth, gradient=gradient, reverse=reverse, activation="silu", device="cuda", dtype=torch.bfloat16
    )
    x = torch.randn(rows, dim, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    return smooth_init_(mlp), x


@pytest.mark.parametrize("gradient", GRADIENTS)
def test_a_module_uses_it_and_agrees_with_plain_torch(gradient):
    mlp, x = trained(gradient)
    for backend in ("triton", "torch"):
        mlp.backend = backend
        mlp(x).float().square().mean().backward()
        gradients = [p.grad for p in (x, *mlp.parameters())]
        for p in (x, *mlp.parameters()):
            p.grad = None
        if backend == "triton":
            kept = gradients
    for ours, theirs in zip(kept, gradients, strict=True):
        error = (ours.float() - theirs.float()).norm() / theirs.float().norm()
        assert error <= 4 * torch.finfo(torch.bfloat16).eps, error


@pytest.mark.parametrize("gradient", GRADIENTS)
def test_a_training_step_is_captured(gradient):
    mlp, x = trained(gradient)
    mlp.on_drift = "ignore"
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            mlp(x).sum().backward()
    torch.cuda.current_stream().wait_stream(stream)
    for p in (x, *mlp.parameters()):
        p.grad = None
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        mlp(x).sum().backward()
    with torch.no_grad():
        x.copy_(torch.randn_like(x))
    graph.replay()
    replayed = [p.grad.clone() for p in (x, *mlp.parameters())]
    for p in (x, *mlp.parameters()):
        p.grad = None
    mlp(x).sum().backward()
    for p, ours in zip((x, *mlp.parameters()), replayed, strict=True):
        error = (ours.float() - p.grad.float()).norm() / p.grad.float().norm()
        assert error <= 2 * torch.finfo(torch.bfloat16).eps, error


@pytest.mark.parametrize("depth", [8, 64])
def test_a_training_step_takes_at_most_five_states_and_the_scratch(depth):
    for gradient, two_passes in (("adjoint", False), ("adjoint", True), ("checkpoint", True)):
        mlp, x = trained(gradient, depth=depth, rows=200_000)
        torch.use_deterministic_algorithms(two_passes)
        try:
            mlp(x).sum().backward()
            g = torch.ones_like(x)
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            mlp(x).backward(g)
            peak = torch.cuda.max_memory_allocated() - before
        finally:
            torch.use_deterministic_algorithms(False)
        # In float32: the state's dtype. The parameters' gradients are added up in float32, and rounded.
        state = 4 * x.numel()
        of_parameters = 2 * 4 * sum(p.numel() for p in mlp.parameters())
        scratch = slabs.SCRATCH_BYTES if two_passes else 0
        assert peak <= 5 * state + scratch + of_parameters, (gradient, two_passes, peak / state)


def test_offsets_beyond_32_bits():
    dim, rows = 256, 2**23 + 100
    if torch.cuda.mem_get_info()[0] < 16 * rows * dim:
        pytest.skip("needs 32 GiB of free GPU memory")
    network, *_ = Case(dim=dim, hidden=16, steps=1).operands(torch.bfloat16)
    network = moved(network, torch.bfloat16, "cuda")
    x = torch.randn(rows, dim, device="cuda")
    method, wanted = network.method(), Wanted(parameters=True)
    states = triton_passes.forward(network, method, x)
    tail = slice(rows - 500, rows)
    expected = reference.forward(network, method, x[tail].contiguous())
    torch.testing.assert_close(states.x_last[tail], expected.x_last, rtol=1e-2, atol=1e-2)
    g_first = triton_passes.adjoint(network, method, x, states, wanted).g
    of_tail = states.increments[:, tail], states.anchored[:, tail], unfilled(method, x[tail])
    end = SavedStates(states.x_last[tail].contiguous(), *of_tail)
    expected = reference.adjoint(network, method, x[tail].contiguous(), end, wanted)
    torch.testing.assert_close(g_first[tail], expected.g, rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("name", APPROXIMATED)
def test_approximate_activations_are_within_their_bounds(name):
    from tests.support.activation_accuracy import activated, bounds, exact  # which needs Triton

    z = torch.linspace(-16, 16, 8192)
    found = activated(name, True, z.cuda())
    for one, other, bound in zip(found, exact(name, z), bounds(name, z), strict=True):
        assert ((one.cpu() - other).abs() <= bound + 1e-6 * (1 + z.abs())).all()
