"""What the ops' tensors must be, and how they are handed to a kernel.

Fakes and implementations make the same checks, so compiled code raises alike.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


Named = Iterable[tuple[str, Tensor | None]]


def check_stream(op: str, x: Tensor, stages: Named) -> None:
    """Check a residual stream x and the outputs of blocks that are added to it.

    Raises:
        TypeError: if x is not floating point, or a stage's dtype is neither x's nor a narrower one.
        ValueError: if a stage's shape or device is not x's.
    """
    dtype, shape, device = x.dtype, x.shape, x.device
    if dtype not in DTYPES:
        raise TypeError(f"{op}: x must be one of {_names(DTYPES)}, got {dtype_name(dtype)}; convert x")
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


def check_like(op: str, x: Tensor, others: Named) -> None:
    """Check tensors that must have the shape, dtype and device of the residual stream x.

    Raises:
        TypeError: if one's dtype is not x's.
        ValueError: if one's shape or device is not x's.
    """
    dtype, shape, device = x.dtype, x.shape, x.device
    for name, other in others:
        if other is None:
            continue
        if other.dtype != dtype:
            raise TypeError(
                f"{op}: {name} must have x's dtype, got {dtype_name(other.dtype)} with x {dtype_name(dtype)}; "
                f"convert {name}"
            )
        if other.shape != shape or other.device != device:
            raise _misplaced(op, x, name, other)


def check_norms(op: str, x: Tensor, norms: Tensor) -> None:
    """Check the place where squared norms are added up.

    Raises:
        TypeError: if its dtype is not float64 for a float64 x, else float32.
        ValueError: if it is not two contiguous values on x's device.
    """
    dtype = norm_dtype(x.dtype)
    if norms.dtype != dtype:
        raise TypeError(
            f"{op}: norms must be {dtype_name(dtype)} with x {dtype_name(x.dtype)}, got {dtype_name(norms.dtype)}"
        )
    if norms.shape != (2,) or not norms.is_contiguous() or norms.device != x.device:
        raise ValueError(
            f"{op}: norms must be two contiguous values on {x.device}, got shape {list(norms.shape)}, strides "
            f"{list(norms.stride())} on {norms.device}"
        )


def fits(narrow: torch.dtype, wide: torch.dtype) -> bool:
    """Whether a kernel adds values of the first dtype to a stream of the second."""
    return narrow == wide or (narrow in DTYPES and narrow.itemsize < wide.itemsize)


def norm_dtype(stream: torch.dtype) -> torch.dtype:
    """In which squared norms of a stream are added up."""
    return torch.promote_types(stream, torch.float32)


def of_one_dtype(k1: Tensor, k2: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Both stages in the wider one's dtype."""
    if k2 is None or k1.dtype == k2.dtype:
        return k1, k2
    dtype = torch.promote_types(k1.dtype, k2.dtype)
    return k1.to(dtype), k2.to(dtype)


def laid_out_like(layout: Tensor, tensor: Tensor | None) -> Tensor | None:
    """The tensor, copied where its strides are not those of `layout`, a dense tensor."""
    if tensor is None or same_layout(tensor, layout):
        return tensor
    return torch.empty_like(layout, dtype=tensor.dtype).copy_(tensor)


def same_layout(a: Tensor, b: Tensor) -> bool:
    """Whether tensors of one shape lie in memory in the same order. A dimension of size 1 has no say."""
    if a.stride() == b.stride():
        return True
    return all(i == j or size == 1 for i, j, size in zip(a.stride(), b.stride(), a.shape, strict=True))


def is_dense(tensor: Tensor) -> bool:
    """Whether its values fill a stretch of memory, each place once."""
    return tensor.is_contiguous() or same_layout(tensor, torch.empty_like(tensor, device="meta"))


def apart(read: Sequence[Tensor | None], written: Sequence[Tensor]) -> list[Tensor | None]:
    """The tensors, copied where the stretch of memory that one lies in reaches into one that is written."""
    storages = [tensor.untyped_storage().data_ptr() for tensor in written]
    return [
        tensor.clone()
        if tensor is not None
        and tensor.untyped_storage().data_ptr() in storages
        and any(tensor.data_ptr() < _end(other) and other.data_ptr() < _end(tensor) for other in written)
        else tensor
        for tensor in read
    ]


def _end(tensor: Tensor) -> int:
    """The address behind its last value."""
    steps = zip(tensor.shape, tensor.stride(), strict=True)
    return tensor.data_ptr() + tensor.itemsize * (1 + sum((size - 1) * stride for size, stride in steps))


def _misplaced(op: str, x: Tensor, name: str, tensor: Tensor) -> ValueError:
    if tensor.shape != x.shape:
        return ValueError(
            f"{op}: {name} must have x's shape, got {list(tensor.shape)} with x {list(x.shape)}; nothing is broadcast: "
            f"expand {name}"
        )
    return ValueError(
        f"{op}: {name} must be on x's device, got {tensor.device} with x on {x.device}; move {name} there"
    )


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _names(dtypes: tuple[torch.dtype, ...]) -> str:
    return ", ".join(dtype_name(dtype) for dtype in dtypes)
