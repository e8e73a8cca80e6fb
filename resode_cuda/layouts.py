"""How tensors lie in memory, which kernels that walk through it must know."""

from __future__ import annotations

import sys
from collections.abc import Collection, Sequence

import torch
from torch import Tensor, nn


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


def is_distributed(tensor: Tensor) -> bool:
    """Whether it is a DTensor, of which each rank has a part or a copy."""
    if type(tensor) in (Tensor, nn.Parameter):
        return False
    return isinstance(tensor, getattr(sys.modules.get("torch.distributed.tensor"), "DTensor", ()))


def in_memory(tensor: Tensor) -> list[Tensor]:
    """The tensors that have a tensor's values: itself, or what it wraps, such as this rank's part of a DTensor."""
    if type(tensor) is Tensor or not hasattr(tensor, "__tensor_flatten__"):
        return [tensor]
    names, _ = tensor.__tensor_flatten__()
    inside = (getattr(tensor, name) for name in names)
    return [part for inner in inside if isinstance(inner, Tensor) for part in in_memory(inner)]


def apart(read: Sequence[Tensor | None], written: Sequence[Tensor]) -> list[Tensor | None]:
    """The tensors to be read, copied where the memory of one overlaps that of a dense tensor to be written.

    A sparse one has no memory of its own in that sense.
    """
    places = [place for tensor in written for place in in_memory(tensor)]
    storages = {place.untyped_storage().data_ptr() for place in places}
    return [
        tensor.clone()
        if tensor is not None and any(_overlaps(part, places, storages) for part in in_memory(tensor))
        else tensor
        for tensor in read
    ]


def _overlaps(tensor: Tensor, others: Sequence[Tensor], storages: Collection[int]) -> bool:
    """Whether its memory is that of one of the others, which have these storages."""
    if tensor.layout != torch.strided or tensor.untyped_storage().data_ptr() not in storages:
        return False
    return any(tensor.data_ptr() < _end(other) and other.data_ptr() < _end(tensor) for other in others)


def _end(tensor: Tensor) -> int:
    """The address after its last value."""
    extents = zip(tensor.shape, tensor.stride(), strict=True)
    return tensor.data_ptr() + tensor.itemsize * (1 + sum((size - 1) * stride for size, stride in extents))
