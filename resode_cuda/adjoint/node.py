"""The discrete adjoint: a backward pass that rebuilds the states instead of storing them.

Every step is one autograd node, and nothing is hidden between nodes: what the backward pass knows of the trajectory
(the rebuilt state and, to extrapolate, two increments) travels from node to node as the cotangents of shadow outputs,
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
from ..reverse import Reverse, predict
from ..schemes import BlockFunction, Scheme
from .blocks import Arguments, Block, BlockCall, HeldParameter, held_parameters, modified_in_place
from .drift import DriftMonitor
from .step import Step, continued, continued_in_place, known, known_at_the_end, shadow_count, steps_of
from .vjp import Products, leaves


def propagate(
    scheme: type[Scheme],
    solver: Reverse,
    blocks: Sequence[Block],
    steps: Sequence[float],
    anchors: int | None,
    x: Tensor,
    arguments: Arguments,
    argument_tensors: Sequence[Tensor],
    monitor: DriftMonitor,
    keep_input: bool = False,
) -> Tensor:
    """x_N from x_0, recorded so that the backward pass rebuilds the states.

    Args:
        steps: h of each step.
        anchors: keep the exact state at every step n divisible by it; None keeps x_N alone.
        keep_input: keep x_0, and measure how far the rebuilt one is from it.
    """
    blank = x.new_zeros(())
    shadows: Sequence[Tensor | None] = (None,) * shadow_count(solver)
    for step in steps_of(scheme, solver, steps, anchors):
        used = blocks[step.n : step.n + scheme.blocks_per_step]
        parameters = held_parameters(used)
        calls = [BlockCall(block, x.device) for block in used]
        evaluation = Evaluation(calls, parameters, arguments, monitor, keep_input and step.n == 0, blank)
        tensors = *argument_tensors, *(parameter.tensor for parameter in parameters)
        x, *shadows = AdjointStep.apply(step, evaluation, x, *shadows, *tensors)
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
        end, following = step.ends(x, x_next, stages, shadows, evaluation.blank)
        start = [x] if step.is_anchored or evaluation.is_input_kept else []
        ctx.save_for_backward(*tensors, *end, *start)
        ctx.set_materialize_grads(False)
        ctx.step, ctx.evaluation = step, evaluation
        return x_next, *following

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
        tensors, end, start = _saved_tensors(ctx, len(needs_tensors))
        x_next, predicted, d_next = known_at_the_end(step, end) if step.is_last else known(cotangents, g)
        monitor = None if _is_batched(g) else evaluation.monitor
        gamma = g
        if step.is_last:
            gamma = step.scheme.weight(step.h) * g
            if monitor is not None:
                monitor.begin(g, measures=step.solver.reuse)
        anchor = start if step.is_anchored else None

        with leaves(evaluation.parameters, tensors, needs_tensors) as used:
            functions = evaluation.functions(used)
            y = predict(step.solver, step.scheme, functions, x_next, step.h, predicted) if anchor is None else anchor
            products = Products(step.n, used, needs_x)
            stages, (v1, v2) = step.scheme.vjp(functions, y, step.h, gamma, products.linearize)

        weights = step.weights if needs_state else None
        adjoint = (gamma if needs_x else None, v1, v2, *step.adjoint_scales)
        if monitor is None:
            x, travels, g_x = continued(step, x_next, y, d_next, stages, weights, adjoint)
        else:
            # What travels is nobody else's and may be overwritten; what is saved may not, and what is found for a
            # tensor that a block adds to its output may be the cotangent itself.
            x_next = x_next.clone() if step.is_rebuilt and step.is_result_saved else x_next
            d_next = d_next.clone() if step.is_last and weights is not None and d_next is not None else d_next
            overwritten = [tensor for tensor in (x_next, y, d_next, gamma) if tensor is not None]
            products.found = apart(products.found, overwritten)
            x, travels, g_x = continued_in_place(step, x_next, y, d_next, stages, weights, adjoint, monitor)
        if evaluation.is_input_kept and start is not None and monitor is not None:
            monitor.record_input(x if anchor is None else step.scheme.add(x_next, stages, -step.h), start)
        if not needs_state:
            travels = ()
            if monitor is not None:
                monitor.end()
        nowhere = (None,) * (step.shadow_count - len(travels))
        return None, None, g_x, *travels, *nowhere, *products.found

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Any:
        raise unsupported("forward-mode differentiation")


def _saved_tensors(ctx: Any, count: int) -> tuple[Sequence[Tensor], Sequence[Tensor], Tensor | None]:
    """The step's tensors, what the last step keeps (x_N and increments, newest first), and the state it starts from."""
    try:
        saved = ctx.saved_tensors
    except RuntimeError as error:
        if "modified by an inplace operation" not in str(error):
            raise
        raise modified_in_place() from error
    tensors, kept = saved[:count], saved[count:]
    keeps_start = ctx.step.is_anchored or ctx.evaluation.is_input_kept
    return (tensors, kept[:-1], kept[-1]) if keeps_start else (tensors, kept, None)


def _is_batched(g: Tensor) -> bool:
    """Under torch.func.vmap or is_grads_batched: operands then differ in their true shapes, and none can be written."""
    functorch = torch._C._functorch
    return functorch.is_batchedtensor(g) or functorch.is_legacy_batchedtensor(g)
