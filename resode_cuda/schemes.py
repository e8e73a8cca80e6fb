"""The two schemes: how a step moves the state forward, and its first guess at the way back.

`blocks` are the step's blocks as functions of the state alone, in depth order; `h` is dimensionless; states keep
their shape and dtype. Everything else in the library (solver, autograd, kernels) is written against these formulas.
Source: Sander, Ablin and Peyré, "Do Residual Neural Networks discretize Neural Ordinary Differential Equations?",
NeurIPS 2022, arXiv:2205.14612.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import ClassVar, Protocol

from torch import Tensor

BlockFunction = Callable[[Tensor], Tensor]


class Scheme(Protocol):
    """What the solver and the stack ask of a scheme."""

    name: ClassVar[str]
    blocks_per_step: ClassVar[int]
    sample_point: ClassVar[float]
    """Where in its step, as a share of h, the increment divided by h samples dx/dt; extrapolation needs it."""

    @staticmethod
    def increment(blocks: Sequence[BlockFunction], x: Tensor, h: float) -> Tensor:
        """The increment of the step that starts at x."""

    @staticmethod
    def reverse_step(blocks: Sequence[BlockFunction], x_next: Tensor, h: float) -> Tensor:
        """An approximation of the state that the step led to x_next from."""


class Euler:
    """Euler's method, the step of an ordinary residual network.

    x_{n+1} = x_n + h f_n(x_n)

    The reverse step x_{n+1} - h f_n(x_{n+1}) is off by O(h^2): it takes f_n at the wrong end of the step.
    """

    name: ClassVar[str] = "euler"
    blocks_per_step: ClassVar[int] = 1
    sample_point: ClassVar[float] = 0.0

    @staticmethod
    def increment(blocks: Sequence[BlockFunction], x: Tensor, h: float) -> Tensor:
        (f,) = blocks
        return h * f(x)

    @staticmethod
    def reverse_step(blocks: Sequence[BlockFunction], x_next: Tensor, h: float) -> Tensor:
        (f,) = blocks
        return x_next - h * f(x_next)


class Heun:
    """Heun's method (improved Euler), the second-order scheme of Sander, Ablin and Peyré (2022).

    x_{n+1} = x_n + (h/2) (k1 + k2),   k1 = f_n(x_n),   k2 = f_{n+1}(x_n + h k1)

    N steps need N + 1 blocks; every interior block serves two steps. The reverse step is the same method run from
    x_{n+1} with -h. It is off by O(h^3) where the blocks vary smoothly with depth, by O(h^2) where they do not.
    """

    name: ClassVar[str] = "heun"
    blocks_per_step: ClassVar[int] = 2
    sample_point: ClassVar[float] = 0.5

    @staticmethod
    def increment(blocks: Sequence[BlockFunction], x: Tensor, h: float) -> Tensor:
        f, f_next = blocks
        k1 = f(x)
        k2 = f_next(x + h * k1)
        return 0.5 * h * (k1 + k2)

    @staticmethod
    def reverse_step(blocks: Sequence[BlockFunction], x_next: Tensor, h: float) -> Tensor:
        f, f_next = blocks
        k1 = f_next(x_next)
        k2 = f(x_next - h * k1)
        return x_next - 0.5 * h * (k1 + k2)


SCHEMES: dict[str, type[Scheme]] = {scheme.name: scheme for scheme in (Euler, Heun)}
