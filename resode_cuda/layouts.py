"""How tensors lie in memory, which kernels that walk through it must know."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


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
    """The tensors to be read, copied where the memory of one overlaps that of a dense tensor to be written.

    A sparse one has no memory of its own in that sense.
    """
    storages = [tensor.untyped_storage().data_ptr() for tensor in written]
    return [
        tensor.clone()
        if tensor is not None
        and tensor.layout == torch.strided
        and tensor.untyped_storage().data_ptr() in storages
        and any(tensor.data_ptr() < _end(other) and other.data_ptr() < _end(tensor) for other in written)
        else tensor
        for tensor in read
    ]


def _end(tensor: Tensor) -> int:
    """The address after its last value."""
    extents = zip(tensor.shape, tensor.stride(), strict=True)
    return tensor.data_ptr() + tensor.itemsize * (1 + sum((size - 1) * stride for size, stride in extents))
