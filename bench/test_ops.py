"""What a call of an op costs: pytest bench/test_ops.py.

On one element, on a CPU, no formula takes time: what remains is the call. `op` is that of an op in plain torch;
`kernel call` stops where a kernel would be launched, which is what a call takes of the host on a GPU; `arguments` is
the part of that which hands a kernel its arguments, a compiled function's conversions and the launch left out. On a
GPU the same op is called until the queue is full, and the launches are among what it takes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from resode_cuda import ops
from resode_cuda.ops import pointwise
from resode_cuda.ops.cuda import CompiledKernels
from resode_cuda.ops.pointwise import FunctionalOp, Op

H = 0.1
OPS: dict[Op[Any], Callable[..., None]] = {
    ops.forward_step: CompiledKernels.forward_step,
    ops.heun_step: CompiledKernels.heun_step,
    ops.reverse_update_: CompiledKernels.reverse_update_,
    ops.reverse_extrapolate_: CompiledKernels.reverse_extrapolate_,
    ops.adjoint_update_: CompiledKernels.adjoint_update_,
}
"""Each op, and what hands its arguments to a compiled function."""
each_op = pytest.mark.parametrize("op", OPS, ids=lambda op: op.name)


@pytest.fixture(autouse=True)
def no_gradients() -> Iterator[None]:
    with torch.no_grad():
        yield


@pytest.mark.parametrize("what", ["op", "kernel call", "arguments"])
@each_op
def test_call(benchmark: Any, monkeypatch: pytest.MonkeyPatch, op: Op[Any], what: str) -> None:
    call: Callable[..., Any] = op
    values = _values(op, "cpu")
    nothing: Any = SimpleNamespace(dtype_codes={"float32": 0}, **{op.name: lambda *_: None})
    compiled: Any = CompiledKernels(nothing, lambda device: 0)
    if what == "kernel call":
        monkeypatch.setattr(pointwise, "select", lambda device: compiled)
    if what == "arguments":
        out = (torch.empty(1),) if isinstance(op, FunctionalOp) else ()
        call, values = OPS[op], (compiled, op.operands(*values), *out)
    benchmark.group = f"{op.name} on one element"
    _describe(benchmark, "cpu")
    benchmark(call, *values)


@pytest.mark.gpu
@pytest.mark.parametrize("backend", ["cuda", "triton"])
@each_op
def test_call_on_a_gpu(benchmark: Any, op: Op[Any], backend: str) -> None:
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    benchmark.group = f"{op.name} on one element, GPU"
    _describe(benchmark, "cuda")
    values = _values(op, "cuda")
    with ops.using(backend):
        benchmark(op, *values)
    torch.cuda.synchronize()


def _values(op: Op[Any], device: str) -> tuple[Any, ...]:
    """An op's arguments, none left out."""
    x, y, d, k1, k2, g, v1, v2 = (torch.randn(1, device=device) for _ in range(8))
    squares, adjoint = torch.zeros(2, device=device, dtype=torch.float64), (g, v1, v2, 0.9, 0.1)
    arguments: dict[Op[Any], tuple[Any, ...]] = {
        ops.forward_step: (x, k1, H),
        ops.heun_step: (x, k1, k2, H),
        ops.reverse_update_: (x, y, k1, k2, H, squares, *adjoint),
        ops.reverse_extrapolate_: (x, y, d, k1, k2, H, 2.0, 1.0, squares, *adjoint),
        ops.adjoint_update_: adjoint,
    }
    return arguments[op]


def _describe(benchmark: Any, device: str) -> None:
    benchmark.extra_info["torch"] = torch.__version__
    benchmark.extra_info["device"] = torch.cuda.get_device_name() if device == "cuda" else "cpu"
