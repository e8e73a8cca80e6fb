"""The memory of a stack's training step with each solver."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

from torch import Tensor

from resode_cuda import ResidualStack

from ..harness import memory
from .solvers import SOLVERS


def memories(stack: ResidualStack, x: Tensor, modes: Sequence[str], depth: int) -> list[dict[str, Any]]:
    """Bytes at the peak of a step, and held between its forward and backward pass, in each mode."""
    found = []
    for mode in modes:
        SOLVERS[mode].apply(stack)
        forward = partial(_loss, stack, x)
        forward().backward()  # so that gradients have their memory
        used = memory.measure(forward, x.device)
        found.append({"depth": depth, "mode": mode, "peak_bytes": used.peak, "held_bytes": used.held})
    return found


def _loss(stack: ResidualStack, x: Tensor) -> Tensor:
    loss: Tensor = stack(x).square().mean()
    return loss
