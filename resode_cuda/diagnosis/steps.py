"""What one step of a network is like: how far it moves the state, how steep it is, how it looks from next door."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from .probe import Probe


class StepFacts(NamedTuple):
    """One step at one batch. Norms are those of the whole batch."""

    n: int
    h: float
    size: float
    """|d_n| / |x_n|, the increment beside the state."""
    steepness: float
    """The spectral norm of the increment's Jacobian, h L for Euler, from below. Below 1 the reverse iteration
    converges, the faster the smaller it is."""
    turn: float
    """|d_n / h_n - d_{n-1} / h_{n-1}| / |d_n / h_n|, which extrapolation needs to be small; 0 for the first step."""
    gap: float
    """|y - x_n| / |x_n| for the reverse step's guess y from the exact x_{n+1}."""
    switched: float
    """Share of the units with a kink (ReLU and its like) that lie on one side of it at x_n, on the other at y. They
    limit what corrections can do."""


def facts_of_steps(probe: Probe) -> list[StepFacts]:
    """The facts of each step."""
    found: list[StepFacts] = []
    rate_before: Tensor | None = None
    for n, h in enumerate(probe.stack.steps):
        x = probe.states[n]
        d, y = probe.states[n + 1] - x, probe.reverse_point(n)
        rate = d / h
        turn = 0.0 if rate_before is None else _share(rate - rate_before, rate)
        switched = _switched(_sides(probe, n, x), _sides(probe, n, y))
        found.append(StepFacts(n, h, _share(d, x), probe.steepness(n), turn, _share(y - x, x), switched))
        rate_before = rate
    return found


def has_kinks(probe: Probe) -> bool:
    """Whether a block computes a ReLU or its like."""
    return any(_sides(probe, n, probe.states[n]) for n in range(len(probe.stack.steps)))


def _share(part: Tensor, whole: Tensor) -> float:
    size = whole.norm().item()
    return part.norm().item() / size if size else 0.0


def _sides(probe: Probe, n: int, x: Tensor) -> list[Tensor]:
    """For each operation with a kink in step n at x, which of its inputs are above it."""
    with _Kinks() as kinks:
        probe.increment(n, x)
    return kinks.sides


def _switched(here: Sequence[Tensor], there: Sequence[Tensor]) -> float:
    units = sum(sides.numel() for sides in here)
    if len(here) != len(there) or not units:
        return 0.0
    return sum((a != b).sum().item() for a, b in zip(here, there, strict=True) if a.shape == b.shape) / units


_KINKED = {
    getattr(torch.ops.aten, name) for name in ("relu", "relu_", "leaky_relu", "leaky_relu_", "_prelu_kernel", "abs")
}
"""Operations with a kink at zero."""


class _Kinks(TorchDispatchMode):
    """Notes on which side of their kinks units lie, whether modules or functions compute them."""

    def __init__(self) -> None:
        super().__init__()
        self.sides: list[Tensor] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.overloadpacket in _KINKED:
            self.sides.append(args[0] > 0)
        return func(*args, **(kwargs or {}))
