"""The ordinary differential equation that a residual network discretises, and how far the network is from it.

    dx/dt = f(t, x),   f(t_n, x) = f_n(x),   t_n = h_0 + ... + h_{n-1}

Between t_n and t_{n+1} the parameters of f are those of the blocks n and n + 1, interpolated linearly; past the last
block they are its own. For Euler's method with steps of at most h, over a time T,

    |x_n - x(t_n)| <= h (e^{LT} - 1) / (2L) C,    C = max |d^2 x / dt^2| = max |df/dt + (df/dx) f|,

L being f's Lipschitz constant in x; with h = 1/N and T = 1 that is the bound (e^L - 1) C / (2 N L) of Sander, Ablin and
Peyré, NeurIPS 2022, arXiv:2205.14612. It takes every step for the worst one, and a flow that turns for one that
stretches. The same reasoning, step by step, is closer:

    e_{n+1} <= |I + h_n J_n| e_n + h_n^2 C_n / 2,   e_0 = 0,

J_n being the Jacobian of f_n at x_n and C_n the second derivative's size in step n. Norms are those of a whole batch.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..initialize import parameters_of_blocks
from .probe import Probe

TOLERANCE = 1e-8
"""The error that the solver may make, relative to the state."""
TOLERANCE_AT_KINKS = 1e-4
"""The same for blocks with kinks, across which a method of high order takes no long steps: 160 evaluations of a block
instead of 2,500 on a digits net of ReLUs."""
SHORT = 1e-6
"""Time over which the second derivative is a difference quotient, as a share of a step."""


class FlowFacts(NamedTuple):
    """A network beside its differential equation."""

    distances: list[float]
    """|x_n - x(t_n)| / |x_n| of each state from x_1 on."""
    farthest: float
    """The largest |x_n - x(t_n)|, relative to the size of x_0: what the bounds are of."""
    curvature: float
    """C, relative to the size of x_0."""
    lipschitz: float
    """L, the largest spectral norm of a block's Jacobian along the way, from below."""
    bound: float | None
    """The bound (e^{LT} - 1) h C / (2 L), relative to x_0's size; None for other schemes than Euler's."""
    close_bound: float | None
    """The same, step by step."""


def follow_flow(probe: Probe, lipschitz: float, tolerance: float = TOLERANCE) -> FlowFacts:
    """Solve the differential equation from x_0, and compare.

    Args:
        tolerance: the error that the solver may make in each step, relative to the state.

    Raises:
        ImportError: without torchdiffeq.
        ValueError: for blocks whose parameters can't be interpolated.
    """
    from torchdiffeq import odeint

    flow = _Flow(probe)
    x, size = probe.states[0], probe.states[0].norm().item()
    distances, curvatures, farthest = [], [], 0.0
    settings: dict[str, Any] = {
        "method": "dopri8",
        "rtol": tolerance,
        "atol": tolerance * size / math.sqrt(max(1, x.numel())),
    }
    for n, h in enumerate(probe.stack.steps):

        def velocity(s: Tensor, x: Tensor, n: int = n, h: float = h) -> Tensor:
            return flow(n, s.item() / h, x)

        span = x.new_tensor([0.0, h])
        # Else it steps over the end, and interpolates back with an error of its own.
        y = odeint(velocity, x, span, options={"step_t": span[1:]}, **settings)[-1]
        curvatures.append(max(flow.curvature(n, 0.0, x), flow.curvature(n, 1.0 - SHORT, y)))
        x = y
        exact = probe.states[n + 1]
        apart = (exact - x).norm().item()
        distances.append(apart / exact.norm().item())
        farthest = max(farthest, apart / size)
    of_all = of_each = None
    if probe.method.scheme.blocks_per_step == 1:
        of_all = _bound(probe, lipschitz, max(curvatures)) / size
        of_each = _close_bound(probe, curvatures) / size
    return FlowFacts(distances, farthest, max(curvatures) / size, lipschitz, of_all, of_each)


def _bound(probe: Probe, lipschitz: float, curvature: float) -> float:
    steps = probe.stack.steps
    time = sum(steps)
    growth = math.expm1(min(lipschitz * time, 700.0)) / (2 * lipschitz) if lipschitz else time / 2
    return max(steps) * growth * curvature


def _close_bound(probe: Probe, curvatures: list[float]) -> float:
    error = largest = 0.0
    for n, (h, curvature) in enumerate(zip(probe.stack.steps, curvatures, strict=True)):
        error = probe.growth(n) * error + h * h / 2 * curvature
        largest = max(largest, error)
    return largest


class _Flow:
    """f(t, x)."""

    def __init__(self, probe: Probe) -> None:
        self._probe = probe
        self._parameters = parameters_of_blocks("diagnose", probe.stack)

    def __call__(self, n: int, share: float, x: Tensor) -> Tensor:
        """f at this share of step n."""
        here = self._parameters[n]
        after = self._parameters[min(n + 1, len(self._parameters) - 1)]
        between = {name: torch.lerp(here[name], after[name], share) for name in here}
        return self._probe.velocity(n, between, x)

    def curvature(self, n: int, share: float, x: Tensor) -> float:
        """|d^2 x / dt^2|."""
        h = self._probe.stack.steps[n]
        here = self(n, share, x)
        moved = self(n, share + SHORT, x + SHORT * h * here)
        return ((moved - here).norm() / (SHORT * h)).item()
