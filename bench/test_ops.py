"""What a call of an op costs: pytest bench/test_ops.py.

On one element, on a CPU, no formula takes time: what remains is the call. `op` is that of an op in plain torch;
`kernel call` stops where a kernel would be launched, which is what a call takes of the host on a GPU; `arguments` is
the part of that which hands a kernel its arguments, a compiled function's conversions and the launch left out. On a
GPU the same op is called until the queue is full, and the launches are among what it takes.
"""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from resode_cuda import ops
from resode_cuda.ops import pointwise
from resode_cuda.ops.cuda import CompiledKernels

H = 0.1
NAMES = ("forward_step", "heun_step", "reverse_update_", "reverse_extrapolate_", "adjoint_update_")


@pytest.fixture(autouse=True)
def no_gradients() -> Iterator[None]:
    with torch.no_grad():
        yield


@pytest.mark.parametrize("what", ["op", "kernel call", "arguments"])
@pytest.mark.parametrize("name", NAMES)
def test_call(benchmark: Any, monkeypatch: pytest.MonkeyPatch, name: str, what: str) -> None:
    values = _values(name, "cpu")
    nothing: Any = SimpleNamespace(dtype_codes={"float32": 0}, **{name: lambda *_: None})
    compiled: Any = CompiledKernels(nothing, lambda device: 0)
    if what == "kernel call":
        monkeypatch.setattr(pointwise, "select", lambda device: compiled)
    call = getattr(compiled if what == "arguments" else ops, name)
    if what == "arguments":
        out = (torch.empty(1),) if name in NAMES[:2] else ()
        values = (getattr(ops, name).operands(*values), *out)
    benchmark.group = f"{name} on one element"
    _describe(benchmark, "cpu")
    benchmark(call, *values)


@pytest.mark.gpu
@pytest.mark.parametrize("backend", ["cuda", "triton"])
@pytest.mark.parametrize("name", NAMES)
def test_call_on_a_gpu(benchmark: Any, name: str, backend: str) -> None:
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    benchmark.group = f"{name} on one element, GPU"
    _describe(benchmark, "cuda")
    values = _values(name, "cuda")
    with ops.using(backend):
        benchmark(getattr(ops, name), *values)
    torch.cuda.synchronize()


def _values(name: str, device: str) -> tuple[Any, ...]:
    """An op's arguments, none left out."""
    x, y, d, k1, k2, g, v1, v2 = (torch.randn(1, device=device) for _ in range(8))
    squares, adjoint = torch.zeros(2, device=device), (g, v1, v2, 0.9, 0.1)
    arguments: dict[str, tuple[Any, ...]] = {
        "forward_step": (x, k1, H),
        "heun_step": (x, k1, k2, H),
        "reverse_update_": (x, y, k1, k2, H, squares, *adjoint),
        "reverse_extrapolate_": (x, y, d, k1, k2, H, 2.0, 1.0, squares, *adjoint),
        "adjoint_update_": adjoint,
    }
    return arguments[name]


def _describe(benchmark: Any, device: str) -> None:
    benchmark.extra_info["torch"] = torch.__version__
    benchmark.extra_info["device"] = torch.cuda.get_device_name() if device == "cuda" else "cpu"
