"""The discrete adjoint: a backward pass that rebuilds the states instead of storing them.

Every step is one autograd node, and nothing is hidden between nodes: what the backward pass knows of the trajectory
(the rebuilt state and, to extrapolate, two increments) passes from node to node as the cotangents of shadow outputs,
tensors of the state's shape without storage of their own. Only the last step saves anything, x_N and the last two
increments, and steps with an anchor, which save the state they start from. So the order of execution is autograd's
own, a second backward pass starts afresh from x_N, and each parameter's gradient leaves as soon as its step is done.

Discrete adjoint method: Sander, Ablin and Peyré, NeurIPS 2022, arXiv:2205.14612.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..layouts import apart
from ..method import Method
from ..schemes import BlockFunction
from .blocks import Arguments, Block, BlockCall, HeldParameter, held_parameters, modified_in_place
from .drift import DriftMonitor
from .step import (
    Step,
    Trajectory,
    backward_update,
    backward_update_,
    shadow_count,
    trajectory_at_the_end,
    trajectory_from,
)
from .vjp import BlockVjps, leaves


def propagate(
    method: Method,
    blocks: Sequence[Block],
    x: Tensor,
    arguments: Arguments,
    argument_tensors: Sequence[Tensor],
    monitor: DriftMonitor,
    keep_input: bool = False,
) -> Tensor:
    """x_N from x_0, recorded so that the backward pass rebuilds the states.

    Args:
        arguments, argument_tensors: what every block gets beside the state, and the tensors in it.
        monitor: gets the defects of the backward pass.
        keep_input: keep x_0, and measure how far the rebuilt one is from it.
    """
    blank = x.new_zeros(())
    shadows: Sequence[Tensor | None] = (None,) * shadow_count(method)
    for n in range(len(method)):
        used = blocks[method.blocks_of(n)]
        parameters = held_parameters(used)
        calls = [BlockCall(block, x.device) for block in used]
        evaluation = Evaluation(calls, parameters, arguments, monitor, keep_input and n == 0, blank)
        tensors = *argument_tensors, *(parameter.tensor for parameter in parameters)
        x, *shadows = AdjointStep.apply(Step(method, n), evaluation, x, *shadows, *tensors)
    return x


def unsupported(what: str) -> RuntimeError:
    return RuntimeError(
        f'ResidualStack: gradient="adjoint" gives first derivatives in reverse mode only, got {what}; '
        'use gradient="backprop"'
    )


@dataclass
class Evaluation:
    """What a step's blocks need, forwards and backwards."""

    calls: list[BlockCall]
    parameters: list[HeldParameter]
    arguments: Arguments
    monitor: DriftMonitor
    is_input_kept: bool
    blank: Tensor
    """One element, the storage of all shadows."""

    def functions(self, tensors: Sequence[Tensor]) -> list[BlockFunction]:
        """The step's blocks as functions of the state alone; the first tensors are those among their arguments."""
        call = self.arguments.filled(tensors[: self.arguments.count])
        return [block_call.function(call) for block_call in self.calls]


class AdjointStep(torch.autograd.Function):
    """x_{n+1} = x_n + Phi_n(x_n), and backwards g_n = g_{n+1} + (dPhi_n/dx)^T g_{n+1} at the rebuilt x_n.

    Inputs: the step, its evaluation, x_n, the shadows (None for the first step), the tensors among the blocks'
    arguments, the blocks' parameters. Outputs: x_{n+1} and the shadows, of which the last step has none. Step N - 2
    gives its increment in the place of the last shadow, for the last step to keep.

    Cotangents: of x_{n+1} gamma_{n+1}, for the last step g_N; of the shadows the rebuilt x_{n+1}, with extrapolation
    also y, the prediction of x_n, and the increment d_{n+1}. All but those of the last step belong to the step that
    they reach, which overwrites them.
    """

    @staticmethod
    def forward(ctx: Any, step: Step, evaluation: Evaluation, x: Tensor, *shadows_and_tensors: Any) -> Any:
        shadows, tensors = shadows_and_tensors[: step.shadow_count], shadows_and_tensors[step.shadow_count :]
        stages = step.scheme.stages(evaluation.functions(tensors), x, step.h)
        x_next = step.scheme.add(x, stages, step.h)
        start = [x] if step.is_anchored or evaluation.is_input_kept else []
        ctx.save_for_backward(*tensors, *step.saved_for_last(x_next, stages, shadows), *start)
        ctx.set_materialize_grads(False)
        ctx.step, ctx.evaluation = step, evaluation
        return x_next, *step.shadows(x, stages, evaluation.blank)

    @staticmethod
    def backward(ctx: Any, g: Tensor | None, *cotangents: Tensor | None) -> Any:
        step: Step = ctx.step
        evaluation: Evaluation = ctx.evaluation
        needs_x, needs_state = ctx.needs_input_grad[2:4]
        needs_tensors = ctx.needs_input_grad[3 + step.shadow_count :]
        if torch.is_grad_enabled():
            raise unsupported("a double backward (create_graph=True)")
        if g is None:
            return (None,) * len(ctx.needs_input_grad)
        tensors, of_last, start = _saved_tensors(ctx, len(needs_tensors))
        trajectory = trajectory_at_the_end(step, of_last) if step.is_last else trajectory_from(cotangents, g)
        monitor = None if _is_batched(g) else evaluation.monitor
        gamma = g
        if step.is_last:
            gamma = step.scheme.weight(step.h) * g
            if monitor is not None:
                monitor.begin(g, measures=step.method.reuses)
        anchor = start if step.is_anchored else None

        with leaves(evaluation.parameters, tensors, needs_tensors) as used:
            functions = evaluation.functions(used)
            y = anchor if anchor is not None else step.predict(functions, trajectory)
            vjps = BlockVjps(step.n, used, needs_x)
            evaluated = step.scheme.vjp(functions, y, step.h, gamma, vjps.linearize)

        weights = step.weights_before if needs_state else None
        needed_gamma = gamma if needs_x else None
        if monitor is None:
            update = backward_update(step, trajectory, y, evaluated, needed_gamma, weights)
        else:
            # Cotangents belong to this step and may be overwritten; what is saved may not, and the gradient of a tensor
            # that a block adds to its output may be the cotangent itself.
            trajectory = _writable(step, trajectory, extrapolates=weights is not None)
            overwritten = [tensor for tensor in (*trajectory, y, gamma) if tensor is not None]
            vjps.found = apart(vjps.found, overwritten)
            update = backward_update_(step, trajectory, y, evaluated, needed_gamma, weights, monitor)
        if evaluation.is_input_kept and start is not None and monitor is not None:
            rebuilt = update.x if anchor is None else step.scheme.add(trajectory.x_next, evaluated.stages, -step.h)
            monitor.record_input(rebuilt, start)
        shadow_cotangents = update.cotangents if needs_state else ()
        if not needs_state and monitor is not None:
            monitor.end()
        missing = (None,) * (step.shadow_count - len(shadow_cotangents))
        return None, None, update.gamma, *shadow_cotangents, *missing, *vjps.found

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Any:
        raise unsupported("forward-mode differentiation")


def _saved_tensors(ctx: Any, count: int) -> tuple[Sequence[Tensor], Sequence[Tensor], Tensor | None]:
    """The step's tensors, what the last step saved (x_N and increments, newest first), and the state it starts from."""
    try:
        saved = ctx.saved_tensors
    except RuntimeError as error:
        if "modified by an inplace operation" not in str(error):
            raise
        raise modified_in_place() from error
    tensors, states = saved[:count], saved[count:]
    saves_start = ctx.step.is_anchored or ctx.evaluation.is_input_kept
    return (tensors, states[:-1], states[-1]) if saves_start else (tensors, states, None)


def _writable(step: Step, trajectory: Trajectory, extrapolates: bool) -> Trajectory:
    """The trajectory with copies of what is saved and would be overwritten."""
    x_next, predicted, d_next = trajectory
    if step.is_rebuilt and step.is_result_saved:
        x_next = x_next.clone()
    if step.is_last and extrapolates and d_next is not None:
        d_next = d_next.clone()
    return Trajectory(x_next, predicted, d_next)


def _is_batched(g: Tensor) -> bool:
    """Under torch.func.vmap or is_grads_batched: operands then differ in their true shapes, and none can be written."""
    functorch = torch._C._functorch
    return functorch.is_batchedtensor(g) or functorch.is_legacy_batchedtensor(g)
