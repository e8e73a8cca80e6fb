"""Which backend computes a depth-fused op."""

from __future__ import annotations

import importlib
from typing import Any

import torch
from torch import Tensor

from ..reverse import Reverse
from . import cuda_backend, triton_backend
from .network import Network

NAMES = ("auto", "cuda", "triton", "torch")
FEW_ROWS = 2048
SMALLEST = 16
"""A dim and hidden size that every backend takes."""


def causes(network: Network, x: Tensor, solver: Reverse | None) -> dict[str, str | None]:
    """Each backend, from the first choice to the last, and why it can't compute this; None where it can.

    Args:
        solver: None where nothing is rebuilt.
    """
    return {name: _cause(name, network, x.device, solver) for name in _order(x)}


def causes_on(device: torch.device) -> dict[str, str | None]:
    """Each backend, and why it can't compute any network on a device; None where it can, in the order for many rows."""
    parameter = torch.empty(1, SMALLEST, SMALLEST, device="meta")
    network = Network(parameter, None, parameter, None, (1.0,), "euler", "relu", None)
    many = torch.empty(FEW_ROWS + 1, SMALLEST, device="meta")
    return {name: _cause(name, network, device, None) for name in _order(many)}


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
    return importlib.import_module(f"{__package__}.{backend}_backend")


def _order(x: Tensor) -> tuple[str, ...]:
    """The backends as "auto" tries them.

    The kernels in CUDA C++ are made for few rows, where latency decides, Triton's for many. Where the first stop being
    the faster ones is not measured yet: FEW_ROWS is a guess.
    """
    return ("cuda", "triton", "torch") if x.numel() <= FEW_ROWS * x.shape[-1] else ("triton", "cuda", "torch")


def _cause(name: str, network: Network, device: torch.device, solver: Reverse | None) -> str | None:
    if name == "torch":
        return None
    if device.type != "cuda":
        return f"kernels run on CUDA devices, got tensors on {device}"
    if not torch.cuda.is_available():
        return "torch finds no CUDA device"
    return (cuda_backend if name == "cuda" else triton_backend).cause(network, device, solver)
