"""Checks of the ops' tensors: dtypes, shapes and devices.

Fakes and implementations make the same checks, so compiled code raises alike.
"""

from __future__ import annotations

from collections.abc import Iterable

from torch import Tensor

from ..dtypes import DTYPES, dtype_name, dtype_names, fits
from ..squares import square_dtype

Named = Iterable[tuple[str, Tensor | None]]


def check_states(op: str, x: Tensor, stages: Named, streams: Named) -> None:
    """Check a residual stream x, the outputs of blocks that are added to it, and tensors that must be like it.

    Raises:
        TypeError: if x is not floating point, a stage's dtype neither x's nor a narrower one, or a stream's not x's.
        ValueError: if the shape or device of another one is not x's.
    """
    dtype, shape, device = x.dtype, x.shape, x.device
    if dtype not in DTYPES:
        raise TypeError(f"{op}: x must be one of {dtype_names(DTYPES)}, got {dtype_name(dtype)}; convert x")
    for name, stage in stages:
        if stage is None:
            continue
        if not fits(stage.dtype, dtype):
            raise TypeError(
                f"{op}: {name} must have x's dtype or a narrower floating one, got {dtype_name(stage.dtype)} with x "
                f"{dtype_name(dtype)}; convert {name} to {dtype_name(dtype)}"
            )
        if stage.shape != shape or stage.device != device:
            raise _misplaced(op, x, name, stage)
    for name, stream in streams:
        if stream is None:
            continue
        if stream.dtype != dtype:
            raise TypeError(
                f"{op}: {name} must have x's dtype, got {dtype_name(stream.dtype)} with x {dtype_name(dtype)}; "
                f"convert {name}"
            )
        if stream.shape != shape or stream.device != device:
            raise _misplaced(op, x, name, stream)


def check_squares(op: str, x: Tensor, squares: Tensor) -> None:
    """Check the place where squared norms are added up.

    Raises:
        TypeError: if its dtype is not that of squares on x's device, float64.
        ValueError: if it is not two contiguous values on x's device.
    """
    dtype = square_dtype(x.device)
    if squares.dtype != dtype:
        raise TypeError(f"{op}: squares must be {dtype_name(dtype)} on {x.device}, got {dtype_name(squares.dtype)}")
    if squares.shape != (2,) or not squares.is_contiguous() or squares.device != x.device:
        raise ValueError(
            f"{op}: squares must be two contiguous values on {x.device}, got shape {list(squares.shape)}, strides "
            f"{list(squares.stride())} on {squares.device}"
        )


def _misplaced(op: str, x: Tensor, name: str, tensor: Tensor) -> ValueError:
    if tensor.shape != x.shape:
        return ValueError(
            f"{op}: {name} must have x's shape, got {list(tensor.shape)} with x {list(x.shape)}; nothing is broadcast: "
            f"expand {name}"
        )
    return ValueError(
        f"{op}: {name} must be on x's device, got {tensor.device} with x on {x.device}; move {name} there"
    )
