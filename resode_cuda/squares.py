"""Squared norms of states, in float64: float32 would not hold the squares of what is above 1.8e19 or below 1e-19."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .layouts import is_dense

WITHOUT_FLOAT64 = ("mps", "xpu")
"""Types of devices some or all of which lack float64. Squares are float32 there."""
READ_FREELY = ("cpu",)
"""Types of devices that the host need not wait for."""
WIDENED = {"cpu": 2**18}
"""Most values that are widened at once, by device type; all at once would take two states."""
WIDENED_ELSEWHERE = 2**24
LEAST = 2.0**-80
"""A sum of squares in float32 from which on those lost below its range do not count."""


def square_dtype(device: torch.device) -> torch.dtype:
    """Dtype in which squared norms are added up on a device."""
    return torch.float32 if device.type in WITHOUT_FLOAT64 else torch.float64


def squared_norm(states: Tensor) -> Tensor:
    """|x|^2 over all values, shape []; nothing waits for the device."""
    in_other_order = not states.is_contiguous() and is_dense(states)
    flat = states.as_strided((states.numel(),), (1,)) if in_other_order else states.reshape(-1)
    dtype = square_dtype(flat.device)
    if flat.dtype == dtype:
        return flat.dot(flat)
    if flat.dtype == torch.float32 and flat.device.type in READ_FREELY:
        square = flat.dot(flat)
        if LEAST < square.item() < math.inf:
            return square.to(dtype)
    total = flat.new_zeros((), dtype=dtype)
    for part in flat.split(WIDENED.get(flat.device.type, WIDENED_ELSEWHERE)):
        wide = part.to(dtype)
        total += wide.dot(wide)
    return total
