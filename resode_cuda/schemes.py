"""The two schemes: how a step moves the state forward, its first guess at the way back, and its adjoint.

`blocks` are the step's blocks as functions of the state alone, in depth order; `h` is dimensionless; states keep
their shape and dtype. A step adds its increment, weight(h) (k1 + k2), to the state; the stages k1 and k2 are the
outputs of its blocks, and Euler has no k2. Everything else in the library (solver, autograd, kernels) is written
against these formulas.
Source: Sander, Ablin and Peyré, "Do Residual Neural Networks discretize Neural Ordinary Differential Equations?",
NeurIPS 2022, arXiv:2205.14612.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import ClassVar, NamedTuple, Protocol

import torch
from torch import Tensor
from torch.autograd import forward_ad

from . import ops

BlockFunction = Callable[[Tensor], Tensor]
Vjp = Callable[[Tensor], Tensor | None]
"""From the cotangent of a block's output to that of its input, None for zero; collects parameters' gradients."""
Linearize = Callable[[BlockFunction, Tensor], tuple[Tensor | None, Vjp]]
"""A block's output at a point, None where the step's last one was not evaluated to its end, and its vector-Jacobian
product there."""


class Stages(NamedTuple):
    """The outputs of a step's blocks."""

    k1: Tensor
    k2: Tensor | None = None


class StepVjp(NamedTuple):
    """A step evaluated at a point: its stages, and the product of their sum's Jacobian with a cotangent, v1 + v2."""

    stages: Stages | None
    """None where the last one was not evaluated to its end."""
    v1: Tensor | None
    v2: Tensor | None = None


class Scheme(Protocol):
    """What the solver, the adjoint and the stack ask of a scheme."""

    name: ClassVar[str]
    blocks_per_step: ClassVar[int]
    sample_point: ClassVar[float]
    """The point of its step, as a share of h, where the increment over h samples dx/dt; extrapolation needs it."""
    has_state_inside: ClassVar[bool]
    """Whether blocks add the state themselves, so that a product with their Jacobian is all of the adjoint."""

    @staticmethod
    def weight(h: float) -> float:
        """Factor of the stages' sum in the increment: h or h/2."""

    @staticmethod
    def stages(blocks: Sequence[BlockFunction], x: Tensor, h: float) -> Stages:
        """The stages of the step that starts at x."""

    @staticmethod
    def add(x: Tensor, stages: Stages, h: float) -> Tensor:
        """The state x moved by the stages of a step h; with -h, moved back."""

    @staticmethod
    def reverse_step(blocks: Sequence[BlockFunction], x_next: Tensor, h: float) -> Tensor:
        """An approximation of the state that the step led to x_next from."""

    @staticmethod
    def vjp(blocks: Sequence[BlockFunction], x: Tensor, h: float, gamma: Tensor, linearize: Linearize) -> StepVjp:
        """The stages at x, and the vector-Jacobian product of their sum with gamma.

        With gamma = weight(h) g it is the product of the increment with g.
        """


class Euler:
    """Euler's method, the step of an ordinary residual network.

    x_{n+1} = x_n + h f_n(x_n)

    The reverse step x_{n+1} - h f_n(x_{n+1}) is off by O(h^2): it takes f_n at the wrong end of the step.
    """

    name: ClassVar[str] = "euler"
    blocks_per_step: ClassVar[int] = 1
    sample_point: ClassVar[float] = 0.0
    has_state_inside: ClassVar[bool] = False

    @staticmethod
    def weight(h: float) -> float:
        return h

    @staticmethod
    def stages(blocks: Sequence[BlockFunction], x: Tensor, h: float) -> Stages:
        (f,) = blocks
        return Stages(f(x))

    @staticmethod
    def add(x: Tensor, stages: Stages, h: float) -> Tensor:
        return add(x, stages.k1, h)

    @staticmethod
    def reverse_step(blocks: Sequence[BlockFunction], x_next: Tensor, h: float) -> Tensor:
        (f,) = blocks
        return add(x_next, f(x_next), -h)

    @staticmethod
    def vjp(blocks: Sequence[BlockFunction], x: Tensor, h: float, gamma: Tensor, linearize: Linearize) -> StepVjp:
        (f,) = blocks
        k1, vjp = linearize(f, x)
        return StepVjp(None if k1 is None else Stages(k1), vjp(gamma))


class Heun:
    """Heun's method (improved Euler), the second-order scheme of Sander, Ablin and Peyré (2022).

    x_{n+1} = x_n + (h/2) (k1 + k2),   k1 = f_n(x_n),   k2 = f_{n+1}(x_n + h k1)

    N steps need N + 1 blocks; every interior block serves two steps. The reverse step is the same method run from
    x_{n+1} with -h. It is off by O(h^3) where the blocks vary smoothly with depth, by O(h^2) where they do not.
    """

    name: ClassVar[str] = "heun"
    blocks_per_step: ClassVar[int] = 2
    sample_point: ClassVar[float] = 0.5
    has_state_inside: ClassVar[bool] = False

    @staticmethod
    def weight(h: float) -> float:
        return 0.5 * h

    @staticmethod
    def stages(blocks: Sequence[BlockFunction], x: Tensor, h: float) -> Stages:
        f, f_next = blocks
        k1 = f(x)
        return Stages(k1, f_next(add(x, k1, h)))

    @staticmethod
    def add(x: Tensor, stages: Stages, h: float) -> Tensor:
        k1, k2 = stages
        assert k2 is not None
        if _is_transformed():
            return add(x, k1.to(x.dtype) + k2, 0.5 * h)
        return ops.heun_step(x, k1, k2, h)

    @staticmethod
    def reverse_step(blocks: Sequence[BlockFunction], x_next: Tensor, h: float) -> Tensor:
        f, f_next = blocks
        k1 = f_next(x_next)
        return Heun.add(x_next, Stages(k1, f(add(x_next, k1, -h))), -h)

    @staticmethod
    def vjp(blocks: Sequence[BlockFunction], x: Tensor, h: float, gamma: Tensor, linearize: Linearize) -> StepVjp:
        f, f_next = blocks
        k1, vjp = linearize(f, x)
        assert k1 is not None, "it is not the last one"
        k2, vjp_next = linearize(f_next, add(x, k1, h))
        through_k2 = vjp_next(gamma)
        stages = None if k2 is None else Stages(k1, k2)
        return StepVjp(stages, through_k2, vjp(gamma if through_k2 is None else add(gamma, through_k2, h)))


class BlockForm:
    """Euler's method with h = 1, of blocks that add the state themselves, as the layers of most models do.

    x_{n+1} = block_n(x_n),   f_n(x) = block_n(x) - x

    The forward pass is that of the blocks to the last bit, and so is the vector-Jacobian product. f_n is computed, by
    subtraction, where a state is rebuilt or measured.
    """

    name: ClassVar[str] = "euler"
    blocks_per_step: ClassVar[int] = 1
    sample_point: ClassVar[float] = 0.0
    has_state_inside: ClassVar[bool] = True

    @staticmethod
    def weight(h: float) -> float:
        return 1.0

    @staticmethod
    def stages(blocks: Sequence[BlockFunction], x: Tensor, h: float) -> Stages:
        return step(BlockForm, blocks, x, h)[1]

    @staticmethod
    def add(x: Tensor, stages: Stages, h: float) -> Tensor:
        return Euler.add(x, stages, math.copysign(1.0, h))

    @staticmethod
    def reverse_step(blocks: Sequence[BlockFunction], x_next: Tensor, h: float) -> Tensor:
        return BlockForm.add(x_next, BlockForm.stages(blocks, x_next, h), -h)

    @staticmethod
    def vjp(blocks: Sequence[BlockFunction], x: Tensor, h: float, gamma: Tensor, linearize: Linearize) -> StepVjp:
        (block,) = blocks
        x_next, vjp = linearize(block, x)
        return StepVjp(None if x_next is None else Stages(x_next.to(x.dtype) - x), vjp(gamma))


SCHEMES: dict[str, type[Scheme]] = {scheme.name: scheme for scheme in (Euler, Heun)}


def step(scheme: type[Scheme], blocks: Sequence[BlockFunction], x: Tensor, h: float) -> tuple[Tensor, Stages]:
    """The next state, and the stages that led to it."""
    if scheme.has_state_inside:
        (block,) = blocks
        x_next = block(x).to(x.dtype)
        return x_next, Stages(x_next.detach() - x.detach())
    stages = scheme.stages(blocks, x, h)
    return scheme.add(x, stages, h), stages


def add(x: Tensor, f: Tensor, h: float) -> Tensor:
    """x + h f.

    The ops are for what is neither differentiated nor compiled: torch's own addition has derivatives of every kind, and
    a compiler fuses it with what the blocks do.
    """
    if torch.compiler.is_compiling():
        # Without alpha, which Inductor drops where f is a matrix product (torch 2.13; pytorch/pytorch#167313).
        return x + h * f.to(x.dtype)
    if _is_transformed():
        return x.add(f, alpha=h)
    return ops.forward_step(x, f, h)


def _is_transformed() -> bool:
    """Whether what is computed here is differentiated, batched, compiled or traced."""
    return (
        torch.is_grad_enabled()
        or torch.compiler.is_compiling()
        or torch._C._are_functorch_transforms_active()
        or forward_ad._current_level >= 0
        or torch.jit.is_tracing()
    )


def increment(scheme: type[Scheme], stages: Stages, h: float, like: Tensor) -> Tensor:
    """What the stages of a step h add to the state, in the dtype and layout of `like`."""
    return scheme.add(torch.zeros_like(like), stages, h)
