"""The compiled library resode_cuda._kernels: finding it, saying what it is or why it is missing, and calling it.

It takes addresses, sizes, dtype codes and a stream; the functions here get those from tensors. It is loaded when first
asked for.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
from collections.abc import Callable
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


def require(where: str) -> ModuleType:
    """The library, for a caller that was asked for it by name.

    Raises:
        RuntimeError: if it is missing or does not load, with the cause.
    """
    kernels, cause = _load()
    if kernels is None:
        raise RuntimeError(f"{where}: needs the compiled library; {cause}")
    return kernels


class Compiled:
    """The ops by a compiled module: what `resode_cuda.ops.backend` asks of a backend.

    Args:
        kernels: the library, or its sources compiled for the host.
        stream: from a device's index, the address of the stream to launch on.
    """

    def __init__(self, kernels: ModuleType, stream: Callable[[int], int]) -> None:
        self._kernels, self._stream = kernels, stream
        self._code = {getattr(torch, name): code for name, code in kernels.dtype_codes.items()}

    def forward_step(self, x: Tensor, f: Tensor, h: float, out: Tensor) -> None:
        self._kernels.forward_step(
            x.data_ptr(), f.data_ptr(), h, out.data_ptr(), out.numel(), *self._codes(x, f), self._stream(x.get_device())
        )

    def heun_step(self, x: Tensor, k1: Tensor, k2: Tensor, h: float, out: Tensor) -> None:
        self._kernels.heun_step(
            *(x.data_ptr(), k1.data_ptr(), k2.data_ptr(), h, out.data_ptr()),
            *(out.numel(), *self._codes(x, k1), self._stream(x.get_device())),
        )

    def reverse_update_(
        self,
        x: Tensor,
        y: Tensor,
        k1: Tensor,
        k2: Tensor | None,
        weight: float,
        norms: Tensor,
        g: Tensor | None,
        v1: Tensor | None,
        v2: Tensor | None,
        g_scale: float,
        v_scale: float,
    ) -> None:
        partial_norms = self._partial_norms(norms)
        self._kernels.reverse_update_(
            *(x.data_ptr(), y.data_ptr(), k1.data_ptr(), _address(k2), weight, norms.data_ptr()),
            *(_address(g), _address(v1), _address(v2), g_scale, v_scale),
            *(_address(partial_norms), x.numel(), *self._codes(x, k1), self._stream(x.get_device())),
        )

    def reverse_extrapolate_(
        self,
        x: Tensor,
        y: Tensor,
        d: Tensor,
        k1: Tensor,
        k2: Tensor | None,
        weight: float,
        a: float,
        b: float,
        norms: Tensor,
        g: Tensor | None,
        v1: Tensor | None,
        v2: Tensor | None,
        g_scale: float,
        v_scale: float,
    ) -> None:
        partial_norms = self._partial_norms(norms)
        self._kernels.reverse_extrapolate_(
            *(x.data_ptr(), y.data_ptr(), d.data_ptr(), k1.data_ptr(), _address(k2), weight, a, b, norms.data_ptr()),
            *(_address(g), _address(v1), _address(v2), g_scale, v_scale),
            *(_address(partial_norms), x.numel(), *self._codes(x, k1), self._stream(x.get_device())),
        )

    def adjoint_update_(self, g: Tensor, v1: Tensor | None, v2: Tensor | None, g_scale: float, v_scale: float) -> None:
        self._kernels.adjoint_update_(
            *(g.data_ptr(), _address(v1), _address(v2), g_scale, v_scale),
            *(g.numel(), self._code[g.dtype], self._stream(g.get_device())),
        )

    def _codes(self, x: Tensor, k: Tensor) -> tuple[int, int]:
        return self._code[x.dtype], self._code[k.dtype]

    def _partial_norms(self, norms: Tensor) -> Tensor | None:
        """Room for each block's norms where they must be added up in a fixed order."""
        if not torch.are_deterministic_algorithms_enabled():
            return None
        # The stream's order keeps the memory from being given away before the kernels are done with it.
        return norms.new_empty(2 * self._kernels.most_reverse_blocks())


def _address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()
