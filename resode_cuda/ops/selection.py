"""Which backend computes the ops: the compiled kernels, Triton's, or plain torch."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from .. import library
from . import cuda, reference, triton

NAMES = ("cuda", "triton", "reference")
"""From the first choice to the last."""
OLDEST = (8, 0)
"""Compute capability of the oldest GPU that kernels are compiled for."""

_asked_for: str | None = None


def causes(device: torch.device) -> dict[str, str | None]:
    """Each backend, and why it can't run on that device; None where it can."""
    return {name: _cause(name, device) for name in NAMES}


@contextmanager
def using(name: str) -> Iterator[None]:
    """Compute with this backend alone, in all threads, for tests and benchmarks.

    Raises:
        ValueError: for an unknown name.
        RuntimeError: by the ops, with the cause, if it can't run where their tensors are.
    """
    global _asked_for
    if name not in NAMES:
        raise ValueError(f"using: the backend must be one of {NAMES}, got {name!r}")
    before, _asked_for = _asked_for, name
    try:
        yield
    finally:
        _asked_for = before


def chosen(device: torch.device) -> Any:
    """The backend for tensors on this device."""
    if _asked_for is not None:
        cause = _cause(_asked_for, device)
        if cause is not None:
            raise RuntimeError(f"resode_cuda: the backend that was asked for must run, got {_asked_for!r}; {cause}")
        return _backend(_asked_for)
    return _first(device) if device.type == "cuda" else reference


@functools.cache
def _first(device: torch.device) -> Any:
    name = next(name for name in NAMES if _cause(name, device) is None)
    if name == "reference":
        causes = "; ".join(f"{other}: {_cause(other, device)}" for other in NAMES if other != name)
        warnings.warn(f"resode_cuda: plain torch computes tensors on {device}; {causes}", RuntimeWarning, stacklevel=2)
    return _backend(name)


@functools.cache
def _backend(name: str) -> Any:
    if name == "cuda":
        kernels = library.require("resode_cuda")
        return cuda.Compiled(kernels, torch._C._cuda_getCurrentRawStream)
    return reference if name == "reference" else triton


def _cause(name: str, device: torch.device) -> str | None:
    """Why a backend can't run on a device; None if it can."""
    if name == "reference":
        return None
    if device.type != "cuda":
        return f"kernels run on CUDA devices, got {device}"
    if not torch.cuda.is_available():
        return "torch finds no CUDA device"
    capability = torch.cuda.get_device_capability(device)
    if capability < OLDEST:
        return f"kernels are compiled for compute capability {OLDEST[0]}.{OLDEST[1]} and later, got {capability}"
    return library.build_info().cause if name == "cuda" else _backend("triton").cause()
