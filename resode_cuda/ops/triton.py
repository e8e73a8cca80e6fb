"""The ops by Triton: each function launches one kernel of `triton_source.py` on the current stream.

For GPUs that the compiled library is not built for, and where there is none. Triton is imported by the first call, and
compiles a kernel when it first meets a combination of dtypes, of operands that are there and of their alignment.
"""

from __future__ import annotations

import functools
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

VALUES_PER_TILE = {torch.float64: 512, torch.float32: 1024, torch.float16: 1024, torch.bfloat16: 1024}
"""Values that a program takes at a time, by the stream's dtype: 8 per thread, 4 of float64."""
OPTIONS = {"num_warps": 4, "enable_fp_fusion": False}
"""How kernels are compiled; why without fusion, `triton_source.py` says."""
PROGRAMS_PER_PROCESSOR = 8
"""Of a kernel that sums norms. Each makes two atomic additions; 8 of 4 warps fit at up to 64 registers a thread."""
PARTIAL_NORMS_AT_A_TIME = 1024


@functools.cache
def cause() -> str | None:
    """Why Triton can't run on the current device; None if it can."""
    try:
        import triton

        # What a launch starts with: it finds the driver, and a C compiler for Triton's own bindings to it.
        triton.runtime.driver.active.get_current_target()
    except Exception as error:  # a broken installation may raise anything
        return f"Triton can't be used here: {type(error).__name__}: {error}"
    return None


def forward_step(x: Tensor, f: Tensor, h: float, out: Tensor) -> None:
    _step(x, f, None, h, out)


def heun_step(x: Tensor, k1: Tensor, k2: Tensor, h: float, out: Tensor) -> None:
    _step(x, k1, k2, 0.5 * h, out)


def reverse_update_(
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
    _reverse(x, y, None, k1, k2, weight, 0.0, 0.0, norms, g, v1, v2, g_scale, v_scale)


def reverse_extrapolate_(
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
    _reverse(x, y, d, k1, k2, weight, a, b, norms, g, v1, v2, g_scale, v_scale)


def adjoint_update_(g: Tensor, v1: Tensor | None, v2: Tensor | None, g_scale: float, v_scale: float) -> None:
    n = g.numel()
    tile = VALUES_PER_TILE[g.dtype]
    _launch("adjoint_kernel", -(-n // tile), (g, v1, v2), g_scale, v_scale, n, tile)


def _step(x: Tensor, k1: Tensor, k2: Tensor | None, weight: float, out: Tensor) -> None:
    n = x.numel()
    tile = VALUES_PER_TILE[x.dtype]
    _launch("step_kernel", -(-n // tile), (x, k1, k2, out), weight, n, tile)


def _reverse(
    x: Tensor,
    y: Tensor,
    d: Tensor | None,
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
    n = x.numel()
    tile = VALUES_PER_TILE[x.dtype]
    programs = min(-(-n // tile), most_programs(x.device))
    partial_norms = None
    if torch.are_deterministic_algorithms_enabled():
        partial_norms = torch.empty((2, programs), dtype=norms.dtype, device=norms.device)
    tensors = x, y, d, k1, k2, g, v1, v2, norms, partial_norms
    _launch("reverse_kernel", programs, tensors, weight, a, b, g_scale, v_scale, n, tile)
    if partial_norms is not None:
        _launch("add_partial_norms_kernel", 2, (partial_norms, norms), programs, PARTIAL_NORMS_AT_A_TIME)


_compiled: dict[tuple[Any, ...], Any] = {}


def _launch(name: str, programs: int, tensors: tuple[Any, ...], *scalars_and_tile: float) -> None:
    """Launch a kernel: its tensors, the first not None, then its scalars, and last a compile-time constant.

    Triton itself takes some 20 us to find what it compiled for such arguments. They differ by what the key says and by
    nothing else, as `triton_source.py` has nothing specialised on a scalar.
    """
    facts = [name, tensors[0].get_device(), scalars_and_tile[-1]]
    for tensor in tensors:
        if tensor is None:
            facts.append(None)
        else:
            facts += tensor.dtype, tensor.data_ptr() % 16 == 0
    key = tuple(facts)
    compiled = _compiled.get(key)
    if compiled is not None:
        compiled[programs, 1, 1](*tensors, *scalars_and_tile)
        return
    compiled = getattr(_source(), name)[(programs,)](*tensors, *scalars_and_tile, **OPTIONS)
    if compiled is not None:  # as it is in the interpreter
        _compiled[key] = compiled


@functools.cache
def most_programs(device: torch.device) -> int:
    """As many as run at once, or a few more."""
    return PROGRAMS_PER_PROCESSOR * torch.cuda.get_device_properties(device).multi_processor_count


@functools.cache
def _source() -> ModuleType:
    from . import triton_kernels as triton_source  # imports Triton

    return triton_source
