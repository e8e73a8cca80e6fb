"""Points move along spirals: residual stacks beside torchdiffeq, which solves the same differential equation.

A stack with one block at all N places and h = 1/N is Euler's method for x' = f(x); with N blocks, for x' = f(x, t).
`odeint_adjoint` integrates another differential equation back in time, whose solution is the gradient only in the limit
of small steps. A `ResidualStack` has the gradient of the network itself, but for the error of the states that it
rebuilds, which falls with h squared for `"corrected"` and, where neighbouring blocks are alike, with h cubed for
`"extrapolated"`, at as many evaluations as checkpointing.

    python examples/spiral.py

A minute on 2 cores of an AMD EPYC, one block, N = 64: 16.25 MiB held plainly, at most 0.02 by all others. The relative
error of the gradient after training was 1e-2 by "corrected", 9e-4 by "extrapolated", 2e-1 by odeint_adjoint with Euler
steps, and 1e-2 by odeint_adjoint with adaptive ones, whose network is another one; 28, 70, 64, 47 and 35 ms a step.
"""

from __future__ import annotations

import copy
import math
from collections import Counter
from functools import partial
from typing import Any

import torch
from common import extra, mib, options, table, train
from torch import Tensor, nn

from resode_cuda import ResidualStack, smooth_init_

with extra():
    from torchdiffeq import odeint, odeint_adjoint

QUICK = {"depth": 16, "width": 16, "rows": 64, "steps": 10}
USUAL = {"depth": 64, "width": 64, "rows": 512, "steps": 100}
FULL = {"depth": 256, "width": 512, "rows": 8192, "steps": 2000}

calls: Counter[str] = Counter()


class Field(nn.Module):
    """f, a perceptron on points of the plane, which counts its calls."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.inner = nn.Sequential(nn.Linear(2, width), nn.Tanh(), nn.Linear(width, width), nn.Tanh())
        self.out = nn.Linear(width, 2)

    def forward(self, x: Tensor) -> Tensor:
        calls["f"] += 1
        return self.out(self.inner(x))


class Solved(nn.Module):
    """x(1) from x(0) for x' = f(x), by torchdiffeq."""

    def __init__(self, field: nn.Module, is_adjoint: bool, **solver: Any) -> None:
        super().__init__()
        self.field, self.is_adjoint, self.solver = field, is_adjoint, solver

    def forward(self, x: Tensor) -> Tensor:
        def f(t: Tensor, x: Tensor) -> Tensor:
            return self.field(x)

        times = torch.tensor([0.0, 1.0], device=x.device)
        if self.is_adjoint:
            return odeint_adjoint(f, x, times, adjoint_params=tuple(self.parameters()), **self.solver)[-1]
        return odeint(f, x, times, **self.solver)[-1]


def spiral(x: Tensor, decay: float = 0.3, speed: float = 5.0) -> Tensor:
    """The place of x after one unit of time, of r' = -decay r and angle' = speed / (1 + r^2)."""
    before = x.square().sum(-1, keepdim=True)
    after = before * math.exp(-2 * decay)
    angle = speed * (1 + ((1 + after) / (1 + before)).log() / (2 * decay))
    turned = torch.stack([-x[:, 1], x[:, 0]], dim=-1)
    return math.exp(-decay) * (angle.cos() * x + angle.sin() * turned)


def networks(depth: int, width: int) -> dict[str, nn.Module]:
    """Those with the same forward pass start from the same weights."""
    field = Field(width)
    fields = list(smooth_init_(ResidualStack([Field(width) for _ in range(depth)])).children())
    euler = {"method": "euler", "options": {"step_size": 1 / depth}}
    adaptive = {"method": "dopri5", "rtol": 1e-4, "atol": 1e-4}
    made = {
        "one block, plain": ResidualStack([field] * depth, gradient="backprop"),
        "one block, corrected": ResidualStack([field] * depth, reverse="corrected"),
        "one block, extrapolated": ResidualStack([field] * depth, reverse="extrapolated"),
        "one block, odeint_adjoint": Solved(field, True, **euler),
        "N blocks, plain": ResidualStack(fields, gradient="backprop"),
        "N blocks, corrected": ResidualStack(fields, reverse="corrected"),
        "N blocks, extrapolated": ResidualStack(fields, reverse="extrapolated"),
        "dopri5, plain odeint": Solved(field, False, **adaptive),
        "dopri5, odeint_adjoint": Solved(field, True, **adaptive),
    }
    return {name: copy.deepcopy(model) for name, model in made.items()}


def loss(model: nn.Module, x: Tensor) -> Tensor:
    return (model(x) - spiral(x)).square().mean()


def fresh_loss(model: nn.Module, like: Tensor) -> Tensor:
    return loss(model, torch.randn_like(like))


def gradient(model: nn.Module, x: Tensor) -> Tensor:
    return torch.cat([part.flatten() for part in torch.autograd.grad(loss(model, x), list(model.parameters()))])


def gradient_error(model: nn.Module, x: Tensor) -> float:
    """Relative, beside plain backpropagation through the same forward pass."""
    exact = copy.deepcopy(model)
    if isinstance(exact, ResidualStack):
        exact.gradient = "backprop"
    elif isinstance(exact, Solved):
        exact.is_adjoint = False
    wanted = gradient(exact, x)
    return float((gradient(model, x) - wanted).norm() / wanted.norm())


def main() -> None:
    given = options(__doc__, quick=QUICK, usual=USUAL, full=FULL)
    held_out = torch.randn(given.rows, 2).to(given.device)
    rows = []
    for name, model in networks(given.depth, given.width).items():
        model.to(given.device)
        torch.manual_seed(given.seed)
        run = train(model, partial(fresh_loss, model, held_out), given.steps, rate=1e-2)
        distance = loss(model, held_out).item() ** 0.5
        error = gradient_error(model, held_out)
        calls.clear()
        gradient(model, held_out)
        cells = f"{distance:.3f}", f"{error:.0e}", str(calls["f"]), mib(run.held), f"{1000 * run.seconds:.0f}"
        rows.append([name, *cells])
    print(table(["", "error", "gradient error", "evaluations", "MiB held", "ms a step"], rows))


if __name__ == "__main__":
    main()
