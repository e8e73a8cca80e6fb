"""The compiled library resode_cuda._kernels: it is loaded when first asked for, and missing for a stated reason."""

from __future__ import annotations

import functools
import importlib
import importlib.util
from dataclasses import dataclass
from types import ModuleType

NAME = "resode_cuda._kernels"


@dataclass(frozen=True)
class BuildInfo:
    """What the compiled library was built with, or why there is none; from `resode_cuda.ops.build_info()`."""

    compiled: bool
    """Whether the library is there and loads, which needs no GPU."""
    cuda: str | None = None
    """Version of the CUDA compiler, e.g. "13.0.88"."""
    architectures: tuple[str, ...] = ()
    """GPUs, as CMake names them: "90-real" is machine code for sm_90; "120" adds PTX, which newer GPUs can run."""
    compiler: str | None = None
    """Names and versions of the CUDA and the C++ compiler."""
    reason: str | None = None
    """Why there is no library, or why it does not load; None if it does."""


@functools.cache
def _load() -> tuple[ModuleType | None, str | None]:
    """The library, or None and the reason."""
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
    """What the compiled library was built with, or the reason why there is none. Never raises."""
    kernels, reason = _load()
    if kernels is None:
        return BuildInfo(compiled=False, reason=reason)
    return BuildInfo(
        compiled=True,
        cuda=kernels.cuda_version,
        architectures=tuple(kernels.architectures.split()),
        compiler=kernels.compiler,
    )


def require(where: str) -> ModuleType:
    """The library, for a caller that was asked for it by name.

    Raises:
        RuntimeError: if it is missing or does not load, with the reason.
    """
    kernels, reason = _load()
    if kernels is None:
        raise RuntimeError(f"{where}: needs the compiled library; {reason}")
    return kernels
