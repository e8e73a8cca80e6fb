"""Which backend computes a depth-fused op."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from ..reverse import Reverse
from . import cuda as cuda_backend
from . import timings as measured
from .network import Network
from .reference import passes as torch_backend
from .triton import passes as triton_backend

NAMES = ("auto", "cuda", "triton", "torch")
FEW_ROWS, MANY_ROWS = ("cuda", "triton", "torch"), ("triton", "cuda", "torch")
ROWS_OF_A_PROCESSOR = 32
"""Up to so many the kernels in CUDA C++ take on a multiprocessor at a time; most of Triton's take more."""
MODULES = {"cuda": cuda_backend, "triton": triton_backend, "torch": torch_backend}
SMALLEST = 16
"""A dim and hidden size that every backend takes."""


def causes(network: Network, x: Tensor, solver: Reverse | None) -> dict[str, str | None]:
    """Each backend, from the first choice to the last, and why it can't compute this; None where it can.

    Args:
        solver: None where nothing is rebuilt.
    """
    order = _order(network, x.numel() // x.shape[-1], x.device)
    return {name: _cause(name, network, x.device, solver) for name in order}


def causes_on(device: torch.device) -> dict[str, str | None]:
    """Each backend, and why it can't compute any network on a device; None where it can, in the order for many rows."""
    parameter = torch.empty(1, SMALLEST, SMALLEST, device="meta")
    network = Network(parameter, None, parameter, None, (1.0,), "euler", "relu", None)
    return {name: _cause(name, network, device, None) for name in MANY_ROWS}


def chosen(where: str, backend: str, network: Network, x: Tensor, solver: Reverse | None) -> Any:
    """The module that computes the op.

    Raises:
        ValueError: for an unknown name, or a backend asked for by name that can't compute this, with the cause.
    """
    if backend not in NAMES:
        raise ValueError(f"{where}: backend must be one of {NAMES}, got {backend!r}")
    if backend == "auto":
        backend = next(name for name, cause in causes(network, x, solver).items() if cause is None)
    elif cause := _cause(backend, network, x.device, solver):
        raise ValueError(f'{where}: backend={backend!r} can\'t compute this: {cause}; use "auto" or "torch"')
    return MODULES[backend]


def _order(network: Network, rows: int, device: torch.device) -> tuple[str, ...]:
    """The backends as "auto" tries them: the fastest first where that was measured, and those not measured last.

    Elsewhere the kernels in CUDA C++, which are made for few rows, come first as long as not every multiprocessor has
    as many as it takes at a time, since Triton's larger tiles would leave more of them idle; beyond, Triton's do, which
    read weights less often.
    """
    if device.type != "cuda":
        return MANY_ROWS
    processors = torch.cuda.get_device_properties(device).multi_processor_count
    order = FEW_ROWS if rows <= ROWS_OF_A_PROCESSOR * processors else MANY_ROWS
    least = dict.fromkeys(order, math.inf)
    for name, time in measured.microseconds(network, rows, device).items():
        backend = name.partition(" ")[0]
        least[backend] = min(least[backend], time)
    return tuple(sorted(order, key=least.__getitem__))


def _cause(name: str, network: Network, device: torch.device, solver: Reverse | None) -> str | None:
    if name == "torch":
        return None
    if device.type == "cuda" and not torch.cuda.is_available():
        return "torch finds no CUDA device"
    return (cuda_backend if name == "cuda" else triton_backend).cause(network, device, solver)
