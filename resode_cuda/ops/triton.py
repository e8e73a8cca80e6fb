"""The pointwise ops by Triton: each function launches a kernel on the current stream.

The kernels are those of `triton_kernels.py` and, for increments that are stored in a few bits, `triton_storing.py`.

For GPUs that the compiled library is not built for, and where there is none. Triton is imported by the first launch,
and compiles a kernel when it first meets a combination of dtypes, of operands that are there and of their alignment.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .. import stored
from ..devices import processor_count
from .operands import (
    AdjointUpdateOperands,
    ForwardStepOperands,
    HeunStepOperands,
    ReverseExtrapolateOperands,
    ReverseUpdateOperands,
    StoredStepOperands,
    StoreOperands,
    StoreResults,
    StoreStepOperands,
)

VALUES_PER_TILE = {torch.float64: 512, torch.float32: 1024, torch.float16: 1024, torch.bfloat16: 1024}
"""Values that a program takes at a time, by the stream's dtype: 8 per thread, 4 of float64."""
OPTIONS = {"num_warps": 4, "enable_fp_fusion": False}
"""How kernels are compiled; why without fusion, `triton_kernels.py` says."""
PROGRAMS_PER_PROCESSOR = 8
"""Programs of a kernel that sums squares. Each makes two atomic additions; 8 of 4 warps fit at up to 64 registers a
thread."""
PARTIAL_SQUARES_AT_A_TIME = 1024


launch_lock = threading.RLock()
"""Held while Triton is imported, asked for its driver, or handed a launch for which it may compile: what it keeps of
these is not made for two threads at once."""


def reason(device: torch.device) -> str | None:
    """Why Triton can't run on a CUDA device; None if it can."""
    with launch_lock:
        return _reason_on(device.index if device.index is not None else torch.cuda.current_device())


@functools.cache
def _reason_on(index: int) -> str | None:
    try:
        import triton

        # What a launch starts with: it finds the driver, and a C compiler for Triton's own bindings to it.
        with torch.cuda.device(index):
            triton.runtime.driver.active.get_current_target()
    except Exception as error:  # a broken installation may raise anything
        return f"Triton can't be used here: {type(error).__name__}: {error}"
    return None


def forward_step(operands: ForwardStepOperands, out: Tensor) -> None:
    x, f, h = operands
    _step((x, f, None, out), h)


def heun_step(operands: HeunStepOperands, out: Tensor) -> None:
    x, k1, k2, h = operands
    _step((x, k1, k2, out), 0.5 * h)


def reverse_update_(operands: ReverseUpdateOperands) -> None:
    _reverse(operands, None, 0.0, 0.0)


def reverse_extrapolate_(operands: ReverseExtrapolateOperands) -> None:
    _reverse(operands, operands.d, operands.a, operands.b)


def adjoint_update_(operands: AdjointUpdateOperands) -> None:
    g, v1, v2, g_scale, v_scale = operands
    n = g.numel()
    tile = VALUES_PER_TILE[g.dtype]
    _launch(_adjoint_update_kernel, -(-n // tile), (g, v1, v2), (g_scale, v_scale, n), (tile,))


def store(operands: StoreOperands, out: StoreResults) -> None:
    _store(operands, (None, None), 0.0, None, out)


def store_step(operands: StoreStepOperands, x_next: Tensor, out: StoreResults) -> None:
    x, k1, k2, weight, companion, unit, bits = operands
    _store(StoreOperands(x, companion, unit, bits), (k1, k2), weight, x_next, out)


def stored_step(operands: StoredStepOperands, out: Tensor) -> None:
    *tensors, bits = operands
    programs, sizes, constants = _groups(operands.companion, bits)
    _launch(_stored_step_kernel, programs, (*tensors, out), sizes, constants)


def _store(
    operands: StoreOperands,
    stages: tuple[Tensor | None, Tensor | None],
    weight: float,
    x_next: Tensor | None,
    out: StoreResults,
) -> None:
    x, companion, unit, bits = operands
    programs, sizes, constants = _groups(companion, bits)
    scalars = weight, float(stored.largest_companion(companion.dtype, bits)), *sizes
    _launch(_store_kernel, programs, (x, *stages, companion, unit, x_next, *out), scalars, constants)


def _groups(companion: Tensor, bits: int) -> tuple[int, tuple[int, ...], tuple[int, ...]]:
    """Programs, sizes and constants of a kernel that takes a companion by groups."""
    values, _, all_groups = sizes = stored.sizes(companion)
    tile = VALUES_PER_TILE[companion.dtype] // stored.GROUP
    return -(-all_groups // tile), sizes, (bits, values % stored.GROUP == 0, tile)


def _step(tensors: tuple[Tensor, Tensor, Tensor | None, Tensor], weight: float) -> None:
    x = tensors[0]
    n = x.numel()
    tile = VALUES_PER_TILE[x.dtype]
    _launch(_step_kernel, -(-n // tile), tensors, (weight, n), (tile,))


def _reverse(
    operands: ReverseUpdateOperands | ReverseExtrapolateOperands, d: Tensor | None, a: float, b: float
) -> None:
    x, squares = operands.x, operands.squares
    n = x.numel()
    tile = VALUES_PER_TILE[x.dtype]
    programs = min(-(-n // tile), most_programs(x.device))
    partial_squares = None
    if torch.are_deterministic_algorithms_enabled():
        partial_squares = torch.empty((2, programs), dtype=squares.dtype, device=squares.device)
    tensors = (
        *(x, operands.y, d, operands.k1, operands.k2, operands.g, operands.v1, operands.v2),
        *(squares, partial_squares),
    )
    scalars = operands.weight, a, b, operands.g_scale, operands.v_scale, n
    _launch(_reverse_kernel, programs, tensors, scalars, (tile,))
    if partial_squares is not None:
        sums = partial_squares, squares
        _launch(_add_partial_squares_kernel, 2, sums, (programs,), (PARTIAL_SQUARES_AT_A_TIME,))


def _step_kernel() -> Any:
    from .triton_kernels import step_kernel

    return step_kernel


def _reverse_kernel() -> Any:
    from .triton_kernels import reverse_kernel

    return reverse_kernel


def _add_partial_squares_kernel() -> Any:
    from .triton_kernels import add_partial_squares_kernel

    return add_partial_squares_kernel


def _adjoint_update_kernel() -> Any:
    from .triton_kernels import adjoint_update_kernel

    return adjoint_update_kernel


def _store_kernel() -> Any:
    from .triton_storing import store_kernel

    return store_kernel


def _stored_step_kernel() -> Any:
    from .triton_storing import stored_step_kernel

    return stored_step_kernel


_compiled: dict[tuple[Any, ...], Any] = {}


def _launch(
    kernel: Callable[[], Any],
    programs: int,
    tensors: tuple[Tensor | None, ...],
    scalars: tuple[float, ...],
    constants: tuple[int, ...],
) -> None:
    """Launch a kernel: its tensors, the first not None, then its scalars, and last what is known when it is compiled.

    Triton itself takes some 20 us to find what it compiled for such arguments. They differ by what the key says and by
    nothing else, as no kernel is specialised on a scalar.

    Args:
        kernel: imports the kernel, and Triton with it.
    """
    assert tensors[0] is not None
    facts = [kernel, tensors[0].get_device(), *constants]
    for tensor in tensors:
        if tensor is None:
            facts.append(None)
        else:
            facts += tensor.dtype, tensor.data_ptr() % 16 == 0
    key = tuple(facts)
    compiled = _compiled.get(key)
    if compiled is not None:
        compiled[programs, 1, 1](*tensors, *scalars, *constants)
        return
    with launch_lock:
        compiled = _compiled.get(key)  # by another thread meanwhile
        if compiled is None:
            compiled = kernel()[(programs,)](*tensors, *scalars, *constants, **OPTIONS)
            if compiled is not None:  # as it is in the interpreter
                _compiled[key] = compiled
            return
    compiled[programs, 1, 1](*tensors, *scalars, *constants)


@functools.cache
def most_programs(device: torch.device) -> int:
    """As many programs of `reverse_kernel` as run at once, or a few more."""
    return PROGRAMS_PER_PROCESSOR * processor_count(device)
