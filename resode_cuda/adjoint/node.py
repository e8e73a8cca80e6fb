"""The discrete adjoint: a backward pass that rebuilds the states instead of storing them.

Every step is one autograd node, and nothing is hidden between nodes: what the backward pass knows of the trajectory
(the rebuilt state and, to extrapolate, two increments) passes from node to node as the cotangents of shadow outputs,
tensors of the state's shape without storage of their own. Only the last step saves anything, x_N and the last two
increments, and steps with an anchor, which save the state they start from. So the order of execution is autograd's
own, a second backward pass starts afresh from x_N, and each parameter's gradient leaves as soon as its step is done.

Discrete adjoint method: Sander, Ablin and Peyré, NeurIPS 2022, arXiv:2205.14612.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ..layouts import apart
from ..method import Method
from ..schemes import BlockFunction
from ..schemes import step as take_step
from . import sharding
from .block_arguments import Arguments
from .blocks import Auxiliaries, Block, BlockCall, Formats, held_parameters, modified_in_place
from .chain import Chain
from .drift import DriftMonitor
from .inventory import HeldParameter
from .kept_graph import KeptVjps, StepGraph, may_keep
from .outputs import Outputs, together
from .reevaluation import Increments
from .restoration import restoring
from .step import (
    Step,
    Trajectory,
    backward_update,
    backward_update_,
)
from .stored_step import StoredForward, known_states, stored_forward
from .vjp import BlockVjps, argument_leaves, parameter_leaves


def propagate(
    method: Method,
    blocks: Sequence[Block],
    x: Tensor,
    arguments: Arguments,
    monitor: DriftMonitor,
    *,
    keep_input: bool = False,
    states: Collection[int] = (),
) -> Outputs:
    """x_N from x_0, recorded so that the backward pass rebuilds the states.

    Args:
        arguments: what every block gets beside the state.
        monitor: gets the defects of the backward pass, and how far increments changed until then.
        keep_input: keep x_0, and measure how far the rebuilt one is from it.
        states: numbers of the states that are returned too, above 0 and below N. The backward pass starts afresh there.
    """
    arguments.refuse_iterators()
    arguments.refuse_caches()
    if states:
        method = replace(method, anchors=tuple(sorted({*method.anchors, *states})))
    chain = Chain(method, x, monitor)
    outputs, are_functions = Outputs(x, [], {}), True
    shadows: Sequence[Tensor | None] = chain.first_shadows
    for step in chain.steps:
        used = blocks[method.blocks_of(step.n)]
        evaluation = evaluation_of(chain, used, arguments, is_input_kept=keep_input and step.n == 0)
        if step.n in states:
            x, outputs.states[step.n], *shadows = ReturnedState.apply(step, evaluation, x, *shadows)
        x, auxiliaries, shadows = take(step, evaluation, x, shadows)
        are_functions = are_functions and all(call.is_function for call in evaluation.calls)
        outputs.auxiliaries.extend(auxiliaries)
    arguments.release()
    chain.generators.release()
    return together(outputs._replace(last=x, are_functions=are_functions))


def evaluation_of(
    chain: Chain, blocks: Sequence[Block], arguments: Arguments, *, is_input_kept: bool = False
) -> Evaluation:
    """What the blocks of the next step need."""
    calls = [BlockCall(block, chain.blank.device, chain.generators, stage) for stage, block in enumerate(blocks)]
    held = held_parameters(calls)
    return Evaluation(calls, held, Formats(held), arguments, chain, is_input_kept)


def take(
    step: Step, evaluation: Evaluation, x: Tensor, shadows: Sequence[Tensor | None]
) -> tuple[Tensor, Sequence[Tensor | None], Sequence[Tensor]]:
    """x_{n+1} from x_n, what the blocks returned beside it, and the shadows for the step after it.

    Args:
        shadows: of the step before; `Chain.first_shadows` where it is the first one of its chain.
    """
    tensors = *evaluation.arguments.tensors, *(parameter.for_node for parameter in evaluation.parameters)
    x, *rest = AdjointStep.apply(step, evaluation, x, *shadows, *tensors)
    evaluation.chain.gave(step, x)
    return x, rest[: evaluation.auxiliary_count], rest[evaluation.auxiliary_count :]


def unsupported(gradient: str, what: str) -> RuntimeError:
    return RuntimeError(
        f'ResidualStack: gradient="{gradient}" gives first derivatives in reverse mode only, got {what}; '
        'use gradient="backprop"'
    )


@dataclass
class Evaluation:
    """What a step's blocks need, forwards and backwards."""

    calls: list[BlockCall]
    parameters: Sequence[HeldParameter]
    formats: Formats
    """Dtypes and devices of the parameters."""
    arguments: Arguments
    chain: Chain
    is_input_kept: bool

    @property
    def monitor(self) -> DriftMonitor:
        return self.chain.monitor

    @property
    def increments(self) -> Increments:
        return self.chain.increments

    @property
    def blank(self) -> Tensor:
        """One element, the storage of all shadows."""
        return self.chain.blank

    @property
    def fsdp_states(self) -> list[Any]:
        """Those of modules inside the step's blocks that FSDP shards."""
        return sharding.states_of([call.inventory.shards for call in self.calls])

    @property
    def auxiliary_count(self) -> int:
        return sum(call.block.has_auxiliary for call in self.calls)

    def first(self, auxiliaries: Auxiliaries, tensors: Sequence[Tensor] | None = None) -> list[BlockFunction]:
        """The step's blocks in the forward pass, as functions of the state alone.

        Args:
            tensors: for those among their arguments, where their graph is kept.
        """
        return [call.first(self.arguments, auxiliaries, tensors) for call in self.calls]

    def keeping(self, auxiliaries: Auxiliaries, needs_x: bool) -> tuple[StepGraph | None, list[BlockFunction]]:
        """The same, with what their graph is kept in; None where it can't be kept."""
        arguments = self.arguments
        if not may_keep(self.calls, self.parameters, arguments.has_containers):
            return None, self.first(auxiliaries)
        tensors, parameters = arguments.cut_off(), [parameter.in_place for parameter in self.parameters]
        graph = StepGraph(self.calls, [*tensors, *parameters], needs_x)
        return graph, graph.keeping(self.first(auxiliaries, tensors), auxiliaries)

    def again(self, argument_tensors: Sequence[Tensor], auxiliaries: Auxiliaries) -> list[BlockFunction]:
        """The same in the backward pass, with these tensors for those among their arguments."""
        return [call.again(argument_tensors, auxiliaries) for call in self.calls]


class AdjointStep(torch.autograd.Function):
    """x_{n+1} = x_n + Phi_n(x_n), and backwards g_n = g_{n+1} + (dPhi_n/dx)^T g_{n+1} at the rebuilt x_n.

    Inputs: the step, its evaluation, x_n, the shadows (None for the first step), the tensors among the blocks'
    arguments, the blocks' parameters. Outputs: x_{n+1}, what the blocks returned beside their increments if they may,
    and the shadows, of which the last step has none. Step N - 2 gives its increment in the place of the last shadow,
    for the last step to keep.

    Cotangents: of x_{n+1} gamma_{n+1}, for the last step g_N; of the shadows the rebuilt x_{n+1}, with extrapolation
    also y, the prediction of x_n, and the increment d_{n+1}. All but those of the last step belong to the step that
    they reach, which overwrites them.
    """

    @staticmethod
    def forward(ctx: Any, step: Step, evaluation: Evaluation, x: Tensor, *shadows_and_tensors: Any) -> Any:
        shadows, tensors = shadows_and_tensors[: step.shadow_count], shadows_and_tensors[step.shadow_count :]
        auxiliaries: Auxiliaries = []
        ctx.strides = ctx.graph = None
        ctx.has_prehooks = False
        if step.method.solver.is_stored:

            def stored() -> StoredForward:
                ctx.graph, functions = evaluation.keeping(auxiliaries, needs_x=ctx.needs_input_grad[2])
                return stored_forward(step, functions, x, shadows, evaluation.blank)

            x_next, stages, companion, kept, new_shadows = sharding.while_gathered(evaluation.fsdp_states, stored)
            if companion is not None:
                evaluation.increments.record_rounding(step.n, x_next, companion)
                ctx.strides = companion.stride()
        else:
            x_next, stages = take_step(step.scheme, evaluation.first(auxiliaries), x, step.h)
            kept = tuple(step.saved_for_last(x_next, stages, shadows))
            new_shadows = tuple(step.shadows(x, stages, evaluation.blank))
        evaluation.increments.record(step.n, stages)
        evaluation.chain.took(step, x_next, new_shadows)
        start = [x] if step.is_anchored or evaluation.is_input_kept else []
        ctx.save_for_backward(*tensors, *kept, *start)
        ctx.set_materialize_grads(False)
        ctx.step, ctx.evaluation = step, evaluation
        if any(ctx.needs_input_grad):
            evaluation.chain.used(step, evaluation.fsdp_states)
        return x_next, *auxiliaries, *new_shadows

    @staticmethod
    def backward(ctx: Any, g: Tensor | None, *cotangents: Tensor | None) -> Any:
        if torch.is_grad_enabled():
            raise unsupported("adjoint", "a double backward (create_graph=True)")
        count = ctx.evaluation.auxiliary_count
        auxiliary_cotangents, cotangents = cotangents[:count], cotangents[count:]
        if g is None:
            return (None,) * len(ctx.needs_input_grad)
        if ctx.has_prehooks:
            g, cotangents = g.clone(), tuple(given if given is None else given.clone() for given in cotangents)
        return restoring(lambda: _backward(ctx, g, auxiliary_cotangents, cotangents))

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Any:
        raise unsupported("adjoint", "forward-mode differentiation")


_Node: Any = AdjointStep._backward_cls
_register_prehook = _Node.register_prehook


def _register_noticed(ctx: Any, hook: Callable[..., Any]) -> Any:
    """Have a hook called with a step's cotangents. It may hold them for a second pass, so that they are not the step's
    own any more: pipeline schedules that differentiate for states first, and for parameters later, do."""
    ctx.has_prehooks = True
    return _register_prehook(ctx, hook)


_Node.register_prehook = _register_noticed


class ReturnedState(torch.autograd.Function):
    """x_n, which the stack returns too: the backward pass may start there, or pass through.

    Inputs: step n, its evaluation, x_n, the shadows. Outputs: x_n for step n, x_n for the caller, the shadows.
    Cotangents: as between two steps, and of the caller's x_n its gradient, which adds w_{n-1} times itself to gamma_n.
    """

    @staticmethod
    def forward(ctx: Any, step: Step, evaluation: Evaluation, x: Tensor, *shadows: Tensor) -> Any:
        returned = x.detach()
        ctx.save_for_backward(returned)
        ctx.set_materialize_grads(False)
        ctx.step, ctx.evaluation = step, evaluation
        return x.detach(), returned, *(shadow.detach() for shadow in shadows)

    @staticmethod
    def backward(ctx: Any, gamma: Tensor | None, g: Tensor | None, *cotangents: Tensor | None) -> Any:
        step: Step = ctx.step
        if torch.is_grad_enabled():
            raise unsupported("adjoint", "a double backward (create_graph=True)")
        if g is None:
            return None, None, gamma, *cotangents
        weighted = step.weight_before * g
        if gamma is not None:
            return None, None, gamma + weighted, *cotangents
        # Later steps have no gradient: the way back starts here.
        (x,) = _unpacked(ctx)
        ctx.evaluation.increments.begin()
        if not _is_batched(g):
            ctx.evaluation.monitor.begin(g, step.method.measures_defects, ctx.evaluation.increments)
        return None, None, weighted, x.clone(), *(None,) * (len(cotangents) - 1)

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Any:
        raise unsupported("adjoint", "forward-mode differentiation")


def _backward(
    ctx: Any, g: Tensor, auxiliary_cotangents: Sequence[Tensor | None], cotangents: Sequence[Tensor | None]
) -> Any:
    step: Step = ctx.step
    evaluation: Evaluation = ctx.evaluation
    needs_x, needs_state = ctx.needs_input_grad[2:4]
    needs_tensors = ctx.needs_input_grad[3 + step.shadow_count :]
    tensors, kept, start = _saved_tensors(ctx, len(needs_tensors))
    monitor = None if _is_batched(g) else evaluation.monitor
    gamma = g
    begins = step.is_last
    if evaluation.chain.is_open and not begins and cotangents[0] is None:
        # No step followed, or none that the gradient came through.
        begins, cotangents = True, (evaluation.chain.end_of(step), *cotangents[1:])
    if begins:
        gamma = step.scheme.weight(step.h) * g
        evaluation.increments.begin()
        if monitor is not None:
            monitor.begin(g, step.method.measures_defects, evaluation.increments)
    anchor = start if step.is_anchored else None

    count = evaluation.arguments.count
    evaluation.formats.check()
    states = evaluation.fsdp_states
    sharding.gather(states, g)
    parameters = parameter_leaves(evaluation.parameters, tensors[count:], needs_tensors[count:])
    leaf_of = dict(zip(map(id, tensors[count:]), parameters, strict=True))
    used = argument_leaves(tensors[:count], evaluation.arguments.kinds, needs_tensors[:count], leaf_of) + parameters
    auxiliaries: Auxiliaries = []
    functions = evaluation.again(used[:count], auxiliaries)
    trajectory, y = known_states(step, kept, anchor, cotangents, g, ctx.strides)
    if y is None:
        y = step.predict(functions, trajectory)
    may_use_strangers = any(call.inventory.may_use_strangers for call in evaluation.calls)
    is_measured = step.n in evaluation.increments.measured
    of_step = step.n, used, needs_x, auxiliaries, auxiliary_cotangents, may_use_strangers
    # Hooks that leaves have by now are called by the engine around this, once.
    is_kept = ctx.graph is not None and not any(map(_has_hooks, tensors))
    vjps = KeptVjps(ctx.graph, is_measured, *of_step) if is_kept else BlockVjps(*of_step)
    evaluated = step.scheme.vjp(functions, y.to(g.dtype), step.h, gamma, vjps.linearize)

    weights = step.weights_before if needs_state else None
    needed_gamma = gamma if needs_x else None
    if evaluated.stages is not None and is_measured:
        evaluation.increments.compare(step.n, evaluated.stages, y, trajectory.x_next)
        if monitor is not None:
            monitor.was_measured(step.n)
    evaluation.monitor.warn_of_left_behind(
        {name: call.block.index for call in evaluation.calls for name in call.left_behind}
    )
    if monitor is None:
        update = backward_update(step, trajectory, y, evaluated, needed_gamma, weights)
    else:
        # Cotangents belong to this step and may be overwritten; what is saved may not, and the gradient of a tensor
        # that a block adds to its output may be the cotangent itself.
        trajectory = _writable(step, trajectory, extrapolates=weights is not None)
        overwritten = [tensor for tensor in (*trajectory, y, gamma, evaluated.v1) if tensor is not None]
        vjps.found = apart(vjps.found, overwritten)
        if step.is_stored and is_measured:
            defect_square = evaluation.increments.defect_square(step.n)
            monitor.record_stored(step.n, defect_square, y, trajectory.x_next)
        elif step.is_stored and step.ends_segment:
            monitor.look_at(step.n, trajectory.x_next)
        update = backward_update_(step, trajectory, y, evaluated, needed_gamma, weights, monitor)
    if evaluation.is_input_kept and start is not None and monitor is not None:
        is_known = anchor is None or step.method.solver.is_stored
        rebuilt = update.x
        if not is_known:
            assert evaluated.stages is not None
            rebuilt = step.scheme.add(trajectory.x_next, evaluated.stages, -step.h)
        monitor.record_input(rebuilt, start)
    shadow_cotangents = update.cotangents if needs_state else ()
    if not needs_state:
        evaluation.monitor.end(evaluation.increments, is_batched=monitor is None)
    missing = (None,) * (step.shadow_count - len(shadow_cotangents))
    products = [
        torch.zeros_like(tensor) if product is None and need and _has_hooks(tensor) else product
        for product, tensor, need in zip(vjps.found, tensors, needs_tensors, strict=True)
    ]
    are_left = bool(states) and sharding.are_gradients_left()
    for place, held in enumerate(evaluation.parameters, count):
        if held.shard is not None:
            if are_left:
                sharding.leave_gradient(held.shard, vjps.found[place])
            products[place] = None
    sharding.reduce(states, [state for state in states if evaluation.chain.first_users[state] < step.n])
    return None, None, update.gamma, *shadow_cotangents, *missing, *products


def _has_hooks(tensor: Tensor) -> bool:
    """Whether autograd would call hooks of the tensor, also where no gradient is given, with None."""
    return bool(tensor._backward_hooks or getattr(tensor, "_post_accumulate_grad_hooks", None))


def _unpacked(ctx: Any) -> Sequence[Tensor]:
    try:
        saved: Sequence[Tensor] = ctx.saved_tensors
    except RuntimeError as error:
        if "modified by an inplace operation" not in str(error):
            raise
        raise modified_in_place() from error
    return saved


def _saved_tensors(ctx: Any, count: int) -> tuple[Sequence[Tensor], Sequence[Tensor], Tensor | None]:
    """The step's tensors, what it keeps of states after it, and the state it starts from."""
    saved = _unpacked(ctx)
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
