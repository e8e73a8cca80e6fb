"""The compiled library resode_cuda._kernels: finding it, saying what it is or why it is missing, and calling it.

It takes addresses, sizes, dtype codes and a stream; the functions here get those from tensors. It is loaded when first
asked for.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import warnings
from dataclasses import dataclass
from types import ModuleType

import torch
from torch import Tensor

NAME = "resode_cuda._kernels"


@dataclass(frozen=True)
class BuildInfo:
    """What the compiled library was built with, or why there is none; from `resode_cuda.ops.build_info()`."""

    compiled: bool
    """Whether the library is there and loads. It may: a GPU is not needed for that."""
    cuda: str | None = None
    """Version of the CUDA compiler, e.g. "13.0.88"."""
    architectures: tuple[str, ...] = ()
    """As CMake names them: "90-real" is machine code for sm_90; plain "120" adds PTX, which newer GPUs can run."""
    compiler: str | None = None
    """The CUDA and the C++ compiler."""
    cause: str | None = None
    """Why there is no library, or why it does not load; None if it does."""


@functools.cache
def _load() -> tuple[ModuleType | None, str | None]:
    """The library, or None and the cause."""
    if importlib.util.find_spec(NAME) is None:
        return None, (
            "this installation has no compiled library for this Python: no nvcc was found when it was installed, "
            "or RESODE_SKIP_CUDA was set; install again with nvcc on PATH"
        )
    try:
        return importlib.import_module(NAME), None
    except ImportError as error:
        return None, f"{NAME} is present but does not load: {error}"


def build_info() -> BuildInfo:
    """What the compiled library was built with, or the cause why there is none. Never raises."""
    kernels, cause = _load()
    if kernels is None:
        return BuildInfo(compiled=False, cause=cause)
    return BuildInfo(
        compiled=True,
        cuda=kernels.cuda_version,
        architectures=tuple(kernels.architectures.split()),
        compiler=kernels.compiler,
    )


def available() -> bool:
    """Whether the compiled library loads."""
    return _load()[0] is not None


def require(where: str) -> ModuleType:
    """The library, for a caller that was asked for it by name.

    Raises:
        RuntimeError: if it is missing or does not load, with the cause.
    """
    kernels, cause = _load()
    if kernels is None:
        raise RuntimeError(f"{where}: needs the compiled library; {cause}")
    return kernels


@functools.cache
def notice_reference_runs() -> None:
    """Say once that CUDA tensors are computed by the plain-torch reference, and why."""
    warnings.warn(f"resode_cuda: plain torch computes CUDA tensors here; {_load()[1]}", RuntimeWarning, stacklevel=2)


def forward_step(kernels: ModuleType, x: Tensor, f: Tensor, h: float, stream: int) -> Tensor:
    """x + h f by the kernel, in the layout of torch.empty_like(x).

    The kernel wants dense arrays in one order: x and f are passed as they are where they have that layout, and copied
    into it where not.
    """
    out = torch.empty_like(x)
    x, f = _laid_out_like(out, x), _laid_out_like(out, f)
    code = _dtype_codes(kernels)
    kernels.forward_step(
        x.data_ptr(), f.data_ptr(), out.data_ptr(), h, out.numel(), code[x.dtype], code[f.dtype], stream
    )
    return out


def _laid_out_like(out: Tensor, tensor: Tensor) -> Tensor:
    if tensor.stride() == out.stride():
        return tensor
    return torch.empty_like(out, dtype=tensor.dtype).copy_(tensor)


@functools.cache
def _dtype_codes(kernels: ModuleType) -> dict[torch.dtype, int]:
    return {getattr(torch, name): code for name, code in kernels.dtype_codes.items()}
