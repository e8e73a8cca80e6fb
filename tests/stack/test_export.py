"""Stacks and residual MLPs that are traced or exported: ordinary operations, with the right numbers."""

import io
import sys
import warnings
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.onnx._internal.exporter import _flags

from resode_cuda import ResidualMLP, ResidualStack
from tests.support.networks import block_count, mlps

MAKERS = {
    "stack": lambda **options: ResidualStack(mlps("euler", 4), **options),
    "heun": lambda **options: ResidualStack(mlps("heun", 4), "heun", **options),
    "batch norm": lambda **options: ResidualStack(
        [nn.Sequential(nn.BatchNorm1d(6), block) for block in mlps("euler", 4)], **options
    ).eval(),
    "mlp": lambda **options: ResidualMLP(6, 10, 4, **options),
    "heun mlp": lambda **options: ResidualMLP(6, 10, block_count("euler", 4), "heun", norm="layer", **options),
    "bfloat16": lambda **options: ResidualMLP(6, 10, 4, norm="rms", dtype=torch.bfloat16, **options),
}
GRADIENTS = ("adjoint", "checkpoint", "backprop")


@pytest.fixture(autouse=True)
def _no_advice_of_exporters():
    """The tracer warns of each look at a shape, and all warn of what torch itself no longer wants to be used."""
    with warnings.catch_warnings():
        for category in (torch.jit.TracerWarning, DeprecationWarning, FutureWarning):
            warnings.simplefilter("ignore", category)
        yield


def assert_same_numbers(module, other):
    """On batches of the size that was recorded and of another one."""
    for rows in (3, 5):
        x = torch.randn(rows, 6)
        tolerance = 1e-2 if any(p.dtype == torch.bfloat16 for p in module.parameters()) else 1e-6
        torch.testing.assert_close(other(x), module(x), rtol=tolerance, atol=tolerance)


def calls(program):
    return {str(node.target) for node in program.graph.nodes if node.op == "call_function"}


def is_plain(names):
    return not any("resode" in name for name in names)


@pytest.mark.parametrize("gradient", GRADIENTS)
@pytest.mark.parametrize("name", MAKERS)
def test_a_trace_without_gradients(name, gradient):
    module = MAKERS[name](gradient=gradient)
    with torch.no_grad():
        traced = torch.jit.trace(module, torch.randn(3, 6))
    assert is_plain(node.kind() for node in traced.inlined_graph.nodes())
    assert_same_numbers(module, traced)
    frozen = MAKERS[name](gradient=gradient).requires_grad_(False)
    assert_same_numbers(frozen, torch.jit.trace(frozen, torch.randn(3, 6)))


@pytest.mark.parametrize("gradient", GRADIENTS[:2])
@pytest.mark.parametrize("name", ["stack", "mlp"])
def test_a_trace_of_a_backward_pass_is_refused(name, gradient):
    module = MAKERS[name](gradient=gradient)
    message = (
        rf"^Residual(Stack|MLP): torch\.jit\.trace records no backward pass but autograd's own, got "
        rf"gradient='{gradient}'; "
        r'trace under torch\.no_grad\(\), or use gradient="backprop"'
    )
    with pytest.raises(RuntimeError, match=message):
        torch.jit.trace(module, torch.randn(3, 6))
    module(torch.randn(3, 6)).sum().backward()  # nothing is left behind


@pytest.mark.parametrize("name", ["stack", "heun", "mlp"])
def test_a_trace_of_backprop_is_differentiable(name):
    module, x = MAKERS[name](gradient="backprop"), torch.randn(5, 6)
    traced = torch.jit.trace(module, torch.randn(3, 6))
    wanted = list(module.parameters())
    for got, expected in zip(
        torch.autograd.grad(traced(x).sum(), wanted), torch.autograd.grad(module(x).sum(), wanted), strict=True
    ):
        torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize(
    ("name", "gradient"), [*((name, "adjoint") for name in MAKERS), ("mlp", "checkpoint"), ("mlp", "backprop")]
)
def test_an_export_without_gradients(name, gradient, strict):
    module = MAKERS[name](gradient=gradient)
    with torch.no_grad():
        program = torch.export.export(
            module, (torch.randn(3, 6),), dynamic_shapes=({0: torch.export.Dim("rows", min=2)},), strict=strict
        )
        program = program.run_decompositions()
    assert is_plain(calls(program))
    assert_same_numbers(module, program.module())


@pytest.mark.parametrize("name", ["stack", "mlp"])
def test_an_export_of_a_module_that_watches_its_drift(name):
    module = MAKERS[name](on_drift="checkpoint")
    with torch.no_grad():
        program = torch.export.export(module, (torch.randn(3, 6),), dynamic_shapes=({0: torch.export.Dim("rows")},))
    assert is_plain(calls(program))
    assert_same_numbers(module, program.module())


@pytest.mark.parametrize("strict", [False, True])
def test_an_export_with_gradients_keeps_the_op_and_the_drift(strict):
    module, x = MAKERS["mlp"](), torch.randn(3, 6)
    module(x).sum().backward()
    program = torch.export.export(module, (x,), strict=strict)
    assert "resode.mlp_stack.default" in calls(program)
    assert module.drift is not None


@pytest.mark.parametrize("gradient", GRADIENTS)
@pytest.mark.parametrize("name", ["stack", "mlp", "heun mlp"])
def test_what_the_onnx_exporter_of_programs_is_given(name, gradient):
    """It exports with gradients on, and is not at hand itself without onnxscript."""
    module = MAKERS[name](gradient=gradient)
    program = _flags.set_onnx_exporting_flag(torch.export.export)(module, (torch.randn(3, 6),)).run_decompositions()
    assert is_plain(calls(program))
    x = torch.randn(3, 6)
    torch.testing.assert_close(program.module()(x), module(x), rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("name", ["stack", "heun", "mlp", "heun mlp"])
def test_onnx_by_tracing(name, monkeypatch):
    # The package is asked for functions of the model's own alone, of which there are none.
    model = SimpleNamespace(graph=SimpleNamespace(node=[]))
    monkeypatch.setitem(sys.modules, "onnx", SimpleNamespace(load_model_from_string=lambda written: model))
    module, file = MAKERS[name](), io.BytesIO()
    torch.onnx.export(module, (torch.randn(3, 6),), file, dynamo=False)
    written = file.getvalue()
    assert b"mlp_stack" not in written
    assert written.count(b"MatMul") + written.count(b"Gemm") >= 2 * block_count("euler", 4)
    module(torch.randn(3, 6)).sum().backward()
    assert module.drift is not None
