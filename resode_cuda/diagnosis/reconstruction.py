"""How far x_0 is from what each scheme and solver rebuilds of it, from x_N alone."""

from __future__ import annotations

from typing import NamedTuple

import torch

from ..adjoint.inventory import submodules
from ..adjoint.replay import protect
from ..adjoint.restoration import restoring
from ..reverse import Reverse
from ..schemes import SCHEMES
from ..stack import ResidualStack
from .probe import Probe

SOLVERS = {
    "paper": Reverse("step", reuse=False),
    "corrected": Reverse("step"),
    "step + 1 correction": Reverse("step", corrections=1),
    "step + 2 corrections": Reverse("step", corrections=2),
    "extrapolated": Reverse("extrapolate"),
    "extrapolate + 1 correction": Reverse("extrapolate", corrections=1),
}


class Reconstruction(NamedTuple):
    """A scheme and solver."""

    scheme: str
    solver: str
    error: float
    """|rebuilt x_0 - x_0| / |x_0|."""


def reconstructions(probe: Probe) -> list[Reconstruction]:
    """The errors of the stack's scheme, and of the others over the same time, as far as it has the blocks for them."""
    found = []
    for name, scheme in SCHEMES.items():
        steps = len(probe.stack) + 1 - scheme.blocks_per_step
        if name == probe.stack.scheme:
            stack = probe.stack
        elif probe.stack.form == "residual" and steps >= 1:
            step = sum(probe.stack.steps) / steps
            stack = ResidualStack(list(probe.stack), name, step=step, auxiliary=probe.stack.auxiliary)
        else:
            continue
        found += [Reconstruction(name, solver, _error(probe, stack, of)) for solver, of in SOLVERS.items()]
    return found


def _error(probe: Probe, stack: ResidualStack, solver: Reverse) -> float:
    x = probe.states[0]

    def rebuilt() -> torch.Tensor:
        protect(submodules((stack,)), x.device)
        stack.reverse = solver
        out = stack(x, *probe.args, **probe.kwargs)
        last = out[0] if isinstance(out, tuple) else out
        return stack.invert(last, *probe.args, **probe.kwargs)

    before = stack.reverse
    with torch.no_grad():
        try:
            difference = restoring(rebuilt) - x
        finally:
            stack.reverse = before
    size = x.norm().item()
    return difference.norm().item() / size if size else 0.0
