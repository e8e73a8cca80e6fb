"""The reverse solver: how x_n is rebuilt from x_{n+1}.

One reverse step predicts y, corrects it k times by the fixed-point iteration y <- x_{n+1} - Phi_n(y), and hands y to
the adjoint, which evaluates Phi_n(y) anyway for its vector-Jacobian product. With reuse that evaluation also gives
the rebuilt state, x_n = x_{n+1} - Phi_n(y): one more correction that costs nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .schemes import BlockFunction, Scheme

PREDICTORS = ("step", "extrapolate")


@dataclass(frozen=True)
class Reverse:
    """A reverse solver: predictor, corrections, and whether the adjoint's own evaluation is reused.

    Args:
        predictor: `"step"` runs the scheme backwards from x_{n+1}, one more evaluation of the increment per step;
            `"extrapolate"` takes the increment expected from the two later steps, no evaluation. It needs weights that
            vary smoothly with depth.
        corrections: fixed-point iterations y <- x_{n+1} - Phi_n(y) after the predictor, >= 0. Each costs one
            evaluation per step and gains one order in h where h times the block's Lipschitz constant is below 1; above
            1 they diverge.
        reuse: take x_n = x_{n+1} - Phi_n(y) from the evaluation that the vector-Jacobian product needs anyway, and
            measure the defect |y - x_n| / |x_n|. Without it x_n = y and there is no defect, as in arXiv:2205.14612.

    The presets of `ResidualStack(reverse=...)`, with the order in h of the gradient's relative error, measured for
    weights smooth in depth, and the evaluations of the increment per backward step:

        "paper"         Reverse("step", reuse=False)   Euler 1, Heun 3   2 evaluations
        "corrected"     Reverse("step")                Euler 2, Heun 4   2 evaluations
        "extrapolated"  Reverse("extrapolate")         Euler 3, Heun 3   1 evaluation, as many as checkpointing

    Raises:
        ValueError: for an unknown predictor, negative corrections, or extrapolation without reuse.
        TypeError: if corrections is not an integer or reuse not a bool.
    """

    predictor: str = "step"
    corrections: int = 0
    reuse: bool = True

    def __post_init__(self) -> None:
        if self.predictor not in PREDICTORS:
            raise ValueError(f"Reverse: predictor must be one of {PREDICTORS}, got {self.predictor!r}")
        if not isinstance(self.corrections, int) or isinstance(self.corrections, bool):
            raise TypeError(f"Reverse: corrections must be an integer, got {self.corrections!r}; use 0, 1, 2, ...")
        if self.corrections < 0:
            raise ValueError(f"Reverse: corrections must be >= 0, got {self.corrections}; use 0 for none")
        if not isinstance(self.reuse, bool):
            raise TypeError(f"Reverse: reuse must be True or False, got {self.reuse!r}")
        if self.predictor == "extrapolate" and not self.reuse:
            raise ValueError(
                'Reverse: predictor="extrapolate" needs reuse=True, got reuse=False; it continues the increments '
                "that reuse keeps"
            )

    @property
    def extrapolates(self) -> bool:
        return self.predictor == "extrapolate"


PRESETS = {
    "paper": Reverse("step", reuse=False),
    "corrected": Reverse("step"),
    "extrapolated": Reverse("extrapolate"),
}


def solver_from(reverse: str | Reverse) -> Reverse:
    """The solver that `ResidualStack(reverse=...)` names."""
    if isinstance(reverse, Reverse):
        return reverse
    if isinstance(reverse, str) and reverse in PRESETS:
        return PRESETS[reverse]
    raise ValueError(f"ResidualStack: reverse must be one of {tuple(PRESETS)} or a Reverse, got {reverse!r}")


def predict(
    solver: Reverse,
    scheme: type[Scheme],
    blocks: Sequence[BlockFunction],
    x_next: Tensor,
    h: float,
    expected: Tensor | None,
    out: Tensor | None = None,
) -> Tensor:
    """The point y at which the adjoint evaluates the step that led to x_next.

    `expected` is the increment expected of this step, None where the reverse step has to predict. `out` may be
    overwritten with y; it may be `expected` itself.
    """
    y = scheme.reverse_step(blocks, x_next, h) if expected is None else torch.sub(x_next, expected, out=out)
    for _ in range(solver.corrections):
        y = x_next - scheme.increment(blocks, y, h)
    return y


def extrapolation_weights(scheme: type[Scheme], steps: Sequence[float], n: int) -> tuple[float, float]:
    """(a, b) such that step n is expected to add a d_{n+1} - b d_{n+2}.

    The rates d/h of the two later steps are continued linearly to step n in the time t_n = h_0 + ... + h_{n-1}; equal
    steps give (2, 1).
    """
    h, h1, h2 = steps[n : n + 3]
    here, later = scheme.sample_point, 1 - scheme.sample_point
    ratio = (later * h + here * h1) / (later * h1 + here * h2)
    return (1 + ratio) * h / h1, ratio * h / h2


def extrapolate(weights: tuple[float, float], d_next: Tensor, d_after: Tensor, out: Tensor | None = None) -> Tensor:
    """The increment a d_{n+1} - b d_{n+2} expected of step n, from those of the two later steps."""
    a, b = weights
    if a - b == 1:  # equal steps: one pass
        return torch.lerp(d_after, d_next, a, out=out)
    return torch.mul(d_next, a, out=out).sub_(d_after, alpha=b)
