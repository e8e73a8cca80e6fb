"""What the kernels of the depth-fused ops are handed beside states: parameters padded to their tiles, and the steps."""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
from torch import Tensor

from ..reverse import extrapolation_weights
from ..schemes import SCHEMES


def padded(parameter: Tensor, shape: Sequence[int]) -> Tensor:
    """The parameter, contiguous and aligned; a copy with zeros behind it where it is smaller than the shape."""
    parameter = parameter.detach()
    if parameter.shape == tuple(shape):
        parameter = parameter.contiguous()
        return parameter if parameter.data_ptr() % 16 == 0 else parameter.clone()
    out = parameter.new_zeros(tuple(shape))
    out[tuple(slice(size) for size in parameter.shape)] = parameter
    return out


def schedule(steps: tuple[float, ...], scheme: str, extrapolates: bool, device: torch.device) -> Tensor:
    """h, a and b of each step, float32.

    Copied for each pass, from pinned memory, which does not make the host wait. A tensor kept on the device would come
    from the pool of the CUDA graph that is recorded when it is first needed, or be freed while a graph still reads it.
    """
    return _host_schedule(steps, scheme, extrapolates, device.type == "cuda").to(device, non_blocking=True)


@functools.cache
def _host_schedule(steps: tuple[float, ...], scheme: str, extrapolates: bool, is_pinned: bool) -> Tensor:
    # For ever: graphs read it each time that they are replayed.
    rows = []
    for n, h in enumerate(steps):
        weights = (0.0, -1.0)
        if extrapolates and n < len(steps) - 2:
            weights = extrapolation_weights(SCHEMES[scheme], steps, n)
        rows.append((h, *weights))
    return torch.tensor(rows, dtype=torch.float32, device="cpu", pin_memory=is_pinned)
