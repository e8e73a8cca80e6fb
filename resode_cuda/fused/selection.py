"""Which backend computes a depth-fused op."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from ..devices import processor_count
from ..method import Method
from ..schemes import Euler
from . import timings
from .network import Network
from .signature import StackBackend

NAMES = ("auto", "cuda", "triton", "torch")
FEW_ROWS, MANY_ROWS = ("cuda", "triton", "torch"), ("triton", "cuda", "torch")
ROWS_OF_A_PROCESSOR = 32
"""Most rows that kernels in CUDA C++ take on a multiprocessor at a time; most of Triton's take more."""
SMALLEST = 16
"""A dim and hidden size that every backend takes."""

Backends = Mapping[str, StackBackend]


def reasons(backends: Backends, network: Network, method: Method, x: Tensor) -> dict[str, str | None]:
    """Each backend, from the first choice to the last, and why it can't compute this; None where it can."""
    order = ranking(network, x.numel() // x.shape[-1], x.device)
    return {name: backends[name].reason(network, method, x.device) for name in order}


def reasons_on(backends: Backends, device: torch.device) -> dict[str, str | None]:
    """Each backend, and why it can't compute any network on a device; None where it can, in the order for many rows."""
    parameter = torch.empty(1, SMALLEST, SMALLEST, device="meta")
    network, method = Network(parameter, None, parameter, None, "relu", None), Method(Euler, (1.0,))
    return {name: backends[name].reason(network, method, device) for name in MANY_ROWS}


def select(where: str, backends: Backends, backend: str, network: Network, method: Method, x: Tensor) -> str:
    """The name of the backend that computes the op.

    Raises:
        ValueError: for an unknown name, or a backend asked for by name that can't compute this, with the reason.
    """
    if backend not in NAMES:
        raise ValueError(f"{where}: backend must be one of {NAMES}, got {backend!r}")
    if backend == "auto":
        return next(name for name, reason in reasons(backends, network, method, x).items() if reason is None)
    if reason := backends[backend].reason(network, method, x.device):
        raise ValueError(f'{where}: backend={backend!r} can\'t compute this: {reason}; use "auto" or "torch"')
    return backend


def ranking(network: Network, rows: int, device: torch.device) -> tuple[str, ...]:
    """The backends as "auto" tries them: the fastest first where that was measured, and those not measured last.

    Elsewhere the kernels in CUDA C++, which are made for few rows, come first as long as not every multiprocessor has
    as many as it takes at a time, since Triton's larger tiles would leave more of them idle; beyond, Triton's do, which
    read weights less often.
    """
    if device.type != "cuda":
        return MANY_ROWS
    order = FEW_ROWS if rows <= ROWS_OF_A_PROCESSOR * processor_count(device) else MANY_ROWS
    least = dict.fromkeys(order, math.inf)
    for name, time in timings.microseconds(network, rows, device).items():
        backend = name.partition(" ")[0]
        least[backend] = min(least[backend], time)
    return tuple(sorted(order, key=least.__getitem__))
