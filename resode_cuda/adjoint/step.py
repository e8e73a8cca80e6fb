"""One step of the adjoint without its blocks: what it saves, and what it hands to the step before it.

Used by the autograd node (`node`) and by the one that a compiler can trace (`traced`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import ops
from ..method import Method
from ..reverse import extrapolate, predict
from ..schemes import BlockFunction, Scheme, Stages, StepVjp, add, increment
from .drift import DriftMonitor


class Trajectory(NamedTuple):
    """What is known of the states when the backward pass reaches step n."""

    x_next: Tensor
    """The rebuilt x_{n+1}; of stored increments the companion c_{n+1}."""
    predicted: Tensor | None
    """y, the prediction of x_n; None where the reverse step has to predict."""
    d_next: Tensor | None
    """The increment d_{n+1}; for the last step d_{N-2}; None where the solver does not extrapolate, or where the
    backward pass began with this step."""


class BackwardUpdate(NamedTuple):
    """What step n's backward pass leaves for step n - 1."""

    x: Tensor
    """The rebuilt x_n."""
    cotangents: tuple[Tensor | None, ...]
    """The shadows' cotangents: x_n and, with extrapolation, the prediction of x_{n-1} and the increment d_n. None where
    too few increments are known to predict from."""
    gamma: Tensor | None
    """The adjoint gamma_n, or g_0 at the beginning of the stack; None where it is not needed."""


@dataclass(frozen=True)
class Step:
    """Step n of a stack."""

    method: Method
    n: int

    @property
    def scheme(self) -> type[Scheme]:
        return self.method.scheme

    @property
    def h(self) -> float:
        return self.method.steps[self.n]

    @property
    def is_last(self) -> bool:
        return self.n == len(self.method) - 1

    @property
    def is_anchored(self) -> bool:
        """Whether its exact x_n is kept."""
        return self.method.is_anchored(self.n)

    @property
    def is_rebuilt(self) -> bool:
        """Whether x_n is x_{n+1} less the increment at y; else it is y itself."""
        return self.method.reuses and not self.is_anchored

    @property
    def is_stored(self) -> bool:
        """Whether its increment is stored in a few bits."""
        return self.method.is_stored(self.n)

    @property
    def ends_segment(self) -> bool:
        """Whether the companion, which starts afresh at kept states, ends with this step."""
        return self.method.ends_segment(self.n)

    @property
    def is_result_saved(self) -> bool:
        """Whether the backward pass finds x_{n+1} as a saved tensor: the result of the stack, or an anchor."""
        return self.is_last or self.method.is_anchored(self.n + 1)

    @property
    def shadow_count(self) -> int:
        return shadow_count(self.method)

    @property
    def weights_before(self) -> tuple[float, float] | None:
        """Weights by which d_n and d_{n+1} predict step n - 1; None where nothing is extrapolated."""
        return self.method.weights[self.n - 1] if self.method.extrapolates and self.n else None

    @property
    def weight_before(self) -> float:
        """w_{n-1}, the factor of g_n in gamma_n."""
        return self.scheme.weight(self.method.steps[self.n - 1])

    @property
    def adjoint_scales(self) -> tuple[float, float]:
        """(s, t) such that s gamma_{n+1} + t (v1 + v2) is gamma_n or, at the beginning of the stack, g_0."""
        weight = self.scheme.weight(self.h)
        if self.n == 0:
            return 1 / weight, 1.0
        return self.weight_before / weight, self.weight_before

    def predict(self, blocks: Sequence[BlockFunction], trajectory: Trajectory) -> Tensor:
        """The point y at which the step is evaluated, where x_n is not kept."""
        x_next, predicted = trajectory.x_next, trajectory.predicted
        return predict(self.method.solver, self.scheme, blocks, x_next, self.h, predicted)

    def saved_for_last(self, x_next: Tensor, stages: Stages, shadows: Sequence[Tensor | None]) -> list[Tensor]:
        """x_N and, to extrapolate, d_{N-1} and d_{N-2}, the last shadow, where this is the last step; else nothing."""
        if not self.is_last:
            return []
        if not self.method.extrapolates:
            return [x_next]
        d_before = [shadow for shadow in shadows[-1:] if shadow is not None]
        return [x_next, increment(self.scheme, stages, self.h, x_next), *d_before]

    def shadows(self, x: Tensor, stages: Stages, blank: Tensor) -> list[Tensor]:
        """The shadows for the next step, without storage but for d_{N-2}, which the last step is to save."""
        if self.is_last:
            return []
        following = [blank.expand(x.shape) for _ in range(self.shadow_count)]
        if self.method.extrapolates and self.n == len(self.method) - 2:
            following[-1] = increment(self.scheme, stages, self.h, x)
        return following


@lru_cache(maxsize=64)
def steps_of(method: Method) -> tuple[Step, ...]:
    """All its steps."""
    return tuple(Step(method, n) for n in range(len(method)))


def shadow_count(method: Method) -> int:
    """Number of shadows between two steps."""
    if method.solver.is_stored:
        return 2
    return 3 if method.extrapolates else 1


def trajectory_at_the_end(step: Step, saved: Sequence[Tensor]) -> Trajectory:
    """The last step's, from what it saved. Its prediction is exact."""
    x_last = saved[0].detach()  # blocks are evaluated there, and must not take it for one that has gradients
    if not step.method.extrapolates:
        return Trajectory(x_last, None, None)
    return Trajectory(x_last, add(x_last, saved[1], -1.0), saved[2] if len(saved) == 3 else None)


def trajectory_from(cotangents: Sequence[Tensor | None], shape: torch.Size, dtype: torch.dtype) -> Trajectory:
    """Any other step's, from the cotangents of its shadows, which the step after it left.

    Args:
        shape, dtype: of the rebuilt states.
    """
    x_next, predicted, d_next = (*cotangents, None, None)[:3]
    if x_next is None or x_next.shape != shape or x_next.dtype != dtype:
        raise RuntimeError(
            "ResidualStack: the rebuilt state must reach every step as a cotangent of the state's shape and dtype, got "
            f"{None if x_next is None else (list(x_next.shape), x_next.dtype)}; run autograd over the whole stack, and "
            "report this if you did"
        )
    return Trajectory(x_next, predicted, d_next)


def backward_update(
    step: Step,
    trajectory: Trajectory,
    y: Tensor,
    evaluated: StepVjp,
    gamma: Tensor | None,
    weights: tuple[float, float] | None,
) -> BackwardUpdate:
    """The state, predictions and adjoint for step n - 1, from the step's evaluation at y.

    Args:
        gamma: gamma_{n+1}; None where gamma_n is not needed.
        weights: `step.weights_before`; None where nothing is rebuilt any more.
    """
    stages, x = evaluated.stages, y
    if step.is_rebuilt:
        assert stages is not None
        x = step.scheme.add(trajectory.x_next, stages, -step.h)
    if gamma is not None and step.scheme.has_state_inside:
        gamma = torch.zeros_like(gamma) if evaluated.v1 is None else evaluated.v1
    elif gamma is not None:
        gamma_scale, v_scale = step.adjoint_scales
        gamma = gamma if gamma_scale == 1 else gamma_scale * gamma
        for v in (evaluated.v1, evaluated.v2):
            gamma = gamma if v is None else add(gamma, v, v_scale)
    return BackwardUpdate(x, _cotangents(step, x, trajectory.d_next, stages, weights), gamma)


def backward_update_(
    step: Step,
    trajectory: Trajectory,
    y: Tensor,
    evaluated: StepVjp,
    gamma: Tensor | None,
    weights: tuple[float, float] | None,
    monitor: DriftMonitor,
) -> BackwardUpdate:
    """`backward_update` by the ops that mutate, each buffer read and written once, and the defect's squares with it."""
    stages, weight = evaluated.stages, step.scheme.weight(step.h)
    x_next, d_next = trajectory.x_next, trajectory.d_next
    adjoint, gamma = _adjoint_operands(step, evaluated, gamma, y.dtype)
    if not step.is_rebuilt:
        if not (step.is_anchored or step.is_stored):
            monitor.record(step.n, y)
        if adjoint is not NO_ADJOINT:
            ops.adjoint_update_(*adjoint)
        return BackwardUpdate(y, _cotangents(step, y, d_next, stages, weights), gamma)
    assert stages is not None, "the step is rebuilt from them"
    squares = monitor.row(step.n)
    if weights is None:
        ops.reverse_update_(x_next, y, *stages, weight, squares, *adjoint)
        return BackwardUpdate(x_next, (x_next,), gamma)
    if d_next is None:
        d = increment(step.scheme, stages, step.h, x_next)
        ops.reverse_update_(x_next, y, *stages, weight, squares, *adjoint)
        return BackwardUpdate(x_next, (x_next, None, d), gamma)
    ops.reverse_extrapolate_(x_next, y, d_next, *stages, weight, *weights, squares, *adjoint)
    return BackwardUpdate(x_next, (x_next, y, d_next), gamma)


NO_ADJOINT = (None, None, None, 1.0, 1.0)
"""Operands of an update that leaves the adjoint alone."""


def _adjoint_operands(
    step: Step, evaluated: StepVjp, gamma: Tensor | None, dtype: torch.dtype
) -> tuple[tuple[Any, ...], Tensor | None]:
    """Operands that update the adjoint in place along with states of this dtype, and what it is afterwards."""
    if gamma is None:
        return NO_ADJOINT, None
    if step.scheme.has_state_inside:
        return NO_ADJOINT, torch.zeros_like(gamma) if evaluated.v1 is None else evaluated.v1
    operands = gamma, evaluated.v1, evaluated.v2, *step.adjoint_scales
    if gamma.dtype == dtype:
        return operands, gamma
    ops.adjoint_update_(*operands)
    return NO_ADJOINT, gamma


def _cotangents(
    step: Step, x: Tensor, d_next: Tensor | None, stages: Stages | None, weights: tuple[float, float] | None
) -> tuple[Tensor | None, ...]:
    if weights is None:
        return (x,)
    assert stages is not None, "increments are needed to predict"
    d = increment(step.scheme, stages, step.h, x)
    return x, None if d_next is None else extrapolate(weights, x, d, d_next), d
