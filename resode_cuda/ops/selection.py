"""Which backend computes the pointwise ops: the compiled kernels, Triton's, or plain torch."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from .. import library
from ..devices import reason_against
from . import cuda, triton
from .backend import KernelBackend

NAMES = ("cuda", "triton", "torch")
"""The backends, from the first choice to the last."""

_asked_for: str | None = None


def reasons(device: torch.device) -> dict[str, str | None]:
    """Each backend, and why it can't run on that device; None where it can."""
    return {name: _reason(name, device) for name in NAMES}


@contextmanager
def using(name: str) -> Iterator[None]:
    """Compute with this backend alone, in all threads, for tests and benchmarks.

    Raises:
        ValueError: for an unknown name.
        RuntimeError: by the ops, with the reason, if it can't run where their tensors are.
    """
    global _asked_for
    if name not in NAMES:
        raise ValueError(f"using: the backend must be one of {NAMES}, got {name!r}")
    before, _asked_for = _asked_for, name
    try:
        yield
    finally:
        _asked_for = before


def select(device: torch.device) -> KernelBackend | None:
    """The backend for tensors on this device; None for plain torch, `reference.py`.

    Raises:
        RuntimeError: if a backend was asked for by name and can't run there, with the reason.
    """
    if _asked_for is not None:
        reason = _reason(_asked_for, device)
        if reason is not None:
            raise RuntimeError(f"resode_cuda: the backend that was asked for must run, got {_asked_for!r}; {reason}")
        return _backend(_asked_for)
    return _first_choice(device) if device.type == "cuda" else None


@functools.cache
def _first_choice(device: torch.device) -> KernelBackend | None:
    name = next(name for name, reason in reasons(device).items() if reason is None)
    if name == "torch":
        why = "; ".join(f"{other}: {reason}" for other, reason in reasons(device).items() if reason is not None)
        warnings.warn(f"resode_cuda: plain torch computes tensors on {device}; {why}", RuntimeWarning, stacklevel=2)
    return _backend(name)


@functools.cache
def _backend(name: str) -> KernelBackend | None:
    if name == "cuda":
        return cuda.CompiledKernels(library.require("resode_cuda"), torch._C._cuda_getCurrentRawStream)
    return triton if name == "triton" else None


def _reason(name: str, device: torch.device) -> str | None:
    """Why a backend can't run on a device; None if it can."""
    if name == "cuda":
        return reason_against("kernels in CUDA C++", device) or library.build_info().reason
    if name == "triton":
        return reason_against("Triton's kernels", device) or triton.reason(device)
    return None
