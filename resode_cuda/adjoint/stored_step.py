"""A step whose increment the forward pass stores: what it keeps, and the companion's way there and back.

Forwards the companion c_n passes from step to step as the first shadow, with its units as the second; backwards as the
first one's cotangent. It ends where a state is kept, and starts afresh there.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .. import ops
from ..schemes import BlockFunction, Stages
from ..schemes import step as take_step
from ..stored import companion_dtype
from .step import Step, Trajectory, trajectory_at_the_end, trajectory_from

Strides = tuple[int, ...] | None


class StoredForward(NamedTuple):
    """A step of a forward pass that stores increments."""

    x_next: Tensor
    stages: Stages
    companion: Tensor | None
    """c_{n+1}; None after a kept state."""
    kept: tuple[Tensor, ...]
    """The packed increment, its scales and units, and c_{n+1} where the companion ends; nothing at a kept state."""
    shadows: tuple[Tensor, ...]
    """c_{n+1} and its units, which the next step starts with; nothing after the last."""


def stored_forward(
    step: Step, blocks: Sequence[BlockFunction], x: Tensor, shadows: Sequence[Tensor | None], blank: Tensor
) -> StoredForward:
    """Step n of a forward pass that stores increments.

    Args:
        shadows: c_n, and its units; None at the beginning of the stack.
        blank: one element, for shadows that carry nothing.
    """
    if step.is_anchored:
        x_next, stages = take_step(step.scheme, blocks, x, step.h)
        begun = None if step.ends_segment else ops.start_companion(x_next)
        return StoredForward(x_next, stages, None, (), _shadows(step, begun, x, blank))
    companion, unit = shadows
    solver, scheme = step.method.solver, step.scheme
    bits = solver.bits_of(step.n)
    if solver.rounded_forward:
        if companion is None:
            companion, unit = ops.start_companion(x)
        stages = scheme.stages(blocks, companion.to(x.dtype), step.h)
        x_next, companion, *packed = ops.store_step(x, *stages, scheme.weight(step.h), companion, unit, bits)
    elif companion is None or scheme.has_state_inside:
        x_next, stages = take_step(scheme, blocks, x, step.h)
        if companion is None:
            companion, unit = ops.start_companion(x, x_next)
        companion, *packed = ops.store(x_next, companion, unit, bits)
    else:
        stages = scheme.stages(blocks, x, step.h)
        x_next, companion, *packed = ops.store_step(x, *stages, scheme.weight(step.h), companion, unit, bits)
    assert unit is not None, "it comes with the companion"
    kept = (*packed, unit, companion) if step.ends_segment else (*packed, unit)
    following = None if step.ends_segment else (companion, unit)
    return StoredForward(x_next, stages, companion, kept, _shadows(step, following, x, blank))


def stored_trajectory(
    step: Step, kept: Sequence[Tensor], cotangents: Sequence[Tensor | None], g: Tensor, strides: Strides
) -> tuple[Trajectory, Tensor]:
    """What is known of the states in the backward pass, and y = c_n."""
    *increment, unit = kept[:3]
    if step.ends_segment:
        trajectory = Trajectory(_laid_out(kept[3], strides), None, None)
    else:
        trajectory = trajectory_from(cotangents, g.shape, companion_dtype(g.dtype))
    bits = step.method.solver.bits_of(step.n)
    return trajectory, ops.stored_step(trajectory.x_next, *increment, unit, bits)


def _laid_out(companion: Tensor, strides: Strides) -> Tensor:
    """The companion as it lay in the forward pass, which is the order of its packed increments. Hooks on what autograd
    saves may give it another layout."""
    if strides is None or companion.stride() == strides:
        return companion
    return companion.new_empty_strided(companion.shape, strides).copy_(companion)


def _shadows(step: Step, following: tuple[Tensor, Tensor] | None, x: Tensor, blank: Tensor) -> tuple[Tensor, ...]:
    if step.is_last:
        return ()
    if following is None:
        return blank.expand(x.shape), blank.expand(1)
    companion, unit = following
    # A trace may not return what it was given; else all steps share one memory.
    return companion, unit.clone() if torch.compiler.is_compiling() else unit.detach()


def known_states(
    step: Step,
    kept: Sequence[Tensor],
    anchor: Tensor | None,
    cotangents: Sequence[Tensor | None],
    g: Tensor,
    strides: Strides,
) -> tuple[Trajectory, Tensor | None]:
    """What is known of the states when the backward pass reaches a step, and the point y where that takes no block.

    Args:
        kept: what the step has saved of states after it.
        anchor: x_n, where that is kept.
        cotangents: of its shadows, which the step after it left.
        strides: of the companion that it has saved, if it has one.
    """
    if step.is_stored:
        return stored_trajectory(step, kept, cotangents, g, strides)
    if step.method.solver.is_stored:
        assert anchor is not None, "the state of a step that stores nothing is kept"
        return Trajectory(anchor, None, None), anchor
    if step.is_last:
        return trajectory_at_the_end(step, kept), anchor
    return trajectory_from(cotangents, g.shape, g.dtype), anchor
