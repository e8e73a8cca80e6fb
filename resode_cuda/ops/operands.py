"""What the ops' tensors must be. Fakes and implementations make the same checks, so compiled code raises alike."""

from __future__ import annotations

import torch
from torch import Tensor

DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


def check_stream(op: str, x: Tensor, f: Tensor) -> None:
    """Check a residual stream x and the f that is added to it.

    Raises:
        TypeError: if x is not floating point, or f's dtype is neither x's nor a narrower one.
        ValueError: if f's shape or device is not x's.
    """
    if x.dtype not in DTYPES:
        raise TypeError(f"{op}: x must be one of {_names(DTYPES)}, got {_name(x.dtype)}; convert x")
    if f.dtype != x.dtype and (f.dtype not in DTYPES or f.dtype.itemsize >= x.dtype.itemsize):
        raise TypeError(
            f"{op}: f must have x's dtype or a narrower floating one, got {_name(f.dtype)} with x {_name(x.dtype)}; "
            f"convert f to {_name(x.dtype)}"
        )
    if f.shape != x.shape:
        raise ValueError(
            f"{op}: f must have x's shape, got {list(f.shape)} with x {list(x.shape)}; nothing is broadcast: expand f"
        )
    if f.device != x.device:
        raise ValueError(f"{op}: f must be on x's device, got {f.device} with x on {x.device}; move f there")


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _names(dtypes: tuple[torch.dtype, ...]) -> str:
    return ", ".join(_name(dtype) for dtype in dtypes)
