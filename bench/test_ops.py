"""What a call of an op costs beside the same formula in plain torch: pytest bench/test_ops.py.

Small tensors show the overhead of a call, large ones the memory traffic. On a GPU each round waits for the device.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import cycle
from typing import Any

import pytest
import torch
from torch import Tensor

from resode_cuda import ops

H = 0.1
SIZES = {"small": (8, 64), "large": (4096, 1024)}
WAYS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "op": lambda x, f: torch.ops.resode.forward_step(x, f, H),
    "plain": lambda x, f: x + H * f,
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("grad", [False, True], ids=["no_grad", "grad"])
@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_forward_step(benchmark: Any, device: str, grad: bool, size: str, way: str) -> None:
    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    benchmark.group = f"forward_step {device} {size} {'grad' if grad else 'no_grad'}"
    benchmark.extra_info["torch"] = torch.__version__
    benchmark.extra_info["device"] = torch.cuda.get_device_name() if device == "cuda" else "cpu"
    benchmark.extra_info["kernel"] = device == "cuda" and ops.build_info().compiled
    # Eight pairs, 256 MiB in all where large: no cache holds them until their turn comes again.
    operands = cycle(
        [tuple(torch.randn(SIZES[size], device=device, requires_grad=grad) for _ in "xf") for _ in range(8)]
    )

    def call() -> None:
        WAYS[way](*next(operands))
        if device == "cuda":
            torch.cuda.synchronize()

    benchmark(call)
