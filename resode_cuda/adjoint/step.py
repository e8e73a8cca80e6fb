"""What one step of the adjoint needs beside its blocks: which step it is, and what it hands on to the step before.

Used by the autograd node (`adjoint`) and by the one that a compiler can trace (`traced`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from .. import ops
from ..reverse import Reverse, extrapolate, extrapolation_weights
from ..schemes import Scheme, Stages, add, increment
from .drift import DriftMonitor


@dataclass(frozen=True)
class Step:
    """Step n of a stack."""

    n: int
    is_last: bool
    is_second_last: bool
    is_anchored: bool
    """Its exact x_n is kept."""
    is_result_saved: bool
    """By this step or, as its anchor, by the next one: a rebuilt x_{n+1} is then that tensor."""
    scheme: type[Scheme]
    solver: Reverse
    h: float
    h_before: float | None
    """Of step n - 1."""
    weights: tuple[float, float] | None
    """With which step n - 1 is extrapolated from this step's increment and the next one's."""

    @property
    def is_rebuilt(self) -> bool:
        """x_n is x_{n+1} less the increment at y; else it is y itself."""
        return self.solver.reuse and not self.is_anchored

    @property
    def shadow_count(self) -> int:
        return shadow_count(self.solver)

    @property
    def adjoint_scales(self) -> tuple[float, float]:
        """(s, t) such that this step hands on s gamma_{n+1} + t v, v the product of its stages' sum with gamma_{n+1}:
        gamma_n, or at the beginning of the stack g_0."""
        weight = self.scheme.weight(self.h)
        if self.h_before is None:
            return 1 / weight, 1.0
        before = self.scheme.weight(self.h_before)
        return before / weight, before

    def ends(
        self, x: Tensor, x_next: Tensor, stages: Stages, shadows: Sequence[Tensor | None], blank: Tensor
    ) -> tuple[list[Tensor], tuple[Tensor, ...]]:
        """What the forward pass keeps at its end, and the shadows for the step that follows.

        The last step keeps x_N and, to extrapolate, d_{N-1} and d_{N-2}, which step N - 2 gives it as its last shadow.
        """
        if not self.is_last:
            following = [blank.expand(x.shape) for _ in range(self.shadow_count)]
            if self.is_second_last and self.solver.extrapolates:
                following[-1] = increment(self.scheme, stages, self.h, x)
            return [], tuple(following)
        if not self.solver.extrapolates:
            return [x_next], ()
        d_before = [shadow for shadow in shadows[-1:] if shadow is not None]
        return [x_next, increment(self.scheme, stages, self.h, x), *d_before], ()


def steps_of(scheme: type[Scheme], solver: Reverse, lengths: Sequence[float], anchors: int | None) -> list[Step]:
    """The steps of a stack, from the first to the last.

    Args:
        lengths: h of each.
        anchors: the exact state is kept at every step n divisible by it; None keeps x_N alone.
    """
    last = len(lengths) - 1
    return [
        Step(
            n=n,
            is_last=n == last,
            is_second_last=n == last - 1,
            is_anchored=anchors is not None and n % anchors == 0,
            is_result_saved=n == last or (anchors is not None and (n + 1) % anchors == 0),
            scheme=scheme,
            solver=solver,
            h=h,
            h_before=lengths[n - 1] if n else None,
            weights=_weights_before(scheme, lengths, n) if solver.extrapolates and n else None,
        )
        for n, h in enumerate(lengths)
    ]


def _weights_before(scheme: type[Scheme], lengths: Sequence[float], n: int) -> tuple[float, float]:
    # The last step knows d_{N-2} from the forward pass, in the place where the others have d_{n+1}.
    return (0.0, -1.0) if n == len(lengths) - 1 else extrapolation_weights(scheme, lengths, n - 1)


def shadow_count(solver: Reverse) -> int:
    """How many tensors travel back from step to step beside the adjoint."""
    return 3 if solver.extrapolates else 1


Known = tuple[Tensor, Tensor | None, Tensor | None]
"""x_{n+1}; with extrapolation also y, the prediction of x_n, and d_{n+1}."""


def known_at_the_end(step: Step, end: Sequence[Tensor]) -> Known:
    """From x_N and, with extrapolation, d_{N-1} and d_{N-2}, which the last step keeps. Its prediction is exact."""
    x_last = end[0]
    if not step.solver.extrapolates:
        return x_last, None, None
    return x_last, add(x_last, end[1], -1.0), end[2] if len(end) == 3 else None


def known(cotangents: Sequence[Tensor | None], g: Tensor) -> Known:
    """From what has travelled."""
    x_next, predicted, d_next = (*cotangents, None, None)[:3]
    if x_next is None or x_next.shape != g.shape or x_next.dtype != g.dtype:
        raise RuntimeError(
            "ResidualStack: the rebuilt state must reach every step as a cotangent of the state's shape and dtype, got "
            f"{None if x_next is None else (list(x_next.shape), x_next.dtype)}; run autograd over the whole stack, and "
            "report this if you did"
        )
    return x_next, predicted, d_next


Adjoint = tuple[Tensor | None, Tensor | None, Tensor | None, float, float]
"""gamma_{n+1} (None where nobody needs gamma_n), v1, v2 and the scales of `Step.adjoint_scales`."""
Continued = tuple[Tensor, tuple[Tensor, ...], Tensor | None]
"""The rebuilt state; what travels to the step before as cotangents of its shadows; gamma_n."""


def continued_in_place(
    step: Step,
    x_next: Tensor,
    y: Tensor,
    d_next: Tensor | None,
    stages: Stages,
    weights: tuple[float, float] | None,
    adjoint: Adjoint,
    monitor: DriftMonitor,
) -> Continued:
    """`continued` by the ops that mutate, each buffer read and written once, and the defect's norms with it."""
    weight, gamma = step.scheme.weight(step.h), adjoint[0]
    if not step.is_rebuilt:
        if not step.is_anchored:
            monitor.record(step.n, y)
        if gamma is not None:
            ops.adjoint_update_(*adjoint)
        return y, _handed_on(step, y, d_next, stages, weights), gamma
    norms = monitor.row(step.n)
    if weights is None:
        ops.reverse_update_(x_next, y, *stages, weight, norms, *adjoint)
        return x_next, (x_next,), gamma
    assert d_next is not None
    ops.reverse_extrapolate_(x_next, y, d_next, *stages, weight, *weights, norms, *adjoint)
    return x_next, (x_next, y, d_next), gamma


def continued(
    step: Step,
    x_next: Tensor,
    y: Tensor,
    d_next: Tensor | None,
    stages: Stages,
    weights: tuple[float, float] | None,
    adjoint: Adjoint,
) -> Continued:
    """From the step's evaluation at y, what the step before needs."""
    x = step.scheme.add(x_next, stages, -step.h) if step.is_rebuilt else y
    gamma, v1, v2, gamma_scale, v_scale = adjoint
    if gamma is not None:
        gamma = gamma if gamma_scale == 1 else gamma_scale * gamma
        for v in (v1, v2):
            gamma = gamma if v is None else add(gamma, v, v_scale)
    return x, _handed_on(step, x, d_next, stages, weights), gamma


def _handed_on(
    step: Step, x: Tensor, d_next: Tensor | None, stages: Stages, weights: tuple[float, float] | None
) -> tuple[Tensor, ...]:
    """The state x and, with extrapolation, the prediction and the increment for the step before."""
    if weights is None:
        return (x,)
    assert d_next is not None
    d = increment(step.scheme, stages, step.h, x)
    return x, extrapolate(weights, x, d, d_next), d
