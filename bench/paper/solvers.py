"""The ways of getting gradients that the experiments lay beside each other, and how pictures show them."""

from __future__ import annotations

from dataclasses import dataclass

from resode_cuda import ResidualStack, Reverse


@dataclass(frozen=True)
class Solver:
    reverse: Reverse | None
    """None where states are kept or computed again."""
    colour: str
    marker: str
    gradient: str = "adjoint"

    def apply(self, stack: ResidualStack) -> None:
        stack.gradient = self.gradient
        if self.reverse is not None:
            stack.reverse = self.reverse


# Okabe and Ito's colours; where the sweep of `python -m bench` has the same mode, that mode's.
SOLVERS = {
    "backprop": Solver(None, "#000000", "s", "backprop"),
    "checkpoint": Solver(None, "#666666", "D", "checkpoint"),
    "paper": Solver(Reverse("step", reuse=False), "#CC79A7", "^"),
    "corrected": Solver(Reverse("step"), "#0072B2", "o"),
    "extrapolated": Solver(Reverse("extrapolate"), "#009E73", "v"),
    "extrapolated + 1": Solver(Reverse("extrapolate", 1), "#56B4E9", "<"),
    "step + 2": Solver(Reverse("step", 2, accelerate=False), "#E69F00", "P"),
    "stored, 8 bits": Solver(Reverse("stored", bits=8), "#D55E00", "X"),
    "stored, 4 bits": Solver(Reverse("stored", bits=4), "#A0522D", "d"),
    "stored, 2 bits": Solver(Reverse("stored", bits=2), "#B8860B", "*"),
}
